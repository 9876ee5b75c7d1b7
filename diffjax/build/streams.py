"""Features of a set of images as they come by: running moments, and those features that some metrics need whole.

    found = collect(samples, 0, range(50_000), [Want(space, moments=("pool",))], how, workdir / "state")
    found.moments["inception/pool"].covariance

Images are taken in the order of their ids. Each device sees `batch_size` at a time in one program whatever their
number, and moments are summed in the fixed order of `metrics.stats`; so one device, eight, and several processes give
the same bits. A process has whole blocks of that order, and its state is in files: what was killed goes on where it was
saved, to the same bits.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffjax.build import feature_spaces
from diffjax.build.feature_spaces import FeatureSpace
from diffjax.build.image_sets import ImageSet
from diffjax.metrics import array_files, protocol, stats
from diffjax.runtime import gather, mesh

_STATE = "state.npz"
_DIGESTS = "digests"  # sha256 of each image, kept like features


class Want(NamedTuple):
    """Outputs of a space: of which moments are taken, and which are kept whole."""

    space: FeatureSpace
    moments: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class Collected(NamedTuple):
    """By "space/output": moments, and features (n, D) in the order of ids. digest: of all images where asked for, else
    ""."""

    moments: dict[str, stats.Moments]
    kept: dict[str, np.ndarray]
    digest: str


class How(NamedTuple):
    """batch_size: images on each device at a time, on which the bits of features depend. save_every_s: seconds between
    saved states, 0 = after each batch. say(done): progress, images of this process."""

    mesh: Mesh
    batch_size: int = 64
    save_every_s: float = 60.0
    say: Callable[[int], None] = lambda done: None


class _State(NamedTuple):
    """done: images of this process that are in it. running: moments by key. kept: by key, features of a batch each; the
    last `unsaved` of them are not in one of the `files` yet."""

    done: int
    running: dict[str, stats.Running]
    kept: dict[str, tuple[np.ndarray, ...]]
    files: int = 0
    unsaved: int = 0


def collect(
    items: ImageSet,
    seed: int,
    ids: Sequence[int],
    wants: Sequence[Want],
    how: How,
    folder: Path | None,
    digests: bool = False,
) -> Collected:
    """Moments and features of `ids`. The state is under `folder`, whose name must say what is collected; None saves
    none.

    Raises ValueError, on every process, for images that cannot be read or hold a NaN; what was saved stays.
    """
    start, stop = share(len(ids), jax.process_index(), jax.process_count())
    if folder is not None:
        folder = folder / f"{start}_{stop}"
        folder.mkdir(parents=True, exist_ok=True)
    wants = [want._replace(space=feature_spaces.placed(want.space, how.mesh)) for want in wants]
    error, state = "", _State(0, {}, {})
    try:
        state = _own_part(items, seed, ids[start:stop], start, wants, how, folder, digests)
    except (ValueError, OSError) as found:
        if jax.process_count() == 1:
            raise
        error = f"process {jax.process_index()}: {found}"
    _raise_anywhere(error)
    return _merged(state, wants, digests)


def local_mesh(num_devices: int = 0) -> Mesh:
    """Of the devices of this process, 0 = all: each process has images of its own."""
    return mesh.make_mesh(num_devices or None, jax.local_devices())


def place() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def share(count: int, process: int, processes: int) -> tuple[int, int]:
    """(first, one behind the last) of `count` images that this process has: whole blocks of `stats.BLOCK`, or none."""
    blocks = -(-count // stats.BLOCK)
    first, last = (blocks * number // processes * stats.BLOCK for number in (process, process + 1))
    return first, max(first, min(last, count))


def _own_part(
    items: ImageSet,
    seed: int,
    ids: Sequence[int],
    start: int,
    wants: Sequence[Want],
    how: How,
    folder: Path | None,
    digests: bool,
) -> _State:
    running = {key: stats.running(start) for key in _keys(wants, "moments")}
    state = _State(0, running, {key: () for key in [*_keys(wants, "kept"), *([_DIGESTS] if digests else [])]})
    state = _read(folder, state, items, ids)
    last, at_once = time.monotonic(), how.batch_size * how.mesh.size
    try:
        while state.done < len(ids):
            now = ids[state.done : state.done + at_once]
            images = items.read(seed, now)
            for want in wants:
                feature_spaces.check_images(images, want.space, now)
            state = _add(state, images, wants, at_once, how.mesh)
            how.say(state.done)
            if time.monotonic() - last >= how.save_every_s:
                state, last = _write(folder, state, items, ids), time.monotonic()
    finally:  # what ends it early, an unreadable image, leaves what came before
        state = _write(folder, state, items, ids)
    return state


def _add(state: _State, images: np.ndarray, wants: Sequence[Want], at_once: int, devices: Mesh) -> _State:
    # the last images repeat: one shape is one program
    padded = np.pad(images, [(0, at_once - len(images))] + [(0, 0)] * (images.ndim - 1), mode="edge")
    running, new = {}, {}
    for want in wants:
        found = {
            name: value[: len(images)] for name, value in feature_spaces.features(want.space, padded, devices).items()
        }
        for key, output in zip(_keys([want], "moments"), want.moments, strict=True):
            running[key] = stats.update(state.running[key], found[output])
        new |= {key: found[output] for key, output in zip(_keys([want], "kept"), want.kept, strict=True)}
    if _DIGESTS in state.kept:
        new[_DIGESTS] = protocol.digests(images)
    kept = {key: (*found, new[key]) for key, found in state.kept.items()}
    return state._replace(done=state.done + len(images), running=running, kept=kept, unsaved=state.unsaved + 1)


def _merged(state: _State, wants: Sequence[Want], digests: bool) -> Collected:
    """Of all processes, in the order of their ids."""
    own = {f"kept/{key}": np.concatenate(found) for key, found in state.kept.items() if found}
    own |= {
        f"{key}/{name}": value
        for key, running in state.running.items()
        for name, value in stats.to_arrays(running).items()
    }
    everyone = list(gather.gather(own))
    moments = {}
    for key in _keys(wants, "moments"):
        runnings = [stats.from_arrays(_below(arrays, f"{key}/")) for arrays in everyone]
        moments[key] = stats.total(functools.reduce(stats.join, runnings))
    kept = {key: np.concatenate([p[f"kept/{key}"] for p in everyone if f"kept/{key}" in p]) for key in state.kept}
    return Collected(moments, kept, protocol.set_sha256(kept.pop(_DIGESTS)) if digests else "")


def _raise_anywhere(error: str) -> None:
    """Raise ValueError on every process where one of them has an error: the others would wait for it."""
    told = [
        bytes(arrays["error"]).decode() for arrays in gather.gather({"error": np.frombuffer(error.encode(), np.uint8)})
    ]
    if any(told):
        raise ValueError("; ".join(filter(None, told)))


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _keys(wants: Sequence[Want], kind: str) -> list[str]:
    return [f"{want.space.name}/{output}" for want in wants for output in getattr(want, kind)]


# Files -----------------------------------------------------------------------------------------------------------


def _write(folder: Path | None, state: _State, items: ImageSet, ids: Sequence[int]) -> _State:
    """The features since the last time into a file of their own, then the state that counts it."""
    if folder is None or not state.unsaved:
        return state
    fingerprint = items.fingerprint(ids[: state.done])
    if state.kept:
        fresh = {str(i): np.concatenate(found[-state.unsaved :]) for i, found in enumerate(state.kept.values())}
        array_files.write(folder / f"kept_{state.files}.npz", fresh)
        state = state._replace(files=state.files + 1)
    facts = {"done": np.int64(state.done), "files": np.int64(state.files), "fingerprint": np.array(fingerprint)}
    running = [stats.to_arrays(found) for found in state.running.values()]
    named = {f"{i}/{name}": value for i, arrays in enumerate(running) for name, value in arrays.items()}
    array_files.write(folder / _STATE, {**facts, **named})
    return state._replace(unsaved=0)


def _read(folder: Path | None, empty: _State, items: ImageSet, ids: Sequence[int]) -> _State:
    """What was saved, or `empty` where nothing was, or of images that have changed since."""
    if folder is None or not (folder / _STATE).exists():
        return empty
    arrays = array_files.read(folder / _STATE)
    done, files = int(arrays["done"]), int(arrays["files"])
    if str(arrays["fingerprint"]) != items.fingerprint(ids[:done]):
        return empty
    chunks = [array_files.read(folder / f"kept_{number}.npz") for number in range(files)]
    return empty._replace(
        done=done,
        running={key: stats.from_arrays(_below(arrays, f"{i}/")) for i, key in enumerate(empty.running)},
        kept={key: tuple(chunk[str(i)] for chunk in chunks) for i, key in enumerate(empty.kept)},
        files=files,
    )
