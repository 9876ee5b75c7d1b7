"""Checkpoints of a run: WORKDIR/checkpoints/STEP holds two parts.

state  every array of the train state by path, written by orbax (no pickle)
run    JSON: format, step, config, versions, position of the data iterator, state of the loop

Reading is strict: paths, shapes and dtypes are compared before an array is read. An unreadable newest
checkpoint is put aside and the one before it is used, and said; anything else that does not fit is an
error.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from diffjax.core import trees
from diffjax.core.types import Params
from diffjax.runtime import configs, guards, report

FOLDER = "checkpoints"
UNREADABLE_FOLDER = "unreadable_checkpoints"
FORMAT = "diffjax-checkpoint-1"

_TEMPORARY = ".orbax-checkpoint-tmp"
# what truncated files raise: tensorstore and JSON decoding ValueError, absent files FileNotFoundError
_UNREADABLE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names it and the remedy."""


class Restored(NamedTuple):
    """state: as the abstract state given. run: the JSON part (see the module)."""

    step: int
    state: Any
    run: dict[str, Any]


class Checkpoints:
    """Writer of one run's checkpoints; a context that waits for every write on exit.

    keep_last: newest checkpoints kept. keep_every_steps: checkpoints at its multiples are kept for
    good (0: none). Writing goes on in a thread; its error is raised by the next `save`, `check` or
    `close` as CheckpointError, older checkpoints stay.
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
        self._folder = Path(workdir).absolute() / FOLDER
        self._config = configs.to_plain(config)
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=asynchronous,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "run"))
        self.last_step = self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: Any, loop: Mapping[str, Any]) -> None:
        """Start writing the checkpoint of `step`; returns when `state` may be donated.

        iterator: JSON position of the data iterator before the next batch. loop: JSON state of the loop.
        Raises CheckpointError when this or the previous write failed, ValueError for a state that
        cannot be named by path, guards.NonFiniteError, TypeError for a position that is not JSON.
        """
        flat = _flatten(state)
        check_finite(step, flat)
        run = {
            "format": FORMAT,
            "step": step,
            "config": self._config,
            "versions": report.versions(),
            "iterator": iterator,
            "loop": dict(loop),
        }
        run = _as_json(run)
        parts = ocp.args.Composite(state=ocp.args.StandardSave(flat), run=ocp.args.JsonSave(run))
        self._attempt(lambda: self._manager.save(step, args=parts, force=True))
        self.last_step = step

    def check(self) -> None:
        """Raises CheckpointError when a write in the background has failed."""
        self._attempt(self._manager.check_for_errors)

    def close(self) -> None:
        """Wait for the write in progress. Raises CheckpointError when it fails."""
        self._attempt(self._manager.wait_until_finished)
        self._attempt(self._manager.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            # the error under way comes first; this one must still be seen
            print(failed, file=sys.stderr, flush=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever orbax, tensorstore or the file system raise: all name the folder
            free = shutil.disk_usage(self._folder).free / 2**20
            raise CheckpointError(
                f"could not write a checkpoint to {self._folder} ({free:,.0f} MiB free there): {_short(error)}\n"
                f"Readable checkpoints stay, at steps {steps(self._folder.parent)}. Make space, then run the "
                "same command to go on"
            ) from error


def check_finite(step: int, flat: Mapping[str, Any]) -> None:
    """Raises guards.NonFiniteError naming the first array with a NaN or an infinity: none is ever saved."""
    leaf = int(_first_nonfinite(dict(flat)))
    if leaf >= 0:
        raise guards.NonFiniteError(
            f"step {step}: {trees.paths(dict(flat))[leaf]} of the state is not finite, so it is not saved; the "
            "checkpoints before it stay. Lower config.optim.learning_rate or set config.optim.clip_norm"
        )


def check_space(workdir: str | os.PathLike[str], abstract_state: Any) -> None:
    """Raises CheckpointError when the disk cannot take one checkpoint: before the run, not after an hour."""
    needed = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise CheckpointError(
            f"{workdir} has {free / 2**20:,.1f} MiB free, one checkpoint takes {needed / 2**20:,.1f} MiB: make "
            "space, or use another --workdir"
        )


def steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the finished checkpoints, increasing. Raises CheckpointError for a foreign folder."""
    folder = Path(workdir) / FOLDER
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir() if _TEMPORARY not in path.name]
    foreign = sorted(name for name in names if not name.isdecimal())
    if foreign:
        raise CheckpointError(
            f"{folder} holds {foreign[:5]}, which diffjax did not write (expected folders named by step): use "
            "another --workdir"
        )
    return sorted(map(int, names))


