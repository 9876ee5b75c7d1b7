"""Peaks of memory: predicted from a trace, fitted to a budget, and asked of the compiler.

A network is traced once, with each group of operators a function of its own. What a step of the trace needs is

    peak = arguments + alive + step                                                                                (1)
    step = work                              a group as a whole, or what is in no group                            (2)
    step = out + (cut + work) n / N          a group of N parts in slices of n; out = 0 where it replaces x        (3)

with `alive` the bytes of results that are read later (skips), `cut` those of the arrays that are cut, and `work` the
largest sum of what is alive within the group; groups inside a group count there, by (2) and (3) again. The largest
step is the network's peak, and a plan fits a budget when no step is above it.

Counted are results of products, convolutions, reductions, concatenations and transpositions, what they take in, and
what enters a group. Other elementwise results are taken as fused: computed where they are read, without memory. The
compiler decides otherwise here and there: the prediction orders plans and chooses counts, `compile_for` has the last
word.

    traced = trace(network, params, x, noise_label, cond)                    # shapes will do
    plan = fit(traced, 16 * 2**30)
    peak(traced, plan).bytes
    compile_for(functools.partial(network, run=Sliced(plan)), params, x, noise_label, cond).peak
"""

import collections
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import core as jaxprs
from jax.sharding import SingleDeviceSharding

from diffjax.core.types import Array
from diffjax.nn import attention
from diffjax.nn.groups import PLAIN, Axis, Operator
from diffjax.nn.norms import GroupNorm, Moments
from diffjax.video.grouping import Group, Plan, total_bytes

LEAST_POSITIONS = 256  # in a slice of rows or tokens: products stay large enough to fill a chip
_MARK = "diffjax_group_"
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
    of its own results, `cut` of what a group cuts into slices."""

    alive: int
    out: int
    cut: int = 0
    inner: "Sequence[Step]" = ()  # of a group, or of the body of a loop
    group: Group | None = None
    replaces: bool = False  # whether a group's result may take the place of x


class Traced(NamedTuple):
    """A network as `trace` sees it."""

    steps: Sequence[Step]
    groups: Sequence[Group]  # in order, those inside others after them
    argument_bytes: int


class Peak(NamedTuple):
    """The largest step of a network: its bytes, and the groups it lies in, from the outermost on."""

    bytes: float
    groups: tuple[str, ...]


def trace(function: Callable[..., Any], *shapes: Any, platform: str = "") -> Traced:
    """The steps of function(*arrays, run=...). `shapes`: trees of arrays or of jax.ShapeDtypeStruct; platform: "cpu",
    "gpu" or "tpu", "" = this machine's."""
    marker = _Marker([])
    with attention.traced_for(platform):
        jaxpr = jax.make_jaxpr(lambda *arrays: function(*arrays, run=marker))(*shapes)
    groups = [group for group, _ in marker.found]
    return Traced(_Reader(marker.found).steps(jaxpr.jaxpr), groups, total_bytes(shapes))


def peak(traced: Traced, plan: Plan) -> Peak:
    """Predicted for a plan, equations 1 to 3."""
    sizes = {group.name: plan.size(group.name, group.axis, group.length) for group in traced.groups}
    found = _largest(traced.steps, sizes)
    return Peak(traced.argument_bytes + found.bytes, found.groups)


def peaks_by_group(traced: Traced, plan: Plan) -> dict[str, float]:
    """Predicted bytes while each outermost group runs, all that is alive beside it counted."""
    sizes = {group.name: plan.size(group.name, group.axis, group.length) for group in traced.groups}
    found: dict[str, float] = {}

    def visit(steps: Sequence[Step], beside: float) -> None:
        for step in steps:
            if step.group is None:
                visit(step.inner, beside + step.alive + step.out)
            else:
                found[step.group.name] = max(beside + _bytes(step, sizes).bytes, found.get(step.group.name, 0))

    visit(traced.steps, traced.argument_bytes)
    return found


