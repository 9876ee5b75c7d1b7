"""A network as the steps of its trace: what each needs, and what is alive beside it.

    traced = trace(network, params, x, noise_label, cond)                    # shapes will do

A network is traced once, with each group of operators a function of its own. Counted are results of products,
convolutions, reductions, concatenations and transpositions, what they take in, and what enters a group. Other
elementwise results are taken as fused: computed where they are read, without memory. What `offload` names counts where
it is read alone.
"""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jaxprs

from diffjax.core.types import Array
from diffjax.nn import attention
from diffjax.nn.groups import PLAIN, Axis, Operator
from diffjax.nn.norms import GroupNorm, Moments
from diffjax.video.grouping import Group, total_bytes

_MARK, _STOWED = "diffjax_group_", "diffjax_stowed"
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp convert_element_type copy cos div dynamic_slice eq erf erfc exp exp2 expm1 floor ge gt "
    "integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not or pad pow rem rev round rsqrt "
    "select_n sign sin slice split sqrt square stop_gradient sub tan tanh xor broadcast_in_dim".split()
)
_SAME_BYTES = frozenset("reshape squeeze expand_dims".split())  # another name for the same memory
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
          "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}  # fmt: skip
_PRODUCTS = frozenset(["conv_general_dilated", "dot_general"])
_BODIES = "jaxpr", "body_jaxpr"  # parameters of equations that hold a loop's body, or a group


class Step(NamedTuple):
    """One thing that is computed at a time. In bytes: `alive` of results from before that are read here or later, `out`
    of its own results, `cut` of what a group cuts into slices, `weights` and `skips` of what comes from the host's
    memory for it where nothing is cut."""

    alive: int
    out: int
    cut: int = 0
    inner: "Sequence[Step]" = ()  # of a group, or of the body of a loop
    group: Group | None = None
    replaces: bool = False  # whether a group's result may take the place of x
    weights: int = 0
    skips: int = 0


class Traced(NamedTuple):
    """A network as `trace` sees it."""

    steps: Sequence[Step]
    groups: Sequence[Group]  # in order, those inside others after them
    argument_bytes: int  # without weights that are offloaded
    offload: tuple[str, ...] = ()  # of Plan


def trace(function: Callable[..., Any], *shapes: Any, platform: str = "", offload: Sequence[str] = ()) -> Traced:
    """The steps of function(weights, *arrays, run=...). `shapes`: trees of arrays or of jax.ShapeDtypeStruct; platform:
    "cpu", "gpu" or "tpu", "" = this machine's; offload: as of Plan."""
    marker = _Marker([], "skips" in offload)
    with attention.traced_for(platform):
        jaxpr = jax.make_jaxpr(lambda *arrays: function(*arrays, run=marker))(*shapes)
    groups = [group for group, _ in marker.found]
    waiting = jax.tree.leaves(shapes[0]) if "weights" in offload else []
    hosted = jaxpr.jaxpr.invars[: len(waiting)]
    steps = _Reader(marker.found).steps(jaxpr.jaxpr, hosted)
    return Traced(steps, groups, total_bytes(shapes) - total_bytes(waiting), tuple(offload))


class _Marker:
    """PLAIN, with each group a jitted function whose name says which one it is. found: groups, and how many arrays
    each cuts. stows: whether skips are copied to the host."""

    def __init__(self, found: list[tuple[Group, int]], stows: bool, prefix: str = ""):
        self.found, self.stows, self.prefix = found, stows, prefix

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        function = lambda x, *others: PLAIN(name, axis, operators, x, *others)  # noqa: E731
        return self._marked(name, axis, tuple(operators), function, x, *others)

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments:
        return self._marked(name, axis, (), norm.moments, x)

    def stow(self, x: Array) -> tuple[Array, Array]:
        if not self.stows:
            return PLAIN.stow(x)

        def copy(x: Array) -> Array:
            return x

        copy.__name__ = _STOWED
        return x, jax.jit(copy)(x)

    def within(self, name: str) -> "_Marker":
        return _Marker(self.found, self.stows, f"{self.prefix}{name}/")

    def _marked(self, name: str, axis: Axis, operators: tuple[str, ...], function: Callable, *arrays: Array) -> Any:
        place = len(self.found)
        sizes = total_bytes(arrays), 0
        self.found.append((Group(self.prefix + name, axis, arrays[0].shape, operators, *sizes), len(arrays)))

        def marked(*arrays: Array) -> Any:
            return function(*arrays)

        marked.__name__ = f"{_MARK}{place}"
        out = jax.jit(marked)(*arrays)
        group, count = self.found[place]
        self.found[place] = group._replace(output_bytes=total_bytes(out)), count
        return out


class _Value:
    """An array of a trace; a function that is called twice has other ones each time."""

    def __init__(self, var: Any, place: str = ""):
        self.kind, self.place = (var.aval.shape, var.aval.dtype), place  # "weights", "skips": on the host
        self.size = math.prod(var.aval.shape) * var.aval.dtype.itemsize
        self.bytes = 0 if place else self.size  # of the device's memory


class _Equation(NamedTuple):
    """An equation of a trace; given: what it reads, None for constants."""

    primitive: str
    given: list[_Value | None]
    reads: list[_Value]
    writes: list[_Value]
    params: Mapping[str, Any]


