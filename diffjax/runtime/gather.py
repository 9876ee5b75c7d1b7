"""Arrays of every process on every process, in process order and bit for bit.

JAX without x64 would round float64, so what travels is the arrays' bytes, as uint32. One process sends at a time, in
pieces, so that beside the arrays of all there is never more on a device than `_PIECE` words:

    for arrays in gather({"mean": mean, "scatter": scatter}):     # of process 0, then of process 1, ...
        ...

Shapes, types and names may differ between processes. Every process must take all of them: sending is a step of all.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

_PIECE = 2**24  # uint32 words: 64 MiB
_PATIENCE_S = 24 * 3600  # that the first process to arrive waits for the last
_numbers = itertools.count()  # of the gatherings, the same on all processes


def gather(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """What each process gave, in process order. Raises ValueError for arrays of Python objects."""
    own = {name: np.asarray(array) for name, array in arrays.items()}
    objects = [name for name, array in own.items() if array.dtype.hasobject]
    if objects:
        raise ValueError(f"{', '.join(objects)} hold Python objects: expected numbers or text")
    return _in_turn(own)


def _in_turn(own: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    if jax.process_count() == 1:
        yield own
        return
    # collectives of CPUs give up after half a minute
    multihost.get_barrier_sync_fn()(key=f"gather {next(_numbers)}", timeout_ms=1000 * _PATIENCE_S)
    table = json.dumps([(name, array.dtype.str, array.shape) for name, array in own.items()])
    header = _words(np.frombuffer(table.encode(), np.uint8))
    lengths = multihost_utils.process_allgather(np.asarray([len(header)], np.int32))
    for process, (length,) in enumerate(lengths.tolist()):
        sends = process == jax.process_index()
        text = _broadcast(header if sends else None, length, sends).tobytes().decode()
        received = {}
        for name, dtype, shape in json.loads(text):
            words = _words(own[name]) if sends else None
            size = math.prod(shape) * np.dtype(dtype).itemsize
            content = _broadcast(words, -(-size // 4), sends).view(np.uint8)[:size]
            received[name] = content.view(dtype).reshape(shape)
        yield received


def _words(array: np.ndarray) -> np.ndarray:
    """Its bytes as uint32, the last filled with blanks: JSON may end in them."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    rest = -len(content) % 4
    return (np.concatenate([content, np.full(rest, ord(" "), np.uint8)]) if rest else content).view(np.uint32)


def _broadcast(words: np.ndarray | None, length: int, sends: bool) -> np.ndarray:
    """The words of the process that sends, on all; `words` is read there alone."""
    found = np.empty(length, np.uint32)
    for at in range(0, length, _PIECE):
        piece = slice(at, min(at + _PIECE, length))
        given = words[piece] if sends else np.zeros(piece.stop - at, np.uint32)
        found[piece] = multihost_utils.broadcast_one_to_all(given, is_source=sends)
    return found