def read_newest(
    workdir: str | os.PathLike[str],
    abstract_state: Any,
    config: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> Restored | None:
    """The newest readable checkpoint, or None where there is none.

    abstract_state: tree of jax.ShapeDtypeStruct, with shardings where not the default device.
    config: compared with the saved one. say: receives the lines about what was put aside or changed.
    Raises CheckpointError when paths, shapes or dtypes differ (all named), when the folder is foreign,
    or when nothing is readable; configs.ConfigChangedError for another config.
    """

    def use(folder: Path, run: dict[str, Any]) -> Any:
        for line in configs.check(run["config"], config, str(folder)):
            say(f"changed since checkpoint {folder.name}: {line}")
        return _read_state(folder, abstract_state)

    found, unreadable = _newest(Path(workdir), use, say)
    for folder in unreadable:
        aside = Path(workdir) / UNREADABLE_FOLDER
        aside.mkdir(exist_ok=True)
        target = aside / folder.name
        while target.exists():
            target = target.with_name(target.name + "_again")
        shutil.move(folder, target)
        say(f"put aside: {folder} -> {target}")
    return found


def load_params(
    workdir: str | os.PathLike[str], ema: bool | None = True, step: int | None = None
) -> tuple[Params, dict[str, Any], int]:
    """(params, config, step) of the newest checkpoint of a run, or that of `step`, for sampling and for teachers.

    ema: True the moving average, False the raw parameters, None the average where the run kept one.
    Only those arrays are read, as nested dict on the default device. Raises CheckpointError when there
    is no such checkpoint, no average, or nothing readable.
    """

    def use(folder: Path, run: dict[str, Any]) -> Params:
        saved = _metadata(folder)
        averaged = any(path.startswith("ema_params/") for path in saved)
        if ema and not averaged:
            raise CheckpointError(
                f"{folder} holds no moving average (config.ema.halflife_images is 0): ask for the raw "
                "parameters with ema=False"
            )
        return _read_part(folder, saved, "ema_params" if averaged and ema is not False else "method/params")

    return _read_for_use(workdir, use, step)


def load_parts(workdir: str | os.PathLike[str], parts: Sequence[str]) -> tuple[tuple[Params, ...], dict[str, Any], int]:
    """(trees, config, step): these parts of the newest checkpoint's state, "method/params" and "method/score" say, one
    nested dict each on the default device; all from the same checkpoint. Raises CheckpointError as `load_params`, and for
    a part that the state does not have."""

    def use(folder: Path, run: dict[str, Any]) -> tuple[Params, ...]:
        saved = _metadata(folder)
        return tuple(_read_part(folder, saved, part) for part in parts)

    return _read_for_use(workdir, use)


def _read_part(folder: Path, saved: Mapping[str, jax.ShapeDtypeStruct], part: str) -> Params:
    wanted = {path: leaf for path, leaf in saved.items() if path.startswith(part + "/")}
    if not wanted:
        raise CheckpointError(f"{folder} holds no arrays under {part}/, found {sorted(saved)[:5]}")
    arrays = _read_arrays(folder, wanted)
    return _nest({path.removeprefix(part + "/"): array for path, array in arrays.items()})


def _read_for_use(
    workdir: str | os.PathLike[str], use: Callable[[Path, dict[str, Any]], Any], step: int | None = None
) -> tuple[Any, dict[str, Any], int]:
    if step is not None:
        if step not in (kept := steps(workdir)):
            raise CheckpointError(f"{workdir} holds no checkpoint of step {step}, only of {kept}: see train.keep_every_steps")
        folder = Path(workdir).absolute() / FOLDER / str(step)
        run = _read_run(folder)
        return use(folder, run), run["config"], step
    found, _ = _newest(Path(workdir), use, lambda line: print(line, file=sys.stderr, flush=True))
    if found is None:
        raise CheckpointError(
            f"{Path(workdir) / FOLDER} holds no checkpoint: train first, with --workdir={workdir}, or name "
            "the folder of a finished run"
        )
    return found.state, found.run["config"], found.step


def _newest(
    workdir: Path, use: Callable[[Path, dict[str, Any]], Any], say: Callable[[str], None]
) -> tuple[Restored | None, list[Path]]:
    """The newest checkpoint `use` can read, and the unreadable ones that are newer."""
    unreadable: dict[Path, str] = {}
    for step in reversed(steps(workdir)):
        folder = workdir.absolute() / FOLDER / str(step)
        try:
            run = _read_run(folder)
            state = use(folder, run)
        except configs.ConfigChangedError:
            raise
        except _UNREADABLE as error:
            unreadable[folder] = _short(error)
            continue
        for broken, reason in unreadable.items():
            say(f"WARNING: checkpoint {broken} is unreadable ({reason}); the previous one, {folder}, is used")
        return Restored(step, state, run), list(unreadable)
    if unreadable:
        listing = "\n  ".join(f"{folder}: {reason}" for folder, reason in unreadable.items())
        raise CheckpointError(f"no checkpoint is readable:\n  {listing}\nRestore one, or use another --workdir")
    return None, []


def _read_run(folder: Path) -> dict[str, Any]:
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    if not parts & {"state", "run"}:
        raise CheckpointError(
            f"{folder} was not written by diffjax: expected the parts 'state' and 'run', found {sorted(parts)}. "
            "Use another --workdir"
        )
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        run = reader.restore(folder / "run")
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        found = run.get("format", "none") if isinstance(run, dict) else type(run).__name__
        raise CheckpointError(f"{folder} has format {found!r}, expected {FORMAT!r}: use another --workdir")
    if run["step"] != int(folder.name):
        raise CheckpointError(f"{folder} holds step {run['step']}: rename it back, or use another --workdir")
    return run


def _read_state(folder: Path, abstract_state: Any) -> Any:
    expected = _flatten(abstract_state)
    lines = trees.compare(expected, _metadata(folder))
    if lines:
        listing = "\n  ".join(lines)
        raise CheckpointError(
            f"{folder} does not fit this model (expected is the model, found the checkpoint):\n  {listing}\n"
            f"Use another --workdir, or the config in {folder.parent.parent / configs.FILE_NAME}"
        )
    arrays = _read_arrays(folder, expected)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[path] for path in expected])


def _metadata(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder / "state").tree
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}


def _read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = {
        path: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding or default, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
        )
        for path, leaf in wanted.items()
    }
    request = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=restore_args, partial_restore=True)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=request)


def _flatten(state: Any) -> dict[str, Any]:
    flat = trees.flatten(state)
    if len(flat) != len(jax.tree.leaves(state)):
        raise ValueError("two arrays of the state have the same path: rename one of them")
    return flat


def _nest(flat: Mapping[str, jax.Array]) -> Params:
    nested: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return nested


def _as_json(run: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(run))
    except TypeError as error:
        raise TypeError(
            f"the data iterator's position or the loop's state is not JSON ({error}): get_state() must give "
            "numbers, text, lists and dicts"
        ) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


_first_nonfinite = jax.jit(trees.first_nonfinite)
