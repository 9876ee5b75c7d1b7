"""Published weights and our parameters: one table of names a family, read in both directions.

A table says which of our modules is which of theirs; names it does not mention are the same but for "/" and ".".

    DIT = KeyMap({
        "patch": "x_embedder.proj",              # patch/kernel is x_embedder.proj.weight, patch/bias x_embedder.proj.bias
        "blocks": "blocks.{}",                   # our first axis counts their blocks
        "blocks/attention/qkv": "blocks.{}.attn.qkv",
        "*/kv": ("*.to_k", "*.to_v"),            # their outputs one after the other; * is any parts of a path
    })
    params = to_params(DIT, weights, expected)   # weights: their name -> array
    weights = to_weights(DIT, params)            # and back, bit for bit

Our leaf `kernel`, `scale` or `embedding` is their `weight`; all others have their own name. Kernels (in, out) and
(kh, kw, in, out) are (out, in) and (out, in, kh, kw) in PyTorch.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax.core import trees
from diffjax.core.types import Params

_WEIGHT = ("kernel", "scale", "embedding")
_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}  # our kernel's axes, from theirs


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """names: our path -> their name, or several whose first axes follow each other in our last. Of the entries that are
    the beginning of a path, the longest counts. `*` stands for one or more parts of a path, put in place of the `*` of
    the name; `{}` in a name counts along our first axis. pointwise: entries of our matrices (in, out) that are 1x1
    convolutions there, and of kernels (3, in, out) that are (out, in, 3, 1, 1); sequential: entries of matrices that are
    convolutions over a sequence, (out, in, 1). ignored: patterns of `re.fullmatch` for their names that are no weights. swapped: entries whose
    outputs come there with the second half first. straight: entries of our matrices that are (in, out) there too.
    headwise: entries [q | k | v] that come there head by head, each with its own q, k and v, and (number of heads, or
    their width)."""

    names: Mapping[str, str | tuple[str, ...]]
    pointwise: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    swapped: tuple[str, ...] = ()
    straight: tuple[str, ...] = ()
    sequential: tuple[str, ...] = ()
    headwise: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def theirs(self, path: str) -> tuple[str, ...]:
        """Their names of our leaf at `path`, `{}` left in them."""
        matches = [(match, names) for ours, names in self.names.items() if (match := _match(ours, path))]
        *parents, leaf = path.split("/")
        leaf = "weight" if leaf in _WEIGHT else leaf
        if not matches:
            return (".".join([*parents, leaf]),)
        match, names = max(matches, key=lambda found: (found[0].end(), -sum(map(len, found[0].groups()))))
        rest = path[match.end() + 1 :].split("/")[:-1] + [leaf] if match.end() < len(path) else []
        filled = [_filled(name, match.groups()) for name in ((names,) if isinstance(names, str) else names)]
        return tuple(".".join([name, *rest]) for name in filled)


class _Piece(NamedTuple):
    """One of their arrays: where it is in ours, its name and shape, and the order of its axes in ours. ones: axes of one
    element behind those; heads: of [q | k | v] that come head by head, 0 for other arrays."""

    index: tuple
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    ones: int
    swapped: bool
    heads: int


def to_params(
    keymap: KeyMap, weights: Mapping[str, Any], expected: Params, what: str = "the weights",
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:  # fmt: skip
    """Their arrays by name as a tree like `expected` (arrays or shapes), in its types. Names and shapes are compared
    first; then each leaf is read and given to `put(path, array)`, so that a lazy mapping is never whole in memory.

    Raises ValueError naming every weight that is missing, extra or misshapen, or one that is not finite in our type.
    """
    flat = trees.flatten(expected)
    pieces = {path: _pieces(keymap, path, leaf.shape) for path, leaf in flat.items()}
    lines, used = [], set()
    for path, parts in pieces.items():
        for piece in parts:
            used.add(piece.name)
            if piece.name not in weights:
                lines.append(f"missing: {piece.name} {list(piece.shape)}, for {path}")
            elif (shape := tuple(weights[piece.name].shape)) != piece.shape:
                lines.append(f"different: {piece.name}, expected {list(piece.shape)} for {path}, found {list(shape)}")
    ignored = re.compile("|".join(keymap.ignored) or r"(?!)")
    lines += [f"extra: {name} {list(weights[name].shape)}" for name in weights if name not in used and not ignored.fullmatch(name)]
    trees.report(lines, what)
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = put(path, _read(weights, pieces[path], leaf, what))
    return _like(expected, tree)


def to_weights(keymap: KeyMap, params: Params) -> dict[str, np.ndarray]:
    """Our parameters as their arrays by name: the inverse of `to_params`."""
    weights = {}
    for path, leaf in trees.flatten(params).items():
        leaf = np.asarray(leaf)
        for piece in _pieces(keymap, path, leaf.shape):
            array = np.transpose(leaf[piece.index], np.argsort(piece.axes))
            array = _swap_halves(array) if piece.swapped else array
            array = _regrouped(array, 3, piece.heads) if piece.heads else array
            weights[piece.name] = np.array(array.reshape(piece.shape), order="C")
    return weights


def _read(weights: Mapping[str, Any], pieces: list[_Piece], leaf: Any, what: str) -> np.ndarray:
    whole = np.empty(leaf.shape, leaf.dtype)
    for piece in pieces:
        found = np.asarray(weights[piece.name])
        found = found.reshape(found.shape[: found.ndim - piece.ones])
        if piece.swapped:
            found = _swap_halves(found)
        if piece.heads:
            found = _regrouped(found, piece.heads, 3)
        with np.errstate(over="ignore"):  # said below, with the name
            whole[piece.index] = np.transpose(found, piece.axes)
        part = whole[piece.index]
        if not np.isfinite(part.astype(np.float32) if part.dtype.itemsize < 4 else part).all():
            held = "it holds NaN or infinity" if not np.isfinite(found.astype(np.float64)).all() else "its values are too large"
            raise ValueError(f"{what}: {piece.name} is not finite as {whole.dtype}: {held}; load it in float32, or get it again")
    return whole


def _pieces(keymap: KeyMap, path: str, shape: tuple[int, ...]) -> list[_Piece]:
    names = keymap.theirs(path)
    stacked = "{}" in names[0]
    inner = shape[1:] if stacked else shape
    if inner and inner[-1] % len(names):
        raise ValueError(f"{path} has {inner[-1]} outputs, which are no {len(names)} equal parts: {', '.join(names)}")
    is_in = lambda entries: any(_match(ours, path) for ours in entries)  # noqa: E731
    is_straight = is_in(keymap.straight)
    is_kernel = path.split("/")[-1] == "kernel" and len(inner) > 1 and not is_straight
    axes = _AXES[len(inner)] if is_kernel else tuple(range(len(inner)))
    ones = (2 * is_in(keymap.pointwise) or int(is_in(keymap.sequential))) if is_kernel else 0
    swapped, heads = is_in(keymap.swapped), _heads(keymap, path, inner)
    pieces = []
    for layer in range(shape[0]) if stacked else (None,):
        for part, name in enumerate(names):
            size = inner[-1] // len(names) if inner else 1
            index = (() if layer is None else (layer,)) + ((..., slice(part * size, (part + 1) * size)) if len(names) > 1 else ())
            ours = (*inner[:-1], size) if inner else ()
            theirs = tuple(ours[i] for i in np.argsort(axes)) + (1,) * ones
            pieces.append(_Piece(index, name.replace("{}", str(layer)), theirs, axes, ones, swapped, heads))
    return pieces


def _swap_halves(array: np.ndarray) -> np.ndarray:
    """Their array with the halves of its first axis, the outputs, exchanged."""
    return np.roll(array, len(array) // 2, axis=0)


def _regrouped(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Their array with its first axis, the outputs (outer, inner, rest), as (inner, outer, rest)."""
    parts = array.reshape(outer, inner, -1, *array.shape[1:])
    return parts.swapaxes(0, 1).reshape(array.shape)


def _heads(keymap: KeyMap, path: str, shape: tuple[int, ...]) -> int:
    """Of a leaf of this shape, 0 where it is not headwise."""
    for ours, (number, width) in keymap.headwise.items():
        if _match(ours, path):
            return shape[-1] // (3 * width) if width else number
    return 0


def _match(ours: str, path: str) -> re.Match | None:
    """Of the entry `ours` with the beginning of `path`, up to the end of a part."""
    pattern = re.escape(ours).replace(r"\*", "(.+?)")
    return re.match(rf"{pattern}(?=/|$)", path)


def _filled(name: str, groups: tuple[str, ...]) -> str:
    for group in groups:
        name = name.replace("*", group.replace("/", "."), 1)
    return name


def _like(expected: Params, tree: Params) -> Params:
    """`tree` with the keys of `expected`: NNX counts the members of a list by integers."""
    return {key: _like(value, tree[str(key)]) if isinstance(value, Mapping) else tree[str(key)] for key, value in expected.items()}
