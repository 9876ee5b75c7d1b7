"""What happens to a training of several processes when something breaks: each fault is made for real, on this machine.

    python launch/faults.py --out=runs/faults [--only=kill_one,disk_full] [--kills=20]

Every process is a real one of `diffjax.cli.train` (JAX's CPU collectives), trains a small network on scikit-learn's
digits, and is told of nothing. Writes report.md and report.json with the table `faults`: runs (starts of the whole
group), survived (of the runs: ended with a clear message and exit code, and the next start went on as it should),
lost_steps (most that one fault cost, of those already logged), seconds_to_message (from the fault to the end of the last
process that was left; the longest of the runs). Started by launch/faults.sh.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

SAVE_EVERY, STEPS, BATCH = 20, 200, 48  # 24 microbatches: 1 to 4 processes take equal numbers of them, two or more
AGAIN, MISTAKE, ERROR = 75, 2, 1
CONFIG = {
    "train.batch_size": BATCH, "train.microbatches": 24, "train.log_every_steps": 1,
    "train.checkpoint_every_steps": SAVE_EVERY, "train.checkpoint_every_minutes": 0.0, "train.sample_every_steps": 0,
    "model.width": 32, "model.depth": 1, "optim.warmup_images": 0,
}  # fmt: skip
TRAIN = "import sys; from diffjax.cli import flags, train; sys.exit(flags.run(train.__doc__, train.define, train.main))"
PATIENCE_S = 300.0


class Broken(AssertionError):
    """What was expected after a fault did not happen."""


class Group:
    """Processes that train together. before: Python that some of them run first, by number."""

    def __init__(
        self, workdir: Path, count: int, *, started: Sequence[int] = (), before: Mapping[int, str] = {},
        environ: Mapping[str, str] = {}, **changes: object,
    ) -> None:  # fmt: skip
        port, self.logs, self.workdir = _free_port(), {}, workdir
        options = {**CONFIG, "train.total_images": BATCH * STEPS, **_dotted(changes)}
        changed = [f"--config.{key}={value}" for key, value in options.items()]
        argv = ["--config=configs/quick/edm_digits.py", f"--workdir={workdir}", *changed]
        self.processes = {}
        workdir.parent.mkdir(parents=True, exist_ok=True)
        for i in started or range(count):
            own = {"DIFFJAX_COORDINATOR": f"127.0.0.1:{port}", "DIFFJAX_NUM_PROCESSES": str(count)}
            own |= {"DIFFJAX_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
            self.logs[i] = Path(f"{workdir}.{i}.log")
            with self.logs[i].open("w") as log:
                command = [sys.executable, "-c", f"{before.get(i, '')}\n{TRAIN}", *argv]
                environment = {**os.environ, **own, **environ}
                self.processes[i] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> dict[int, int]:
        """Exit codes, once all have ended."""
        end = time.monotonic() + PATIENCE_S
        try:
            return {i: process.wait(max(0.1, end - time.monotonic())) for i, process in self.processes.items()}
        except subprocess.TimeoutExpired as error:
            raise Broken(f"still running after {PATIENCE_S:.0f} s:\n{self.text()}") from error
        finally:
            self.kill()

    def kill(self, *numbers: int) -> None:
        """kill -9, all of them by default."""
        for i in numbers or self.processes:
            if self.processes[i].poll() is None:
                self.processes[i].send_signal(signal.SIGKILL)

    def reach(self, step: int) -> None:
        """Wait until a step is in the log."""
        self.until(lambda: len(log := losses(self.workdir)) > 0 and max(log) >= step, f"step {step}")

    def until(self, found: Callable[[], bool], what: str) -> None:
        """Wait for something that a running group does."""
        end = time.monotonic() + PATIENCE_S
        while not found():
            if time.monotonic() > end or all(process.poll() is not None for process in self.processes.values()):
                self.kill()
                raise Broken(f"waited for {what}, which did not come:\n{self.text()}")
            time.sleep(0.01)

    def text(self) -> str:
        """What all have said."""
        return "\n".join(f"process {i}:\n{log.read_text(errors='replace')[-3000:]}" for i, log in self.logs.items())

    def expect(self, codes: Mapping[int, int], *words: str) -> None:
        """Raises Broken unless those processes end with these codes, and all of these words are said."""
        found = self.wait()
        said = self.text()
        absent = [word for word in words if word not in said]
        if absent or any(found[i] != code for i, code in codes.items()):
            raise Broken(f"expected codes {dict(codes)}, found {found}; not said: {absent}\n{said}")


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss of a run's log; a last line that is not whole is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        records = [json.loads(line) for line in lines]
        return {record["step"]: record["loss"] for record in records if "loss" in record}
    return {}


def whole(folder: Path) -> dict[int, float]:
    """Losses of the run that nothing happens to, by two processes; made once."""
    if max(losses(folder / "whole"), default=0) < STEPS:
        Group(folder / "whole", 2).expect({0: 0, 1: 0})
    return losses(folder / "whole")


def check_same(workdir: Path, expected: Mapping[int, float]) -> None:
    """Raises Broken unless the run is complete and each of its losses is, bit by bit, that of the whole one."""
    found = losses(workdir)
    wrong = [step for step in expected if found.get(step) != expected[step]]
    if wrong:
        raise Broken(f"{workdir}: losses of steps {wrong[:5]} differ from the run that was not stopped")


def finish(workdir: Path, count: int, expected: Mapping[int, float]) -> int:
    """Go on to the end with `count` processes; returns the step that was resumed from."""
    group = Group(workdir, count)
    group.expect(dict.fromkeys(range(count), 0))
    check_same(workdir, expected)
    resumed = [line for line in group.text().splitlines() if "resumed from step" in line]
    return int(resumed[0].split("step ")[1].split()[0].replace(",", "")) if resumed else 0


# The faults: each yields (steps lost, seconds to the message) a run, and raises Broken where it did not end well ---------

Outcome = Iterator[tuple[int, float]]


def kill_one(folder: Path, counts: Sequence[tuple[int, int]] = ((3, 2), (2, 4), (2, 1)), seed: int = 0) -> Outcome:
    """kill -9 of one process at a random step; the rest say so, and fewer or more go on to the same bits."""
    expected, random_of = whole(folder), random.Random(seed)
    for number, (before, after) in enumerate(counts):
        workdir = folder / f"kill_one_{number}"
        step, victim = random_of.randrange(SAVE_EVERY + 5, STEPS - 30), random_of.randrange(before)
        group = Group(workdir, before)
        group.reach(step)
        start = time.monotonic()
        group.kill(victim)
        left = {i: AGAIN for i in range(before) if i != victim}
        group.expect(left, f"process {victim} of {before}", "run the same command")
        seconds, reached = time.monotonic() - start, max(losses(workdir))
        yield reached - finish(workdir, after, expected), seconds


def kill_all_at_random(folder: Path, kills: int = 20) -> Outcome:
    """kill -9 of all processes after a random time, again and again: no checkpoint that was there is lost."""
    expected, random_of, workdir = whole(folder), random.Random(1), folder / "kill_all"
    before: set[int] = set()
    for number in range(kills):
        group = Group(workdir, 2, **{"train__checkpoint_every_steps": 5})
        floor = max(before, default=0)
        with contextlib.suppress(Broken):  # that a fast run ended before the kill is no fault
            group.reach(min(STEPS, floor + random_of.randrange(1, 16)))
        time.sleep(random_of.random() * 0.2)
        reached = max(losses(workdir), default=0)
        group.kill()
        group.wait()
        now = _checkpoints(workdir)
        if max(now, default=0) < floor:
            raise Broken(f"kill {number}: checkpoints {sorted(before)} before, {sorted(now)} after")
        before = now
        yield reached - max(now, default=0), 0.0
    group = Group(workdir, 2, **{"train__checkpoint_every_steps": 5})
    group.expect({0: 0, 1: 0})
    check_same(workdir, expected)


def damaged_checkpoint(folder: Path, ways: Sequence[str] = ("truncate", "flip", "remove")) -> Outcome:
    """A file of the newest checkpoint is cut, a bit of it flipped, or it is gone: the one before it is used, and said."""
    expected = whole(folder)
    for way in ways:
        workdir = folder / f"damaged_{way}"
        shutil.copytree(folder / "whole", workdir)
        *_, before, last = sorted(_checkpoints(workdir))
        newest = workdir / "checkpoints" / str(last)
        victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        content = bytearray(victim.read_bytes())
        if way == "truncate":
            victim.write_bytes(content[: len(content) // 2])
        if way == "flip":
            content[len(content) // 2] ^= 16
            victim.write_bytes(content)
        if way == "remove":
            victim.unlink()
        start, group = time.monotonic(), Group(workdir, 2)
        group.until(lambda group=group: "is unreadable" in group.text(), "the warning")
        seconds = time.monotonic() - start
        group.expect({0: 0, 1: 0}, "the previous one", f"resumed from step {before}")
        check_same(workdir, expected)
        yield last - before, seconds


def half_never_start(folder: Path) -> Outcome:
    """Two of four processes do not come: the others say which, after the time that was set."""
    start = time.monotonic()
    short = "import diffjax.runtime.distributed as d; d.session.__wrapped__.__kwdefaults__['timeout_s'] = 10.0"
    group = Group(folder / "half", 4, started=(0, 1), before={0: short, 1: short})
    group.expect({0: AGAIN, 1: AGAIN}, "2 of 4 processes", "missing: 2, 3")
    yield 0, time.monotonic() - start


def disk_full(folder: Path) -> Outcome:
    """No byte more can be written while a checkpoint is: all end, and those before it stay."""
    expected, workdir = whole(folder), folder / "disk_full"
    # a file may not grow beyond 4 KiB once the first checkpoint is there: the kernel fails writes as a full disk does
    limit = (
        "import resource, signal, threading, time, pathlib; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def watch():\n"
        f"    while not pathlib.Path({str(workdir)!r}, 'checkpoints', '{SAVE_EVERY}').exists(): time.sleep(0.005)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "threading.Thread(target=watch, daemon=True).start()"
    )
    group = Group(workdir, 2, before={0: limit, 1: limit})
    group.until(lambda: (workdir / "checkpoints" / str(SAVE_EVERY)).exists(), "the first checkpoint")
    start = time.monotonic()
    codes = group.wait()
    seconds, kept = time.monotonic() - start, _checkpoints(workdir)
    if any(code in (0, AGAIN) for code in codes.values()) or "make space" not in group.text().lower() or SAVE_EVERY not in kept:
        raise Broken(f"codes {codes}, checkpoints {kept}\n{group.text()}")
    reached = max(losses(workdir), default=SAVE_EVERY)
    yield reached - finish(workdir, 2, expected), seconds


def bucket_unreachable(folder: Path) -> Outcome:
    """Checkpoints are to go where nothing answers: said before any training."""
    start = time.monotonic()
    group = Group(folder / "bucket", 2, train__checkpoint_folder="gs://diffjax-no-such-bucket/run")
    codes = group.wait()
    if any(code != MISTAKE for code in codes.values()) or "gs://diffjax-no-such-bucket" not in group.text():
        raise Broken(f"codes {codes}\n{group.text()}")
    yield 0, time.monotonic() - start


def sigterm_in_a_save(folder: Path) -> Outcome:
    """One process gets SIGTERM while a checkpoint is being written: all save at one step and end with 75."""
    expected, workdir = whole(folder), folder / "sigterm"
    group = Group(workdir, 2)
    saving = lambda: any((workdir / "checkpoints").glob("*tmp*"))  # noqa: E731
    group.until(lambda: saving() or len(_checkpoints(workdir)) > 0, "a save")
    start = time.monotonic()
    group.processes[1].send_signal(signal.SIGTERM)
    group.expect({0: AGAIN, 1: AGAIN}, "run the same command to go on")
    seconds, reached = time.monotonic() - start, max(losses(workdir))
    yield max(0, reached - finish(workdir, 2, expected)), seconds


def clock_skew(folder: Path) -> Outcome:
    """A host's clock is an hour ahead: it is said, and nothing else happens."""
    expected, workdir = whole(folder), folder / "clock"
    ahead = "import time; real = time.time; time.time = lambda: real() + 3600"
    start, group = time.monotonic(), Group(workdir, 2, before={1: ahead}, train__checkpoint_every_minutes=0.01)
    group.until(lambda: "WARNING" in group.text() and "clock" in group.text(), "the warning")
    seconds = time.monotonic() - start
    group.expect({0: 0, 1: 0})
    check_same(workdir, expected)
    yield 0, seconds


