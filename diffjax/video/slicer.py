"""Groups in slices (Zhan 2024, sections 4.1 and 4.2), with the values and gradients of the whole.

A group of operators f over parts x_1 ... x_N of an axis, in slices of n parts: for each slice s in turn

    y_s = f(x_s)                                                                                                   (1)

takes the place of x_s where both have one shape and type, or a place in a new array. Only (1) for one slice exists at a
time, and XLA needs the memory of one. Parts that are left behind the last full slice make a shorter one of their own:
nothing is padded. Weights, and all that f has from its closure, stay whole.

A norm over all of the axis sees a slice only; its statistics come from a pass before, merged slice by slice in float32:
a slice's own would be other numbers, and another picture. `runner(plan, compat="official")` takes those, as the paper's
released code does: for comparison with it, never for pictures.

A gradient keeps x for each group and computes the rest again, slice by slice.

With a plan whose `offload` has "skips", these lie in the host's memory from where they are made to where they are read,
and groups bring their slices of them, see `offload`.
"""

import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from diffjax.core import names
from diffjax.core.types import Array
from diffjax.nn import norms, stack
from diffjax.nn.groups import PLAIN, ROWS, Axis, Operator, Runner
from diffjax.nn.norms import GroupNorm, Moments
from diffjax.video import offload
from diffjax.video.grouping import Plan

_COLUMNS = Axis("rows", 3)  # of (B, T, H, W, C), where the released code cuts what ROWS cuts, by a plan's count of rows
# operators of "group/operator" that the released code leaves whole, and those that it runs on their own
_OFFICIAL_WHOLE = (
    "*/join", "conv_in/*", "decoder/*/conv_in", "decoder/*/resample", "decoder/mid/*/attention", "decoder/conv_out/*",
    "decoder/time_conv_out/*",
)  # fmt: skip
_OFFICIAL_ALONE = "*/resample", "*/proj_in", "*/proj_out"


class Sliced:
    """Each group on slices of its axis, as many as the plan says: a Runner with the results of PLAIN. Raises ValueError
    for a plan that offloads where the backend cannot."""

    def __init__(self, plan: Plan, prefix: str = ""):
        if plan.offload and not prefix:
            offload.check(plan.offload)
        self.plan, self.prefix = plan, prefix

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        name, length = self.prefix + name, x.shape[axis.index]
        _check_lengths(name, axis, x, others)
        size = self.plan.size(name, axis, length)
        return _in_slices(name, functools.partial(PLAIN, name, axis, operators), axis.index, size, x, others)

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments:
        size = self.plan.size(self.prefix + name, axis, x.shape[axis.index])
        return _merged_moments(norm, axis.index, size, x)

    def stow(self, x: Array) -> tuple[Array, Array]:
        return _stow(self.plan, x)

    def within(self, name: str) -> "Sliced":
        return Sliced(self.plan, f"{self.prefix}{name}/")


class Alone:
    """Each operator a group of its own, by another Runner: every result between two operators exists as a whole."""

    def __init__(self, run: Runner):
        self.run = run

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        for operator, function in operators.items():
            x = self.run(name, axis, {operator: function}, x, *others)
        return x

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments | None:
        return self.run.moments(name, axis, norm, x)

    def stow(self, x: Array) -> tuple[Array, Array]:
        return self.run.stow(x)

    def within(self, name: str) -> "Alone":
        return Alone(self.run.within(name))


class Official:
    """What the paper's released code does: groups over frames of a place cut along the width, each slice normalised by
    its own statistics; small groups, and joins, convolutions at the ends and the decoder's up-sampling whole.

    Lossy: another function than the network's. Sums that the network has inside an operator are in that one's slices.
    """

    def __init__(self, plan: Plan, prefix: str = ""):
        self.plan, self.prefix = plan, prefix

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        name, axis = self.prefix + name, _COLUMNS if axis == ROWS else axis
        _check_lengths(name, axis, x, others)
        size = self.plan.size(name, axis, x.shape[axis.index])
        for chain, whole in _official_chains(name, operators):
            length = x.shape[axis.index] if whole else size
            x = _in_slices(name, functools.partial(PLAIN, name, axis, chain), axis.index, length, x, others)
        return x

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> None:
        return None

    def stow(self, x: Array) -> tuple[Array, Array]:
        return _stow(self.plan, x)

    def within(self, name: str) -> "Official":
        return Official(self.plan, f"{self.prefix}{name}/")


