"""Reading the checkpoints of a run (see `checkpoint`), to go on with it or to use its weights.

Reading is strict: paths, shapes and dtypes are compared before an array is read, every array and the JSON part with
their checksums after it (checkpoints of before they were kept have none). An unreadable newest checkpoint is put aside
and the one before it is used, and said; anything else that does not fit is an error. Several processes decide as one:
what one of them cannot read, none uses.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from diffjax.core import trees
from diffjax.core.types import Params
from diffjax.runtime import buckets, checkpoint, checksums, configs, exchange
from diffjax.runtime.checkpoint import CheckpointError

UNREADABLE = "unreadable_"  # before the name of a folder of checkpoints: what was put aside
_AT_ONCE = 2**30  # bytes of arrays that verifying holds

# a run's JSON part, the arrays there are -> those to read
Choose = Callable[[epath.Path, dict[str, Any], Mapping[str, jax.ShapeDtypeStruct]], Mapping[str, jax.ShapeDtypeStruct]]


class UnreadableError(Exception):
    """A checkpoint is damaged: files are missing, cut short or changed."""


class Restored(NamedTuple):
    """state: as the abstract state given. run: the JSON part (see `checkpoint`)."""

    step: int
    state: Any
    run: dict[str, Any]


class Verdict(NamedTuple):
    """problem: what is wrong with a checkpoint, "" for nothing. has_checksums: False for one of before they were kept.
    num_bytes: of its arrays."""

    step: int
    problem: str
    has_checksums: bool
    num_bytes: int


def read_newest(
    workdir: str | os.PathLike[str],
    abstract_state: Any,
    config: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> Restored | None:
    """The newest readable checkpoint, or None where there is none; a step of all processes, each reads its own shards.

    abstract_state: tree of jax.ShapeDtypeStruct, with shardings where not the default device.
    config: compared with the saved one. say: receives the lines about what was put aside or changed, on process 0.
    Raises CheckpointError when paths, shapes or dtypes differ (all named), when the folder is foreign,
    or when nothing is readable; configs.ConfigChangedError for another config, ValueError for a sharding
    that does not divide a shape.
    """
    folder, is_first = checkpoint.place(workdir, config), jax.process_index() == 0
    expected = trees.flatten(abstract_state)
    changes: list[str] = []

    def choose(
        own: epath.Path, run: dict[str, Any], saved: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.ShapeDtypeStruct]:
        differences = configs.check(run["config"], config, str(own))
        changes[:] = [f"changed since checkpoint {own.name}: {line}" for line in differences]
        _check_fit(own, expected, saved, Path(workdir))
        return expected

    found = _newest(folder, choose, say if is_first else _silent, is_common=True)
    if found is None:
        return None
    if is_first:
        for line in changes:
            say(line)
        for broken in found.unreadable:
            say(f"put aside: {broken} -> {_put_aside(broken)}")
    exchange.texts("put aside")  # nobody lists the folder before
    leaves = [found.arrays[path] for path in expected]
    return Restored(found.step, jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), found.run)


def load_params(
    workdir: str | os.PathLike[str], ema: bool | None = True, step: int | None = None
) -> tuple[Params, dict[str, Any], int]:
    """(params, config, step) of the newest checkpoint of a run, or that of `step`, for sampling and for teachers.

    ema: True the moving average, False the raw parameters, None the average where the run kept one.
    Only those arrays are read, as nested dict on the default device. Raises CheckpointError when there
    is no such checkpoint, no average, or nothing readable.
    """
    part = "method/params"

    def choose(
        folder: epath.Path, run: dict[str, Any], saved: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.ShapeDtypeStruct]:
        nonlocal part
        averaged = any(path.startswith("ema_params/") for path in saved)
        if ema and not averaged:
            raise CheckpointError(
                f"{folder} holds no moving average (config.ema.halflife_images is 0): ask for the raw "
                "parameters with ema=False"
            )
        part = "ema_params" if averaged and ema is not False else "method/params"
        return _under(folder, saved, [part])

    found = _read_for_use(workdir, choose, step)
    return _nest(found.arrays, part), found.run["config"], found.step


def load_parts(workdir: str | os.PathLike[str], parts: Sequence[str]) -> tuple[tuple[Params, ...], dict[str, Any], int]:
    """(trees, config, step): these parts of the newest checkpoint's state, "method/params" and "method/score" say, one
    nested dict each on the default device; all from the same checkpoint. Raises CheckpointError as `load_params`, and for
    a part that the state does not have."""
    found = _read_for_use(workdir, lambda folder, run, saved: _under(folder, saved, parts))
    return tuple(_nest(found.arrays, part) for part in parts), found.run["config"], found.step


def verify(workdir: str | os.PathLike[str]) -> Iterator[Verdict]:
    """Every checkpoint of a run read whole, oldest first, a GiB of arrays at a time. Raises CheckpointError as
    `checkpoint.steps`."""
    folder = checkpoint.place(workdir)
    for step in checkpoint.steps_in(folder):
        run: dict[str, Any] = {}
        saved: Mapping[str, jax.ShapeDtypeStruct] = {}
        try:
            run, saved = _open(folder / str(step))
            for wanted in _in_pieces(saved):
                _check_sums(run, _read_arrays(folder / str(step), wanted))
            problem = ""
        except (UnreadableError, CheckpointError) as error:
            problem = str(error)
        yield Verdict(step, problem, "arrays" in run, sum(map(_num_bytes, saved.values())))


class _Found(NamedTuple):
    step: int
    run: dict[str, Any]
    arrays: dict[str, jax.Array]
    unreadable: list[epath.Path]


def _read_for_use(workdir: str | os.PathLike[str], choose: Choose, step: int | None = None) -> _Found:
    folder = checkpoint.place(workdir)
    if step is not None:
        if step not in (kept := checkpoint.steps_in(folder)):
            raise CheckpointError(
                f"{workdir} holds no checkpoint of step {step}, only of {kept}: see train.keep_every_steps"
            )
        try:
            run, arrays = _read(folder / str(step), choose)
            _check_sums(run, arrays)
        except UnreadableError as error:
            own = folder / str(step)
            raise CheckpointError(f"checkpoint {own} is unreadable ({error}): name another step") from error
        return _Found(step, run, arrays, [])
    found = _newest(folder, choose, lambda line: print(line, file=sys.stderr, flush=True), is_common=False)
    if found is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint: train first, with --workdir={workdir}, or name the folder of a finished run"
        )
    return found


def _newest(folder: epath.Path, choose: Choose, say: Callable[[str], None], is_common: bool) -> _Found | None:
    """The newest checkpoint that can be read, and the unreadable ones that are newer.

    is_common: this is a step of all processes, which use the same one.
    """
    unreadable: dict[epath.Path, str] = {}
    exchanged = exchange.texts if is_common else _alone
    # as process 0 lists them: a file system may show them late elsewhere
    listed = json.loads(exchanged(json.dumps(checkpoint.steps_in(folder)))[0])
    for step in reversed(listed):
        own = folder / str(step)
        try:
            run, arrays = _read_as_one(own, choose, exchanged)
            _check_sums(run, arrays)  # a sum over all processes, so all come to the same
        except UnreadableError as error:
            unreadable[own] = str(error)
            continue
        for broken, reason in unreadable.items():
            say(f"WARNING: checkpoint {broken} is unreadable ({reason}); the previous one, {own}, is used")
        return _Found(step, run, arrays, list(unreadable))
    if unreadable:
        listing = "\n  ".join(f"{own}: {reason}" for own, reason in unreadable.items())
        raise CheckpointError(f"no checkpoint is readable:\n  {listing}\nRestore one, or use another --workdir")
    return None


def _read_as_one(
    folder: epath.Path, choose: Choose, exchanged: Callable[[str], list[str]]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """`_read`, on every process or on none. Raises what it raises here, or names the process where it does."""
    found, error = None, None
    try:
        found = _read(folder, choose)
    except Exception as caught:  # the other processes wait to hear of it
        error = caught
    own = "" if error is None else json.dumps([isinstance(error, UnreadableError), str(error) or type(error).__name__])
    problems = {process: json.loads(text) for process, text in enumerate(exchanged(own)) if text}
    # another error than damage ends the run, and on all processes
    for process, (is_damage, text) in sorted(problems.items(), key=lambda item: item[1][0]):
        if error is not None and isinstance(error, UnreadableError) == is_damage:
            raise error
        raise (UnreadableError if is_damage else CheckpointError)(f"process {process}: {text}")
    return found


def _read(folder: epath.Path, choose: Choose) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """(JSON part, the arrays chosen); the sums of the arrays are not compared yet."""
    run, saved = _open(folder)
    return run, _read_arrays(folder, choose(folder, run, saved))


def _open(folder: epath.Path) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """(JSON part, the arrays there are). Raises UnreadableError, CheckpointError for what diffjax did not write."""
    run = _read_run(folder)
    if "arrays" in run:
        table = {path: (tuple(shape), np.dtype(dtype)) for path, (dtype, shape, _) in run["arrays"].items()}
        return run, {path: jax.ShapeDtypeStruct(*entry) for path, entry in table.items()}
    with _damage(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder / "state").tree
        return run, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}


def _read_run(folder: epath.Path) -> dict[str, Any]:
    with _damage():
        parts = {path.name for path in folder.iterdir() if path.is_dir()}
    if not parts & {"state", "run"}:
        raise CheckpointError(
            f"{folder} was not written by diffjax: expected the parts 'state' and 'run', found {sorted(parts)}. "
            "Use another --workdir"
        )
    with _damage(), contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        run = reader.restore(folder / "run")
    if not isinstance(run, dict):
        raise UnreadableError(f"the part 'run' is {type(run).__name__}, expected a table")
    content = {key: value for key, value in run.items() if key != "sha256"}
    if len(run.keys() & {"sha256", "arrays"}) == 1 or ("sha256" in run and checksums.of_text(content) != run["sha256"]):
        raise UnreadableError("the part 'run' has changed since it was written: its SHA-256 is another")
    if run.get("format") != checkpoint.FORMAT:
        found = run.get("format", "none")
        raise CheckpointError(f"{folder} has format {found!r}, expected {checkpoint.FORMAT!r}: use another --workdir")
    if run["step"] != int(folder.name):
        raise CheckpointError(f"{folder} holds step {run['step']}: rename it back, or use another --workdir")
    return run


def _read_arrays(folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = {}
    for path, leaf in wanted.items():
        sharding = leaf.sharding or default
        sharding.shard_shape(leaf.shape)  # raises where it does not divide: no damage of the file
        restore_args[path] = ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
        )
    request = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=restore_args, partial_restore=True)
    with _damage(), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=request)


def _check_sums(run: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> None:
    """Raises UnreadableError naming the arrays whose checksums are not those in the JSON part."""
    if "arrays" not in run:
        return
    sums, _ = checksums.of_arrays(arrays)
    changed = [path for path, found in sums.items() if found != run["arrays"][path][2]]
    if changed:
        raise UnreadableError(f"{len(changed)} arrays have changed since they were written: {', '.join(changed[:3])}")


def _check_fit(
    folder: epath.Path, expected: Mapping[str, Any], saved: Mapping[str, jax.ShapeDtypeStruct], workdir: Path
) -> None:
    lines = trees.compare(expected, saved)
    if lines:
        listing = "\n  ".join(lines)
        raise CheckpointError(
            f"{folder} does not fit this model (expected is the model, found the checkpoint):\n  {listing}\n"
            f"Use another --workdir, or the config in {workdir / configs.FILE_NAME}"
        )


def _under(
    folder: epath.Path, saved: Mapping[str, jax.ShapeDtypeStruct], parts: Sequence[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    for part in parts:
        if not any(path.startswith(part + "/") for path in saved):
            raise CheckpointError(f"{folder} holds no arrays under {part}/, found {sorted(saved)[:5]}")
    return {path: leaf for path, leaf in saved.items() if path.startswith(tuple(part + "/" for part in parts))}


def _put_aside(folder: epath.Path) -> epath.Path:
    aside = folder.parent.with_name(UNREADABLE + folder.parent.name)
    aside.mkdir(parents=True, exist_ok=True)
    if buckets.is_address(aside):  # where a folder is there by what lies in it alone
        (aside / "about.txt").write_text("checkpoints that could not be read\n")
    target = aside / folder.name
    while target.exists():
        target = target.with_name(target.name + "_again")
    folder.rename(target)
    return target


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What orbax and tensorstore raise for damaged files becomes UnreadableError; what the machine raises stays."""
    try:
        yield
    except (MemoryError, PermissionError, ConnectionError, TimeoutError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # ValueError, KeyError, FileNotFoundError and many more, as the byte may be
        raise UnreadableError(checkpoint.short(error)) from error


def _in_pieces(saved: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    piece: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in saved.items():
        if piece and sum(map(_num_bytes, piece.values())) + _num_bytes(leaf) > _AT_ONCE:
            yield piece
            piece = {}
        piece[path] = leaf
    if piece:
        yield piece


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _nest(flat: Mapping[str, jax.Array], part: str) -> Params:
    """The arrays whose paths begin with the part, without it, as nested dict."""
    prefix = part + "/"
    return trees.nest({path.removeprefix(prefix): array for path, array in flat.items() if path.startswith(prefix)})


def _alone(own: str) -> list[str]:
    return [own]


def _silent(line: str) -> None:
    pass