def nan_on_one_host(folder: Path) -> Outcome:
    """The images of one process hold a NaN at some step: all stop, the step and the process are named, nothing is saved."""
    workdir, at = folder / "nan", SAVE_EVERY + 7
    spoilt = (
        "import numpy, diffjax.data.loader as loader\n"
        "inner = loader._Reader.__call__\n"
        "def read(self, start):\n"
        "    batch = inner(self, start)\n"
        f"    if start == {BATCH} * {at}: batch['image'] = numpy.where(numpy.arange(len(batch['image'])) == 3, numpy.nan, "
        "batch['image'].T.astype(numpy.float32)).T.astype(numpy.float32)\n"
        "    return batch\n"
        "loader._Reader.__call__ = read"
    )
    group = Group(workdir, 2, before={1: spoilt})
    group.reach(SAVE_EVERY)
    start = time.monotonic()
    group.expect({0: ERROR, 1: ERROR}, f"step {at + 1}: found non-finite", "process 1 of 2", "no number in ['image']", "its own data is finite")
    if max(_checkpoints(workdir)) != SAVE_EVERY:
        raise Broken(f"checkpoints {_checkpoints(workdir)}, expected those before step {at}")
    yield at - SAVE_EVERY, time.monotonic() - start


FAULTS: dict[str, Callable[..., Outcome]] = {
    "kill_one": kill_one, "kill_all_at_random": kill_all_at_random, "damaged_checkpoint": damaged_checkpoint,
    "half_never_start": half_never_start, "disk_full": disk_full, "bucket_unreachable": bucket_unreachable,
    "sigterm_in_a_save": sigterm_in_a_save, "clock_skew": clock_skew, "nan_on_one_host": nan_on_one_host,
}  # fmt: skip