class _Reader:
    """From a trace to steps. found: the groups, and how many arrays each cuts."""

    def __init__(self, found: Sequence[tuple[Group, int]]):
        self.found = found

    def steps(self, jaxpr: Any, hosted: Sequence[Any] = ()) -> list[Step]:
        """Of a jaxpr; the memory of what it is given is not counted, but where `hosted` weights are brought."""
        values = {var: _Value(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
        values.update((var, _Value(var, "weights")) for var in hosted)
        equations = list(_equations(jaxpr, values))
        results = [values[var] for var in jaxpr.outvars if not isinstance(var, jaxprs.Literal)]
        kept = _in_memory(equations, results)
        holds, last = _lifetimes(equations, results, kept | {values[var] for var in hosted})
        ends = collections.defaultdict(list)
        for value, index in last.items():
            ends[index].append(value)
        steps, alive = [], 0
        for index, equation in enumerate(equations):
            made = [value for value in equation.writes if value in kept]
            if made:
                steps.append(self._step(equation, alive, made, holds, ends[index]))
            alive += sum(value.bytes for value in made if value in last) - sum(value.bytes for value in ends[index])
        return steps

    def _step(
        self, equation: _Equation, alive: int, made: Sequence[_Value], holds: Mapping, ends: Sequence[_Value]
    ) -> Step:
        out, place = sum(value.bytes for value in made), _mark(equation)
        read = set().union(*(holds.get(value, ()) for value in equation.reads))
        weights = sum(value.size for value in read if value.place == "weights")
        if place is None:
            bodies = [_open(equation.params[name]) for name in _BODIES if name in equation.params]
            inner = [step for body in bodies for step in self.steps(body, _hosted(body, equation, holds))]
            return Step(alive, out, inner=inner, weights=0 if bodies else weights)
        group, count = self.found[place]
        cut = equation.reads[-count:]
        x = holds.get(cut[0], frozenset())
        replaces = cut[0].kind == made[0].kind and bool(x) and x <= set(ends)
        inner = self.steps(_open(equation.params["jaxpr"]))
        skips = sum(value.size for value in cut if value.place == "skips")
        return Step(alive, out, sum(value.size for value in cut), inner, group, replaces, weights, skips)


def _hosted(body: Any, equation: _Equation, holds: Mapping) -> list[Any]:
    """Variables of a loop's body that are weights on the host, or made of them alone."""
    given = equation.given[-len(body.invars) :]  # a while loop is given its condition's constants before
    held = ((var, holds.get(value, ())) for var, value in zip(body.invars, given, strict=True))
    return [var for var, values in held if values and all(value.place == "weights" for value in values)]


def _equations(jaxpr: Any, values: dict[Any, _Value | None]) -> Iterator[_Equation]:
    """Of a jaxpr and, in their places, of the functions that it calls. values: what each variable stands for, filled in
    here; None where that is a constant."""
    look = lambda var: None if isinstance(var, jaxprs.Literal) else values[var]  # noqa: E731
    for equation in jaxpr.eqns:
        name, reads = equation.primitive.name, [look(var) for var in equation.invars]
        if name in _CALLS and _mark(equation) is None and equation.params.get("name") != _STOWED:
            body = _open(equation.params[_CALLS[name]])
            values.update(zip(body.invars, reads, strict=True))
            values.update((var, _Value(var)) for var in body.constvars)
            yield from _equations(body, values)
            values.update([(var, look(result)) for var, result in zip(equation.outvars, body.outvars, strict=True)])
            continue
        place = "skips" if equation.params.get("name") == _STOWED else ""
        writes = [_Value(var, place) for var in equation.outvars]
        values.update(zip(equation.outvars, writes, strict=True))
        yield _Equation(name, reads, [value for value in reads if value is not None], writes, equation.params)


def _in_memory(equations: Sequence[_Equation], results: Sequence[_Value]) -> set[_Value]:
    """Values that have memory of their own."""
    fused = {value for equation in equations if equation.primitive in _ELEMENTWISE for value in equation.writes}
    same = {equation.writes[0]: equation.reads[0] for equation in equations if _renames(equation)}
    kept = {value for equation in equations for value in equation.writes} - fused - same.keys()
    read = [value for equation in equations if _reads_memory(equation) for value in equation.reads]
    for value in [*read, *results]:
        while value in same:
            value = same[value]
        if value in fused:
            kept.add(value)
    return kept


def _lifetimes(
    equations: Sequence[_Equation], results: Sequence[_Value], kept: set[_Value]
) -> tuple[dict[_Value, frozenset[_Value]], dict[_Value, int]]:
    """What of `kept` each value is computed from when it is read; the last equation that reads each of `kept`."""
    holds = {value: frozenset([value]) for value in kept if value.place == "weights"}
    last: dict[_Value, int] = {}
    for index, equation in enumerate(equations):
        sources = frozenset().union(*(holds.get(value, frozenset()) for value in equation.reads))
        if kept.intersection(equation.writes):
            last.update(dict.fromkeys(sources, index))
        holds.update((value, frozenset([value]) if value in kept else sources) for value in equation.writes)
    for value in results:
        last.update(dict.fromkeys(holds.get(value, ()), len(equations)))
    return holds, last


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _mark(equation: Any) -> int | None:
    """The place in the list of groups of the one that this is a call of; None: it is no group."""
    name = str(equation.params.get("name", ""))
    return int(name.removeprefix(_MARK)) if name.startswith(_MARK) else None


def _renames(equation: _Equation) -> bool:
    return equation.primitive in _SAME_BYTES and bool(equation.reads)


def _reads_memory(equation: _Equation) -> bool:
    """Whether what it reads lies in memory: a product, a loop, a group."""
    return equation.primitive in _PRODUCTS or any(name in equation.params for name in _BODIES)
