"""Checkpoints of a run: a folder WORKDIR/checkpoints/STEP, or one in a bucket, holds two parts.

state  every array of the train state by path, written by orbax (no pickle), each process its own shards
run    JSON: format, step, config, versions, position of the data iterator, state of the loop; shape, dtype and checksum
       of every array (see `checksums`), and the SHA-256 of all this

This module writes; `checkpoint_read` reads. A checkpoint is written beside its place and renamed, in a bucket marked
(commit_success.txt) when it is whole: what is cut short is never taken for one. Of a run's checkpoints the newest
`keep_last` stay, temporary, whether a number of steps or a time brought them; at multiples of `keep_every_steps` they
are permanent.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from diffjax.core import trees
from diffjax.runtime import buckets, checksums, configs, exchange, guards, report

FOLDER = "checkpoints"
FORMAT = "diffjax-checkpoint-1"

_TEMPORARY = ".orbax-checkpoint-tmp"
_COMPLETE = "commit_success.txt"  # orbax's mark of a whole checkpoint in a bucket
_WRITE_S = 1200  # that one checkpoint may take in the background


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names it and the remedy."""


class Checkpoints:
    """Writer of one run's checkpoints; a context that waits for every write on exit.

    keep_last: newest checkpoints kept. keep_every_steps: checkpoints at its multiples are kept for
    good (0: none). Writing goes on in a thread; its error is raised by the next `save`, `check` or
    `close` as CheckpointError, on every process within seconds, and older checkpoints stay.
    Of several processes, all make it and call its methods alike; the first one makes folders.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        keep_last: int = 2,
        keep_every_steps: int = 0,
        asynchronous: bool = True,
    ) -> None:
        if keep_last < 1 or keep_every_steps < 0:
            raise ValueError(
                f"found keep_last {keep_last}, keep_every_steps {keep_every_steps}: keep at least 1 checkpoint, "
                "and use 0 or more steps"
            )
        self._folder = place(workdir, config)
        self._config = configs.to_plain(config)
        self._meeting = exchange.Meeting()
        self._has_failed = False
        _on_all(lambda: _make(self._folder))
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=asynchronous,
            async_options=ocp.AsyncOptions(timeout_secs=_WRITE_S, barrier_sync_fn=self._meeting),
            multiprocessing_options=_processes(),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "run"))
        self.last_step = self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Any, loop: Mapping[str, Any]) -> None:
        """Start writing the checkpoint of `step`; returns when `state` may be donated.

        state: arrays, those of several processes global. iterator: JSON position of the data iterator before the next
        batch. loop: JSON state of the loop. Raises CheckpointError when this or the previous write failed, ValueError
        for a state that cannot be named by path, guards.NonFiniteError, TypeError for a position that is not JSON.
        """
        self.check()
        flat = {path: jnp.asarray(leaf) for path, leaf in trees.flatten(state).items()}
        sums, nonfinite = checksums.of_arrays(flat)
        _check_finite(step, nonfinite)
        run = {
            "format": FORMAT,
            "step": step,
            "config": self._config,
            "versions": report.versions(),
            "iterator": iterator,
            "loop": dict(loop),
            "arrays": {path: [leaf.dtype.name, list(leaf.shape), sums[path]] for path, leaf in flat.items()},
        }
        run = _as_json(run)
        run["sha256"] = checksums.of_text(run)
        parts = ocp.args.Composite(state=ocp.args.StandardSave(flat), run=ocp.args.JsonSave(run))
        self._attempt(lambda: self._manager.save(step, args=parts, force=True))
        self.last_step = step

    def check(self) -> None:
        """Raises CheckpointError when a write in the background has failed, here or on another process."""
        self._attempt(self._manager.check_for_errors)

    @property
    def is_writing(self) -> bool:
        """Whether the checkpoint of `last_step` is not whole yet."""
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Wait for the write in progress. Raises CheckpointError when it fails."""
        self._attempt(self._manager.wait_until_finished)
        self._attempt(self._manager.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_known = self._has_failed
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            # the error under way comes first; this one must still be seen
            if not is_known:
                print(failed, file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            if self._meeting.failure:
                raise RuntimeError(self._meeting.failure)
            action()
        except Exception as error:  # whatever orbax, tensorstore or the file system raise: all name the folder
            self._has_failed = True
            self._meeting.fail(short(error))
            raise CheckpointError(
                f"could not write a checkpoint to {self._folder}{_free_space(self._folder)}: {short(error)}\n"
                f"Readable checkpoints stay, at steps {steps_in(self._folder)}. Make space, or mend what it "
                "names, then run the same command to go on"
            ) from error


def place(workdir: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> epath.Path:
    """Folder of a run's checkpoints: its train.checkpoint_folder, WORKDIR/checkpoints where that is "" or absent.

    config: default the run's config.json. Raises ValueError for a damaged file, or an address that is not gs://.
    """
    config = configs.read(workdir) if config is None else config
    named = ((config or {}).get("train") or {}).get("checkpoint_folder", "")
    if not buckets.is_address(named):
        return epath.Path(Path(named or Path(workdir) / FOLDER).absolute())
    buckets.check_address(named)
    return epath.Path(named)


def check_place(workdir: str | os.PathLike[str], config: Mapping[str, Any], abstract_state: Any) -> None:
    """Raises CheckpointError, on every process, when the disk cannot take one checkpoint, or a bucket cannot be written
    and read: before the run, not after an hour."""
    folder = place(workdir, config)

    def check() -> None:
        if buckets.is_address(folder):
            buckets.probe(folder)
            return
        needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
        disk = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(disk).free
        if free < needed:
            raise CheckpointError(
                f"{folder.parent} has {free / 2**20:,.1f} MiB free, one checkpoint takes {needed / 2**20:,.1f} MiB: "
                "make space, or use another --workdir"
            )

    _on_all(check)


def check_moved(workdir: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the config of a run names another folder than before, and the checkpoints are not
    there: the run would start again, and its log with it."""
    old, new = place(workdir, before), place(workdir, now)
    if old != new and steps_in(old) and not steps_in(new):
        raise CheckpointError(
            f"the checkpoints of {workdir} lie in {old}, expected in {new}: copy them there, then run this again, or use "
            "another --workdir"
        )


def steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the finished checkpoints, increasing. Raises CheckpointError for a foreign folder, and as `place`."""
    return steps_in(place(workdir))


def steps_in(folder: epath.Path) -> list[int]:
    """`steps` of a folder of checkpoints."""
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir() if _TEMPORARY not in path.name]
    foreign = sorted(name for name in names if not name.isdecimal())
    if foreign:
        raise CheckpointError(
            f"{folder} holds {foreign[:5]}, which diffjax did not write (expected folders named by step): use "
            "another --workdir"
        )
    if buckets.is_address(folder):  # nothing can be renamed there: a mark says what is whole
        names = [name for name in names if (folder / name / _COMPLETE).exists()]
    return sorted(map(int, names))


def short(error: BaseException) -> str:
    """Type and text of an error in one line; of a long one beginning and end, where the reason is. What tensorstore adds,
    the whole description of its store, is left out."""
    text = " ".join(str(error).split()).partition(" See full TensorStore details")[0]
    return f"{type(error).__name__}: {text if len(text) < 320 else f'{text[:150]} ... {text[-150:]}'}"


def _on_all(action: Callable[[], None]) -> None:
    """Do it on every process. Raises CheckpointError on all of them when it fails on one."""
    found: Exception | None = None
    try:
        action()
    except (CheckpointError, OSError) as error:
        found = error
    for process, text in enumerate(exchange.texts("" if found is None else str(found))):
        if text:
            where = f"process {process}: " if jax.process_count() > 1 else ""
            raise CheckpointError(where + text) from found


def _make(folder: epath.Path) -> None:
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)


def _processes() -> ocp.options.MultiprocessingOptions:
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    # named one by one, orbax meets through the service, where waiting ends; otherwise through a collective, where a
    # process that does not come leaves the others waiting
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))


def _check_finite(step: int, nonfinite: str) -> None:
    if nonfinite:
        raise guards.NonFiniteError(
            f"step {step}: {nonfinite} of the state is not finite, so it is not saved; the "
            "checkpoints before it stay. Lower config.optim.learning_rate or set config.optim.clip_norm"
        )


def _free_space(folder: epath.Path) -> str:
    if buckets.is_address(folder):
        return ""
    return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there)"


def _as_json(run: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(run))
    except TypeError as error:
        raise TypeError(
            f"the data iterator's position or the loop's state is not JSON ({error}): get_state() must give "
            "numbers, text, lists and dicts"
        ) from error
