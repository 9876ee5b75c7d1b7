"""Plans: into how many slices each group of a network is cut, and which groups it has.

    plan = Plan(frames=14, rows=9, groups={"up_blocks/3/*": 28})      # first the groups, in order; then by axis
    run = slicer.Sliced(plan)
    f = network(params, x, noise_label, cond, run=run)                # the same numbers as without run=

    groups = groups_of(network, params, x, noise_label, cond)         # shapes will do, nothing is computed
    check(plan, groups)

A plan as JSON: {"frames": 14, "rows": 9, "tokens": 1, "groups": {"up_blocks/3/*": 28}, "offload": ["skips"]}.
"""

import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffjax.core import names
from diffjax.core.types import Array
from diffjax.nn.groups import PLAIN, Axis, Operator
from diffjax.nn.norms import GroupNorm, Moments

OFFLOADS = "skips", "weights"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers of slices: that of the first pattern in `groups` which a group's name matches (fnmatch: * is any text),
    else that of its axis. 1 = whole; more than there are parts = one part a slice. offload: what waits in the host's
    memory until its turn comes, some of OFFLOADS, see `offload`.

    Raises ValueError for a number below 1, and other things to offload.
    """

    frames: int = 1
    rows: int = 1
    tokens: int = 1
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    offload: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.offload, list | tuple):
            raise ValueError(f"found offload={self.offload!r} in a plan, expected a list of some of {list(OFFLOADS)}")
        for name in self.offload:
            if name not in OFFLOADS:
                raise ValueError(f"unknown {name!r} to offload; {names.nearest(name, OFFLOADS)}")
        object.__setattr__(self, "offload", tuple(self.offload))
        numbers = {"frames": self.frames, "rows": self.rows, "tokens": self.tokens, **self.groups}
        for name, number in numbers.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"found {number!r} slices for {name}, expected a whole number, 1 = not sliced")

    def size(self, name: str, axis: Axis, length: int) -> int:
        """Parts in a slice of this group: all of them are ceil(length / count) long but the last, which may be less."""
        matches = (number for pattern, number in self.groups.items() if fnmatch.fnmatchcase(name, pattern))
        return math.ceil(length / next(matches, getattr(self, axis.name)))

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def loads(text: str) -> Plan:
    """The plan that `Plan.dumps` wrote, or one by hand. Raises ValueError for what is none."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"found a plan that is no JSON ({error}): see diffjax.video.grouping") from error
    known = [field.name for field in dataclasses.fields(Plan)]
    if not isinstance(values, dict) or not isinstance(values.get("groups", {}), dict):
        raise ValueError(f"found a plan {text[:80]!r}, expected an object with some of {known}; groups is one too")
    for name in values:
        if name not in known:
            raise ValueError(f"unknown entry {name!r} of a plan; {names.nearest(name, known)}")
    return Plan(**values)


class Group(NamedTuple):
    """What a network says of one of its groups."""

    name: str
    axis: Axis
    shape: tuple[int, ...]  # of x
    operators: tuple[str, ...]  # nothing for the statistics of a norm
    input_bytes: int  # of all arrays that are cut
    output_bytes: int

    @property
    def length(self) -> int:
        """Parts of the axis."""
        return self.shape[self.axis.index]


def groups_of(function: Callable[..., Any], *shapes: Any) -> list[Group]:
    """Groups of function(*arrays, run=...) in the order in which they are reached; a group of which others are part
    comes before them. `shapes`: trees of arrays or of jax.ShapeDtypeStruct; nothing is computed."""
    recorder = _Recorder([])
    jax.eval_shape(lambda *arrays: function(*arrays, run=recorder), *shapes)
    return recorder.found


class _Recorder:
    """PLAIN, and a list of what it ran."""

    def __init__(self, found: list[Group], prefix: str = ""):
        self.found, self.prefix = found, prefix

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        place = len(self.found)
        out = PLAIN(name, axis, operators, x, *others)
        sizes = total_bytes((x, *others)), total_bytes(out)
        self.found.insert(place, Group(self.prefix + name, axis, x.shape, tuple(operators), *sizes))
        return out

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments:
        out = norm.moments(x)
        sizes = total_bytes(x), total_bytes(out)
        self.found.append(Group(self.prefix + name, axis, x.shape, (), *sizes))
        return out

    def stow(self, x: Array) -> tuple[Array, Array]:
        return PLAIN.stow(x)

    def within(self, name: str) -> "_Recorder":
        return _Recorder(self.found, f"{self.prefix}{name}/")


def check(plan: Plan, groups: Iterable[Group] | Sequence[str]) -> None:
    """Raises ValueError, with the nearest name, for a pattern of the plan that none of the groups matches."""
    known = list(dict.fromkeys(group if isinstance(group, str) else group.name for group in groups))
    for pattern in plan.groups:
        if not fnmatch.filter(known, pattern):
            hint = names.nearest(pattern, known)
            raise ValueError(f"the plan names the group {pattern!r}, which the network does not have; {hint}")


def total_bytes(tree: Any) -> int:
    """Of all arrays or shapes in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
