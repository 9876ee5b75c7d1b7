"""Peaks of memory: predicted from a trace, fitted to a budget, and asked of the compiler.

What a step of a network's trace (`steps.trace`) needs is

    peak = arguments + alive + step                                                                                (1)
    step = work                              a group as a whole, or what is in no group                            (2)
    step = out + (cut + work) n / N          a group of N parts in slices of n; out = 0 where it replaces x        (3)

with `alive` the bytes of results that are read later (skips), `cut` those of the arrays that are cut, and `work` the
largest sum of what is alive within the group; groups inside a group count there, by (2) and (3) again. The largest
step is the network's peak, and a plan fits a budget when no step is above it. Skips that are offloaded are not alive;
offloaded weights are no arguments, and count in the step that reads them.

The compiler decides otherwise here and there what is in memory: the prediction orders plans and chooses counts,
`compile_for` has the last word.

    traced = steps.trace(network, params, x, noise_label, cond)              # shapes will do
    plan = fit(traced, 16 * 2**30)
    peak(traced, plan).bytes
    compile_for(functools.partial(network, run=Sliced(plan)), params, x, noise_label, cond).peak
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from diffjax.nn import attention
from diffjax.video.grouping import OFFLOADS, Group, Plan
from diffjax.video.offload import host_sharding
from diffjax.video.steps import Step, Traced

LEAST_POSITIONS = 256  # in a slice of rows or tokens: products stay large enough to fill a chip


class Peak(NamedTuple):
    """The largest step of a network: its bytes, and the groups it lies in, from the outermost on."""

    bytes: float
    groups: tuple[str, ...]


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
                visit(step.inner, beside + step.alive + step.out + step.weights)
            else:
                found[step.group.name] = max(beside + _bytes(step, sizes).bytes, found.get(step.group.name, 0))

    visit(traced.steps, traced.argument_bytes)
    return found


def fit(traced: Traced, budget: float) -> Plan:
    """The plan with the least slicing that is predicted to stay within `budget` bytes, with the trace's offload.

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
            groups = {name: count for name, count in chosen.items() if count > 1}
            return Plan(groups=groups, offload=traced.offload)
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
    left = [name for name in OFFLOADS if name not in traced.offload]
    more = f", or {' and '.join(left)} in the host's memory (offload)" if left else ""
    return (
        f"found a budget of {budget / gib:.2f} GiB, below the {(given + found.bytes) / gib:.2f} GiB that the finest "
        f"slices need ({given / gib:.2f} of weights and inputs, the most {where}): lower it by fewer frames, a smaller "
        f"picture, weights in bfloat16, guidance one half after the other{more}"
    )


def _largest(steps: Sequence[Step], sizes: Mapping[str, int]) -> Peak:
    return max((_bytes(step, sizes) for step in steps), default=Peak(0, ()), key=lambda found: found.bytes)


def _bytes(step: Step, sizes: Mapping[str, int]) -> Peak:
    """Of a step and all that is alive beside it, equations 2 and 3."""
    inner = _largest(step.inner, sizes)
    if step.group is None:
        return Peak(step.alive + step.out + step.weights + inner.bytes, inner.groups)
    path = (step.group.name, *inner.groups)
    size, length = sizes[step.group.name], step.group.length
    if size >= length:
        return Peak(step.alive + step.weights + step.skips + max(step.out, inner.bytes), path)
    out = 0 if step.replaces else step.out
    return Peak(step.alive + step.weights + out + (step.cut + inner.bytes) * size / length, path)


class Compiled(NamedTuple):
    """What the compiler says of a program for one device; sizes in bytes of the device's memory."""

    peak: int  # of all below at once; where skips wait on the host, at most
    arguments: int
    outputs: int
    work: int
    aliases: int  # of outputs that take the place of arguments
    seconds: float  # that compiling took
    text: str  # the program


def compile_for(
    function: Callable[..., Any], *shapes: Any, device: jax.Device | None = None, donate: Sequence[int] = (),
    offload: Sequence[str] = (),
) -> Compiled:  # fmt: skip
    """Compile function(*arrays) for a device, without running it: one that is here, the first if None, or one of
    `topology`. donate: arguments whose memory it may take; offload: as of Plan, with "weights" the first argument waits
    on the host.

    Raises DoesNotFit where the compiler finds that the device has too little.
    """
    device = device or jax.devices()[0]
    places = [SingleDeviceSharding(device)] * len(shapes)
    if "weights" in offload:
        places[0] = host_sharding(device)
    placed = [
        jax.tree.map(lambda leaf, place=place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)
        for tree, place in zip(shapes, places, strict=True)
    ]
    start = time.perf_counter()

    # a function of its own: JAX keeps the trace of a function by its identity, and it may be for another platform
    def own(*arrays: Any) -> Any:
        if "weights" in offload:  # the trace of a shape does not know its memory; nothing is copied
            arrays = jax.device_put(arrays[0], jax.memory.Space.Host), *arrays[1:]
        return function(*arrays)

    try:
        with attention.traced_for(device.platform):
            lowered = jax.jit(own, donate_argnums=donate).lower(*placed)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error
    return read(compiled, device.platform, time.perf_counter() - start)


def read(compiled: jax.stages.Compiled, platform: str = "", seconds: float = 0.0) -> Compiled:
    """What was compiled in so many seconds, for this machine's platform if none is said."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    aliases = memory.alias_size_in_bytes
    peak = sum(sizes) - aliases
    if (platform or jax.default_backend()) == "tpu":  # elsewhere the compiler's own peak leaves out the work
        # of both memories at once; what is given on the host is there all the time, what is stowed there is not
        peak = min(peak, memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes)
    return Compiled(peak, *sizes, aliases, seconds, compiled.as_text())


class DoesNotFit(MemoryError):
    """A program that needs more than its device has; needed, available: bytes, None if the compiler does not say."""

    def __init__(self, message: str):
        super().__init__(message.splitlines()[0])
        size = r"([0-9.]+[KMG])"
        found = re.search(rf"Used {size} of {size}|\({size}\) exceeds.*?\({size}\)", message)
        sizes = [text for text in found.groups() if text] if found else []
        to_bytes = lambda text: int(float(text[:-1]) * 2 ** {"K": 10, "M": 20, "G": 30}[text[-1]])  # noqa: E731
        self.needed, self.available = map(to_bytes, sizes) if sizes else (None, None)


def topology(name: str) -> jax.Device:
    """The first of `topology_devices`, a target of `compile_for`."""
    return topology_devices(name)[0]


def topology_devices(name: str) -> list[jax.Device]:
    """The chips of a TPU topology ("v5e:1x1", "v5e:4x4") as targets; they need not be here, the package libtpu must. Raises
    ValueError without it, and for a name that its compiler does not know."""
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    if name.startswith("v4:"):  # both cores of a chip as one device
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:
        hint = "with the package libtpu (python -m pip install --no-deps libtpu) v5e:1x1 is one"
        raise ValueError(f"no TPU topology {name!r} to compile for: {str(error).splitlines()[0]}; {hint}") from error
