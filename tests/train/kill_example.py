"""Kill a run again and again at random moments and start it again, also as a program:

    python kill_example.py WORKDIR KILLS SEED

It runs loop_example.py with a checkpoint after every second step, and prints one line per kill: the newest checkpoint
then, and the step that the next start goes on from. The last line is of the run that was let end.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import loop_example

from diffjax.runtime import checkpoint

SETTINGS = {"total_images": 96, "checkpoint_every_steps": 2, "keep_checkpoints": 2}
START_S = 120.0  # that a start may take until its first checkpoint


class Kill(NamedTuple):
    """newest: checkpoint on the disk when the process was killed, 0 for none. resumed: where the next one began, 0 for
    the start."""

    newest: int
    resumed: int


def newest(workdir: Path) -> int:
    return max(checkpoint.steps(workdir), default=0)


def start(workdir: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, loop_example.__file__, str(workdir), json.dumps(SETTINGS)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def kill_often(workdir: Path, kills: int, seed: int) -> Iterator[Kill]:
    """Yields each kill once the next start has told where it began. Ends with the run. Raises RuntimeError for a start
    that fails."""
    chance, before = random.Random(seed), None
    for attempt in range(kills + 1):
        process, then = start(workdir), newest(workdir)
        try:
            if attempt < kills:
                # from its first step on a run is writing most of the time: it dies before, while and after it writes
                deadline = time.monotonic() + START_S
                while newest(workdir) == then and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 0.1))
                process.kill()
            _, log = process.communicate(timeout=START_S)
        finally:
            process.kill()
        if process.returncode not in (0, -9):
            raise RuntimeError(f"start {attempt} ended with {process.returncode}:\n{log}")
        resumed = re.search(r"resumed from step (\d+)", log)
        if before is not None:
            yield Kill(before, int(resumed[1]) if resumed else 0)
        before = newest(workdir)
    yield Kill(before, before)


if __name__ == "__main__":
    for kill in kill_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        print(kill, flush=True)
