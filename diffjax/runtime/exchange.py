"""Short texts between processes, through the service that `jax.distributed` starts. No device takes part, so threads
may wait here while steps run, and every wait ends.

    verdicts = texts("" if readable else "unreadable")     # of process 0, of process 1, ...
"""

import itertools
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # the only way to the service's table of texts

PATIENCE_S = 1800.0  # that the first process to arrive waits for the last
_LONGEST_PAUSE_S = 1.0  # between two looks at the table
_numbers = itertools.count()  # of the exchanges and meetings, the same on all processes


def texts(own: str, patience_s: float = PATIENCE_S) -> list[str]:
    """What each process gave, in process order; a step of all processes, taken in their main threads.

    Raises TimeoutError naming the process that gave nothing within `patience_s` seconds.
    """
    if jax.process_count() == 1:
        return [own]
    number, table = next(_numbers), _table()
    table.key_value_set(f"diffjax/texts/{number}/{jax.process_index()}", "." + own)  # an empty text is no text there
    deadline = time.monotonic() + patience_s
    found = []
    for process in range(jax.process_count()):
        left_ms = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            text = table.blocking_key_value_get(f"diffjax/texts/{number}/{process}", left_ms)
        except jax.errors.JaxRuntimeError as error:
            which = f"process {process} of {jax.process_count()}"
            raise TimeoutError(f"{which} said nothing for {patience_s:.0f} s") from error
        found.append(text[1:])
    return found


class Meeting:
    """A barrier for the threads that write a checkpoint, called by orbax (see its BarrierSyncFn).

    It ends for all as soon as one process has failed, instead of by time. orbax calls it a last time while the error of
    a background write is on its way: this is how a failure is noticed.

    failure: what failed, on this process or another; "" for nothing.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._alone = jax.process_count() == 1
        self._folder = f"diffjax/meeting/{next(_numbers)}"
        self._calls = itertools.count()

    def fail(self, text: str) -> None:
        """Tell all processes; the first failure stays."""
        if self.failure:
            return
        self.failure = text
        if not self._alone:
            _table().key_value_set(f"{self._folder}/failed/{jax.process_index()}", text)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all. Raises RuntimeError when another process has failed, TimeoutError naming those that stay."""
        error = sys.exception()
        if error is not None and threading.current_thread() is not threading.main_thread():
            self.fail(f"{type(error).__name__}: {error}")
            return
        if self._alone:
            return
        number, table = next(self._calls), _table()
        room, deadline, pause = f"{self._folder}/{number}", time.monotonic() + timeout_ms / 1000, 0.01
        table.key_value_set(f"{room}/{jax.process_index()}", key)
        while len(present := table.key_value_dir_get(room + "/")) < jax.process_count():
            if failed := table.key_value_dir_get(f"{self._folder}/failed/"):
                path, text = failed[0]
                self.failure = self.failure or f"process {path.rpartition('/')[2]}: {text}"
                raise RuntimeError(self.failure)
            if time.monotonic() > deadline:
                absent = set(range(jax.process_count())) - {int(path.rpartition("/")[2]) for path, _ in present}
                raise TimeoutError(f"processes {sorted(absent)} did not come to {key!r} in {timeout_ms / 1000:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if number and jax.process_index() == 0:  # all are here, so all have left the room before
            table.key_value_delete(f"{self._folder}/{number - 1}/")


def _table() -> Any:
    table = distributed.global_state.client
    if table is None:
        raise RuntimeError("several processes, but jax.distributed.initialize was not called")
    return table