def row(name: str, folder: Path, kills: int) -> dict[str, object]:
    """A row of the table; what did not survive is printed."""
    runs, lost, seconds, survived = 0, 0, 0.0, 0
    try:
        own = {"kills": kills} if name == "kill_all_at_random" else {}
        for steps, taken in FAULTS[name](folder, **own):
            runs, survived, lost, seconds = runs + 1, survived + 1, max(lost, steps), max(seconds, taken)
    except Broken as error:
        runs += 1
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    return {"fault": name, "runs": runs, "survived": survived, "lost_steps": lost, "seconds_to_message": round(seconds, 1)}


def _dotted(changes: Mapping[str, object]) -> dict[str, object]:
    return {key.replace("__", "."): value for key, value in changes.items()}


def _checkpoints(workdir: Path) -> set[int]:
    folder = workdir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/faults", help="folder of the report")
    parser.add_argument("--only", default="", help=f"some of {', '.join(FAULTS)}")
    parser.add_argument("--kills", type=int, default=20, help="of kill_all_at_random")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        parser.exit(2, f"error: found --only={','.join(unknown)}, expected some of {', '.join(FAULTS)}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name}: {FAULTS[name].__doc__}", flush=True)
            rows.append(row(name, Path(folder), arguments.kills))
            print(f"  {rows[-1]}", flush=True)
    from diffjax.runtime import report

    lines = "\n".join(f"- `{name}`: {FAULTS[name].__doc__}" for name in names)
    text = (
        f"{BATCH} images a step, a checkpoint every {SAVE_EVERY} of {STEPS} steps (every 5 for kill_all_at_random); 1 to 4 "
        f"processes on one machine. `survived`: of the runs.\n\n<!-- table: faults -->\n\n{lines}"
    )
    command = f"bash launch/faults.sh {' '.join(sys.argv[1:])}".strip()
    path = report.write_report(arguments.out, "Faults", [("Faults", text), ("Reproduce", f"`{command}`")], {"faults": rows})
    print(f"report: {path}")
    return 0 if all(row["survived"] == row["runs"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