def fit(traced: Traced, budget: float) -> Plan:
    """The plan with the least slicing that is predicted to stay within `budget` bytes.

    Counts divide their axis where that is enough; a slice keeps a frame, or LEAST_POSITIONS places. Raises ValueError
    for a budget below what the finest slices need.
    """
    options = {group.name: _counts(group) for group in traced.groups}
    lengths = {group.name: group.length for group in traced.groups}
    chosen = dict.fromkeys(options, 1)
    while True:
        sizes = {name: math.ceil(lengths[name] / count) for name, count in chosen.items()}
        found = _largest(traced.steps, sizes)
        if traced.argument_bytes + found.bytes <= budget:
            return Plan(groups={name: count for name, count in chosen.items() if count > 1})
        finer = next((name for name in found.groups if options[name]), None)
        if finer is None:
            raise ValueError(_below_floor(traced, found, budget))
        chosen[finer] = options[finer].pop(0)


def _counts(group: Group) -> list[int]:
    """Numbers of slices above 1 to try: divisors of the axis; without any, the numbers that give other slices."""
    least = 1
    if group.axis.name == "tokens":
        least = LEAST_POSITIONS
    elif group.axis.name == "rows":
        least = math.ceil(LEAST_POSITIONS / group.shape[group.axis.index + 1])
    most = max(group.length // least, 1)
    divisors = [count for count in range(2, most + 1) if group.length % count == 0]
    last = divisors[-1] if divisors else 1
    sizes = {math.ceil(group.length / count): count for count in range(most, last, -1)}  # the least count of each size
    return divisors + sorted(sizes.values())


def _below_floor(traced: Traced, found: Peak, budget: float) -> str:
    gib = 2**30
    given = traced.argument_bytes
    where = f"in {' > '.join(found.groups)}" if found.groups else "outside the groups"
    return (
        f"found a budget of {budget / gib:.2f} GiB, below the {(given + found.bytes) / gib:.2f} GiB that the finest "
        f"slices need ({given / gib:.2f} of weights and inputs, the most {where}): lower it by fewer frames, a smaller "
        "picture, weights in bfloat16, or guidance one half after the other"
    )


def _largest(steps: Sequence[Step], sizes: Mapping[str, int]) -> Peak:
    return max((_bytes(step, sizes) for step in steps), default=Peak(0, ()), key=lambda found: found.bytes)


def _bytes(step: Step, sizes: Mapping[str, int]) -> Peak:
    """Of a step and all that is alive beside it, equations 2 and 3."""
    inner = _largest(step.inner, sizes)
    if step.group is None:
        return Peak(step.alive + step.out + inner.bytes, inner.groups)
    path = (step.group.name, *inner.groups)
    size, length = sizes[step.group.name], step.group.length
    if size >= length:
        return Peak(step.alive + max(step.out, inner.bytes), path)
    out = 0 if step.replaces else step.out
    return Peak(step.alive + out + (step.cut + inner.bytes) * size / length, path)


class Compiled(NamedTuple):
    """What the compiler says of a program for one device; sizes in bytes."""

    peak: int  # of all below at once
    arguments: int
    outputs: int
    work: int
    aliases: int  # of outputs that take the place of arguments
    seconds: float  # that compiling took
    text: str  # the program


def compile_for(
    function: Callable[..., Any], *shapes: Any, device: jax.Device | None = None, donate: Sequence[int] = ()
) -> Compiled:
    """Compile function(*arrays) for a device, without running it: one that is here, the first if None, or one of
    `topology`. donate: arguments whose memory it may take.

    Raises DoesNotFit where the compiler finds that the device has too little.
    """
    device = device or jax.devices()[0]
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    start = time.perf_counter()
    try:
        # a function of its own: JAX keeps the trace of a function by its identity, and it may be for another platform
        own = lambda *arrays: function(*arrays)  # noqa: E731
        with attention.traced_for(device.platform):
            lowered = jax.jit(own, donate_argnums=donate).lower(*placed)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    aliases = memory.alias_size_in_bytes
    # elsewhere than on TPUs the compiler's own peak leaves out the work
    peak = memory.peak_memory_in_bytes if device.platform == "tpu" else sum(sizes) - aliases
    return Compiled(peak, *sizes, aliases, seconds, compiled.as_text())


class DoesNotFit(MemoryError):
    """A program that needs more than its device has; needed: bytes, None if the compiler does not say."""

    def __init__(self, message: str):
        super().__init__(message.splitlines()[0])
        found = re.search(r"Used ([0-9.]+)([KMG]) of|\(([0-9.]+)([KMG])\) exceeds", message)
        number, unit = [group for group in found.groups() if group] if found else ("0", "G")
        self.needed = int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]) or None


