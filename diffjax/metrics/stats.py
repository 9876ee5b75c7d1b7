"""Streaming mean and covariance of feature vectors, in float64 on the host.

Moments of parts merge exactly, so features never have to be held together:

    total = functools.reduce(merge, map(moments, parts))
    total.mean, total.covariance

In floating point the order of the sums still shows in the last bits. A `Running` fixes it, whatever the batches and the
processes that they come from: the samples with ids block * i to block * (i + 1) - 1 are summed at once (block i), and
blocks merge in pairs as the leaves of a binary tree, 0 with 1, 2 with 3, then 0-1 with 2-3, always the lower ids first;
what is left of a tree that is not full is merged from left to right. Ranges of ids that begin at a whole block give the
same bits together as alone, on machines with the same linear algebra:

    state = running()                            # of samples 0, 1, ...
    state = update(state, features)              # (n, D) of the next n samples, any n
    array_files.write(path, to_arrays(state)); state = from_arrays(array_files.read(path))
    functools.reduce(join, states)               # of processes, in the order of their ids
    total(state)                                 # Moments

Memory: at most log2(blocks) nodes of 8 D^2 bytes, three more while two of them merge, and four blocks of features:
0.33 GB for 50,000 samples of width 2048.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BLOCK = 1000  # samples: 16 MB of 2048 features


class Moments(NamedTuple):
    """count: vectors seen. mean: (D,). scatter: (D, D), sum of outer products of deviations from the mean."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), normalised by count - 1. Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, found {self.count}: draw more")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Moments of `features` (N, D), N >= 1. Raises ValueError for another rank or values that are not finite."""
    x = _checked(features)
    if not len(x):
        raise ValueError(f"expected features (N, D) with N at least 1, found {x.shape}")
    mean = x.mean(0)
    deviations = x - mean
    return Moments(len(x), mean, deviations.T @ deviations)  # of one array: half of the work, and symmetric


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together. Chan, Golub & LeVeque 1979, eq. 2.1. Raises ValueError for unequal widths."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have one width, found {a.mean.shape} and {b.mean.shape}")
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter, between = a.scatter + b.scatter, np.outer(shift, shift)
    between *= a.count * b.count / count
    scatter += between
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def _checked(features: np.ndarray) -> np.ndarray:
    """As float64 (N, D)."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2:
        raise ValueError(f"expected features (N, D) with N at least 1, found {x.shape}")
    broken = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(broken):
        raise ValueError(f"{len(broken)} of {len(x)} samples hold a NaN or infinity, the first is sample {broken[0]}")
    return x


# In a fixed order ------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """Moments of the blocks from index * 2^level to (index + 1) * 2^level - 1."""

    level: int
    index: int
    moments: Moments


class Running(NamedTuple):
    """Moments of the samples of ids start to stop - 1.

    pending: (n, D) float64, the samples of a block that is not full, None before the first. nodes: whole blocks, from
    low to high ids.
    """

    start: int
    stop: int
    block: int
    pending: np.ndarray | None
    nodes: tuple[Node, ...]


def running(start: int = 0, block: int = BLOCK) -> Running:
    """Nothing seen; the next sample is `start`. Raises ValueError where that begins no block of `block` samples."""
    if block < 1 or start < 0 or start % block:
        raise ValueError(f"sums begin at a multiple of block {block}, found start {start}: give processes whole blocks")
    return Running(start, start, block, None, ())


def update(state: Running, features: np.ndarray) -> Running:
    """`state` after the next samples, `features` (n, D), n >= 0. Raises ValueError for another width or rank, and
    values that are not finite."""
    x = _checked(features)
    pending = x[:0] if state.pending is None else state.pending
    if pending.shape[1] != x.shape[1]:
        raise ValueError(f"features must have one width, found {pending.shape[1]} and {x.shape[1]}")
    nodes, stop, at = state.nodes, state.stop, 0
    while at < len(x):
        rows = x[at : at + state.block - len(pending)]
        pending = np.concatenate([pending, rows])
        at, stop = at + len(rows), stop + len(rows)
        if len(pending) == state.block:
            nodes = _append(nodes, Node(0, stop // state.block - 1, moments(pending)))
            pending = pending[:0]
    return Running(state.start, stop, state.block, pending, nodes)


def join(a: Running, b: Running) -> Running:
    """Of the samples of both, those of `b` following those of `a`; either may be empty.

    Raises ValueError for blocks of different size, and where `b` does not begin with the sample after the last of `a`,
    at a whole block.
    """
    if a.block != b.block:
        raise ValueError(f"sums in blocks of {a.block} and {b.block} samples do not join: use one size")
    if a.start == a.stop or b.start == b.stop:
        return a if b.start == b.stop else b
    if a.stop != b.start:
        raise ValueError(
            f"found samples {a.start} to {a.stop - 1} followed by {b.start} to {b.stop - 1}: expected sample {a.stop}, "
            f"and all but the last range in whole blocks of {a.block}"
        )
    return Running(a.start, b.stop, a.block, b.pending, functools.reduce(_append, b.nodes, a.nodes))


def total(state: Running) -> Moments:
    """Moments of all samples seen. Raises ValueError where there are none."""
    nodes = state.nodes
    if state.pending is not None and len(state.pending):
        nodes = _append(nodes, Node(0, state.stop // state.block, moments(state.pending)))
    if not nodes:
        raise ValueError("found no sample: features of at least one are needed")
    return functools.reduce(merge, (node.moments for node in nodes))


def of(features: np.ndarray) -> Moments:
    """Moments of `features` (N, D) that are held together: those of `running`, without a copy of all in float64."""
    state = running()
    for at in range(0, len(features), BLOCK):
        state = update(state, features[at : at + BLOCK])
    return total(state)


def _append(nodes: tuple[Node, ...], new: Node) -> tuple[Node, ...]:
    """`nodes` and `new` behind them, merged as far as the tree has both halves."""
    kept = list(nodes)
    while kept and new.index % 2 and kept[-1][:2] == (new.level, new.index - 1):
        new = Node(new.level + 1, new.index // 2, merge(kept.pop().moments, new.moments))
    return (*kept, new)


def to_arrays(state: Running) -> dict[str, np.ndarray]:
    """`state` as named arrays, for files and for other processes."""
    arrays = {"range": np.asarray([state.start, state.stop, state.block], np.int64)}
    if state.pending is not None:
        arrays["pending"] = state.pending
    table = [(node.level, node.index, node.moments.count) for node in state.nodes]
    arrays["nodes"] = np.asarray(table, np.int64).reshape(-1, 3)
    for i, node in enumerate(state.nodes):
        arrays[f"mean_{i}"], arrays[f"scatter_{i}"] = node.moments.mean, node.moments.scatter
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Running:
    """The state that `to_arrays` was given. Raises ValueError for other arrays."""
    try:
        start, stop, block = arrays["range"].tolist()
        nodes = tuple(
            Node(level, index, Moments(count, arrays[f"mean_{i}"], arrays[f"scatter_{i}"]))
            for i, (level, index, count) in enumerate(arrays["nodes"].tolist())
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"found arrays {', '.join(arrays)}: these are no running moments ({error})") from error
    state = Running(start, stop, block, arrays.get("pending"), nodes)
    pending = 0 if state.pending is None else len(state.pending)
    seen = sum(node.moments.count for node in nodes) + pending
    if seen != stop - start:
        raise ValueError(f"found moments of {seen} samples, expected those of {start} to {stop - 1}: delete the file")
    return state
