"""Groups of operators that treat every part of an axis alike, and the order in which they are run.

A network of video says which of its operators follow each other along which axis; who calls it says how they are run.
By itself each operator sees the whole array:

    x = run("resnet", FRAMES, {"join": join, "block": block}, x, skip)     # run: a Runner, PLAIN if nobody says otherwise

`diffjax.video.slicer` runs the same groups on slices, so that what lies between two operators of a group never exists
for all of the axis at once (Zhan 2024, section 4.2). The network knows nothing of it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from diffjax.core.types import Array
from diffjax.nn.norms import GroupNorm, Moments

Operator = Callable[..., Array]  # (x, *others) -> x


class Axis(NamedTuple):
    """What a group's parts are called, and where they are counted."""

    name: str
    index: int


FRAMES = Axis("frames", 0)  # of (B T, H, W, C): convolutions, norms and attention within a frame
ROWS = Axis("rows", 2)  # of (B, T, H, W, C): everything that mixes frames at one place
TOKENS = Axis("tokens", 1)  # of (B, L, D): linear layers, and queries of attention


class Runner(Protocol):
    """How the groups of a network are run."""

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        """x after operators(x, *others) in turn. All arrays are cut along `axis` together; what an operator needs whole
        it has from its closure. No operator may look beyond its part of the axis."""

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments | None:
        """Statistics of all of x for a norm that is applied to parts of it; None: the norm sees all of x."""

    def stow(self, x: Array) -> tuple[Array, Array]:
        """(x, kept): x (B T, H, W, C) as what follows reads it, and for a group that reads it much later, as one of its
        `others`. Nothing else may be done with `kept`, which may lie in another memory."""

    def within(self, name: str) -> "Runner":
        """The same, with `name/` before the names of groups."""


class Plain:
    """Every operator on the whole array."""

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        for operator in operators.values():
            x = operator(x, *others)
        return x

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> None:
        return None

    def stow(self, x: Array) -> tuple[Array, Array]:
        return x, x

    def within(self, name: str) -> "Plain":
        return self


PLAIN = Plain()