def topology(name: str) -> jax.Device:
    """One chip of a TPU topology ("v5e:1x1", "v5e:4x4") as a target of `compile_for`; the chip need not be here, the
    package libtpu must. Raises ValueError without it, and for a name that its compiler does not know."""
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices[0]
    except RuntimeError as error:
        hint = "with the package libtpu (python -m pip install --no-deps libtpu) v5e:1x1 is one"
        raise ValueError(f"no TPU topology {name!r} to compile for: {str(error).splitlines()[0]}; {hint}") from error


class _Marker:
    """PLAIN, with each group a jitted function whose name says which one it is. found: groups, and how many arrays
    each cuts."""

    def __init__(self, found: list[tuple[Group, int]], prefix: str = ""):
        self.found, self.prefix = found, prefix

    def __call__(self, name: str, axis: Axis, operators: Mapping[str, Operator], x: Array, *others: Array) -> Array:
        function = lambda x, *others: PLAIN(name, axis, operators, x, *others)  # noqa: E731
        return self._marked(name, axis, tuple(operators), function, x, *others)

    def moments(self, name: str, axis: Axis, norm: GroupNorm, x: Array) -> Moments:
        return self._marked(name, axis, (), norm.moments, x)

    def within(self, name: str) -> "_Marker":
        return _Marker(self.found, f"{self.prefix}{name}/")

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

    def __init__(self, var: Any):
        self.kind = var.aval.shape, var.aval.dtype
        self.bytes = math.prod(var.aval.shape) * var.aval.dtype.itemsize


class _Equation(NamedTuple):
    """An equation of a trace; constants are left out."""

    primitive: str
    reads: list[_Value]
    writes: list[_Value]
    params: Mapping[str, Any]


class _Reader:
    """From a trace to steps. found: the groups, and how many arrays each cuts."""

    def __init__(self, found: Sequence[tuple[Group, int]]):
        self.found = found

    def steps(self, jaxpr: Any) -> list[Step]:
        """Of a jaxpr; the memory of what it is given is not counted."""
        values = {var: _Value(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
        equations = list(_equations(jaxpr, values))
        results = [values[var] for var in jaxpr.outvars if not isinstance(var, jaxprs.Literal)]
        kept = _in_memory(equations, results)
        holds, last = _lifetimes(equations, results, kept)
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
        if place is None:
            bodies = (_open(equation.params[name]) for name in _BODIES if name in equation.params)
            return Step(alive, out, inner=[step for body in bodies for step in self.steps(body)])
        group, count = self.found[place]
        cut = equation.reads[-count:]
        x = holds.get(cut[0], frozenset())
        replaces = cut[0].kind == made[0].kind and bool(x) and x <= set(ends)
        inner = self.steps(_open(equation.params["jaxpr"]))
        return Step(alive, out, sum(value.bytes for value in cut), inner, group, replaces)


def _equations(jaxpr: Any, values: dict[Any, _Value | None]) -> Iterator[_Equation]:
    """Of a jaxpr and, in their places, of the functions that it calls. values: what each variable stands for, filled in
    here; None where that is a constant."""
    look = lambda var: None if isinstance(var, jaxprs.Literal) else values[var]  # noqa: E731
    for equation in jaxpr.eqns:
        name, reads = equation.primitive.name, [look(var) for var in equation.invars]
        if name in _CALLS and _mark(equation) is None:
            body = _open(equation.params[_CALLS[name]])
            values.update(zip(body.invars, reads, strict=True))
            values.update((var, _Value(var)) for var in body.constvars)
            yield from _equations(body, values)
            values.update([(var, look(result)) for var, result in zip(equation.outvars, body.outvars, strict=True)])
            continue
        writes = [_Value(var) for var in equation.outvars]
        values.update(zip(equation.outvars, writes, strict=True))
        yield _Equation(name, [value for value in reads if value is not None], writes, equation.params)


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
    holds: dict[_Value, frozenset[_Value]] = {}
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