def _official_chains(name: str, operators: Mapping[str, Operator]) -> Iterator[tuple[dict[str, Operator], bool]]:
    """Operators that are run together, and whether they are run on the whole."""

    def match(operator: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(f"{name}/{operator}", pattern) for pattern in patterns)

    kind = lambda item: item[0] if match(item[0], _OFFICIAL_WHOLE + _OFFICIAL_ALONE) else ""  # noqa: E731
    for operator, chain in itertools.groupby(operators.items(), kind):
        yield dict(chain), match(operator, _OFFICIAL_WHOLE)


RUNNERS: dict[str, Callable[[Plan], Runner]] = {
    "": Sliced,
    "alone": lambda plan: Alone(Sliced(plan)),
    "official": Official,
}


def runner(plan: Plan, compat: str = "") -> Runner:
    """The Runner of a plan. compat: "alone", without grouping; "official", the paper's released code, lossy. Both are
    for comparison. Raises ValueError for other names."""
    return names.lookup(RUNNERS, compat, "compat")(plan)


def _in_slices(
    name: str, function: Callable[..., Array], axis: int, size: int, x: Array, others: tuple[Array, ...]
) -> Array:
    """function(x, *others) by slices of `size` parts of the axis."""
    length = x.shape[axis]
    if size >= length:
        return stack.remat(function, "nothing")(*offload.on_device((x, *others)))
    whole = jax.eval_shape(lambda *arrays: function(*offload.on_device(arrays)), x, *others)
    if whole.ndim <= axis or whole.shape[axis] != length:
        raise ValueError(f"group {name}: found a result of shape {whole.shape} for {length} parts along axis {axis}")
    in_place = (whole.shape, whole.dtype) == (x.shape, x.dtype)

    def cut(array: Array, start: Array | int, size: int) -> Array:
        return offload.on_device(jax.lax.dynamic_slice_in_dim(array, start, size, axis))

    def replace(out: Array, start: Array | int, size: int) -> Array:
        # what does not change from slice to slice is cut inside, so that a gradient keeps the whole and no copy of it
        if in_place:
            body = lambda part: function(part, *(cut(other, start, size) for other in others))  # noqa: E731
            result = stack.remat(body, "nothing")(cut(out, start, size))
        else:
            body = lambda x, *others: function(*(cut(array, start, size) for array in (x, *others)))  # noqa: E731
            result = stack.remat(body, "nothing")(x, *others)
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, axis)

    out = x if in_place else jnp.zeros(whole.shape, whole.dtype)
    out = jax.lax.fori_loop(0, length // size, lambda index, out: replace(out, index * size, size), out)
    rest = length % size
    return replace(out, length - rest, rest) if rest else out


def _stow(plan: Plan, x: Array) -> tuple[Array, Array]:
    return offload.stow(x) if "skips" in plan.offload else PLAIN.stow(x)


def _merged_moments(norm: GroupNorm, axis: int, size: int, x: Array) -> Moments:
    """Of all of x, by slices of `size` parts of the axis."""
    length = x.shape[axis]
    if size >= length:
        return norm.moments(x)

    def merge(found: Moments, start: Array | int, size: int) -> Moments:
        part = lambda x: norm.moments(jax.lax.dynamic_slice_in_dim(x, start, size, axis))  # noqa: E731
        return norms.merge(found, stack.remat(part, "nothing")(x))

    found = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(norm.moments, x))
    found = jax.lax.fori_loop(0, length // size, lambda index, found: merge(found, index * size, size), found)
    rest = length % size
    return merge(found, length - rest, rest) if rest else found


def _check_lengths(name: str, axis: Axis, x: Array, others: tuple[Array, ...]) -> None:
    shapes = [array.shape for array in (x, *others)]
    if any(len(shape) <= axis.index or shape[axis.index] != x.shape[axis.index] for shape in shapes):
        raise ValueError(
            f"group {name}: found arrays of shapes {shapes}, expected one number of {axis.name} along axis {axis.index}"
        )
