"""What a run needs on devices that need not be here: its own step, compiled for them, and what is tried where it does
not fit.

    where = target("v5e:4x4")                                    # cpu:8 and gpu are targets too
    job = Job(config, where, "fsdp:16", teachers={"runs/teacher": teacher_config})
    found = plan(job, batch_size=256)                            # found.peak, found.collectives ...
    largest(job, first=256)                                      # the largest batch of a few compiled ones
    for change, found in fixes(job, 256): ...                    # remat, then more fsdp, then a smaller batch

Nothing is run and no weights are made. Memory is the compiler's own answer, FLOPs are counted in the traced step, bytes
and collectives in the compiled program; times are estimates from the makers' peaks (`runtime.chips`).
"""

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import methods, networks, planned, runs, sizes
from diffjax.core import guidance, trees
from diffjax.nn import attention
from diffjax.runtime import chips, traffic, xla
from diffjax.runtime import mesh as meshes
from diffjax.sampling import generate
from diffjax.train import loop
from diffjax.video import memory

COMPILES = 5  # of batches, for the largest that fits
_CLOSE = 0.96  # of the memory in use: near enough to the limit


class Target(NamedTuple):
    """Devices to compile for. limit: bytes that a program may have on one, None where nobody says."""

    topology: str
    platform: str
    devices: list[jax.Device]
    chip: chips.Chip | None
    limit: float | None
    compiler: str


class Job(NamedTuple):
    """A config's training step, or its sampling. layout: axes of the mesh as `train.mesh` has them; teachers: configs
    of run folders that need not be there, see `planned`."""

    config: ConfigDict
    target: Target
    layout: str = ""
    teachers: Mapping[str, ConfigDict] = {}
    is_sample: bool = False


class Plan(NamedTuple):
    """A compiled program on one device of `mesh`, sizes in bytes. peak: None where it does not fit and the compiler
    does not say by how much; what follows it is 0 and empty where it does not fit. state: of its arguments. flops: of
    products on all devices. accessed: read from and written to memory. weights: shapes that tell a collective of
    weights or gradients; whole_weights: of whole ones, which are no device's part of others."""

    batch_size: int
    mesh: dict[str, int]
    parameters: int
    fits: bool
    peak: float | None
    state: int = 0
    work: int = 0
    flops: float = 0.0
    accessed: int = 0
    collectives: tuple[xla.Collective, ...] = ()
    weights: frozenset[tuple[int, ...]] = frozenset()
    whole_weights: frozenset[tuple[int, ...]] = frozenset()
    seconds: float = 0.0


def target(topology: str, limit: float | None = None) -> Target:
    """limit: in place of the chip's own, of which no program has more than there is. Raises ValueError for a topology
    that does not exist, or has no devices here."""
    platform = chips.check(topology)
    chips.set_environment(topology)
    compiler = f"jax {jax.__version__}"
    if platform == "tpu":
        devices = memory.topology_devices(topology)
        compiler += f", libtpu {importlib.metadata.version('libtpu')}"
    else:
        devices = _present(topology, platform)
    chip = chips.chip(topology, devices[0].device_kind)
    most = chip and chip.hbm_bytes
    if platform == "gpu":  # JAX keeps a part of a GPU's memory for others
        most = (devices[0].memory_stats() or {}).get("bytes_limit", most)
    given = [size for size in (limit, most) if size is not None]
    return Target(topology, platform, devices, chip, min(given, default=None), compiler)


def _present(topology: str, platform: str) -> list[jax.Device]:
    """Devices of this machine."""
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(
            f"found no {platform.upper()} on this machine for --topology={topology}: start where one is, or compile "
            "for --topology=v5e:4x4 or cpu:8, which need none"
        ) from error
    number = int(topology.partition(":")[2] or len(devices))
    if len(devices) < number:
        raise ValueError(f"found {len(devices)} {platform.upper()}s on this machine, asked for --topology={topology}")
    return devices[:number]


def mesh_of(job: Job) -> Mesh:
    """Raises ValueError for a layout, or a train.num_devices, of another number of devices."""
    number, wanted = len(job.target.devices), job.config.train.get("num_devices", 0)
    if wanted not in (0, number):
        raise ValueError(
            f"found train.num_devices={wanted} and the {number} devices of {job.target.topology}: add "
            "--config.train.num_devices=0, or let them agree"
        )
    return meshes.make_mesh(devices=job.target.devices, layout=job.layout or job.config.train.get("mesh", ""))


def parts_of_batch(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


# Programs ---------------------------------------------------------------------------------------------------------


def plan(job: Job, batch_size: int) -> Plan:
    """The program with this batch, on all devices together. Raises ValueError as building it does, and for a batch or a
    layout that does not divide."""
    mesh = mesh_of(job)
    if batch_size % parts_of_batch(mesh):
        raise ValueError(f"found a batch of {batch_size} on {parts_of_batch(mesh)} parts of the mesh, expected a multiple")
    with attention.traced_for(job.target.platform):
        traced, params = (_sampling if job.is_sample else _training)(job, mesh, batch_size)
        lowered = traced.lower()
    whole, parts = _weight_shapes(params)
    found = Plan(
        batch_size, dict(mesh.shape), trees.count(params), fits=True, peak=None, weights=whole | parts,
        whole_weights=whole - parts,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = memory.DoesNotFit(str(error)).needed
        return found._replace(fits=False, peak=needed, seconds=time.perf_counter() - start)
    used, limit = memory.read(compiled, job.target.platform, time.perf_counter() - start), job.target.limit
    return found._replace(
        fits=limit is None or used.peak <= limit, peak=used.peak, state=used.arguments, work=used.peak - used.arguments,
        flops=sizes.product_flops(traced.jaxpr), accessed=traffic.accessed(used.text),
        collectives=tuple(xla.collectives(used.text)), seconds=used.seconds,
    )  # fmt: skip


def experiment(job: Job, batch_size: int) -> loop.Experiment:
    """The run's own, with shapes for data, teacher and everything else that is read. Raises ValueError as building
    it."""
    config = ConfigDict(job.config.to_dict())
    config.train.batch_size = batch_size
    if config.method.get("trajectories"):
        raise ValueError("cached trajectories are data, and plans are made without: leave method.trajectories out")
    if config.method.get("name") == "classify":
        raise ValueError("method 'classify' opens its data to hold some out: plans are for networks of pictures")
    with planned.planning(job.teachers):
        return build.experiment(build.resolve(config))


def _training(job: Job, mesh: Mesh, batch_size: int) -> tuple[jax.stages.Traced, Any]:
    """The step of `train.loop`, and the shapes of what it trains."""
    made = experiment(job, batch_size)
    state = loop.abstract_state(made, mesh)
    frozen = _placed(made.frozen, meshes.shardings(made.frozen, mesh))
    batch = _spread(next(made.batches()), mesh)
    return loop.train_step(made, mesh).trace(state, frozen, batch), state.method.params


def _sampling(job: Job, mesh: Mesh, batch_size: int) -> tuple[jax.stages.Traced, Any]:
    """Sampling as the section `sample` says, or as a student was trained, and the shapes of the weights."""
    config = ConfigDict(job.config.to_dict())
    config.train.batch_size = batch_size
    with planned.planning(job.teachers):
        config = build.resolve(config)
        made = methods.METHODS[config.method.name](config)
        if made.plan is None:
            raise ValueError(f"method {config.method.name!r} draws no samples: leave --sample out")
        params = jax.eval_shape(made.init_params)
        if config.method.name == "amed":
            params = {"teacher": made.frozen, "predictor": params}
        cond = {name: leaf for name, leaf in planned.batch(config).items() if name != "image"}
    scale = config.get("sample", {}).get("guidance_scale")
    uncond = guidance.negative if "text" in cond else runs.uncond(made.data.num_classes)
    params = _placed(params, meshes.shardings(params, mesh))
    given = _spread({**cond, "x": jax.ShapeDtypeStruct((batch_size, *made.data.shape), jax.numpy.float32)}, mesh)
    x = given.pop("x")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = generate.trace(made.denoise, params, made.plan, x, given, scale, uncond, made.sampler)
    return traced, params


def _placed(tree: Any, where: Any) -> Any:
    """Shapes, and where the arrays lie."""
    shape = lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)  # noqa: E731
    return jax.tree.map(shape, tree, where)


def _spread(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    where = meshes.batch_sharding(mesh)
    return _placed(dict(batch), dict.fromkeys(batch, where))


def _weight_shapes(params: Any) -> tuple[frozenset, frozenset]:
    """(of whole kernels and tables, of the parts that devices have of them), alone and in a stack, as `_plain` has
    them."""
    whole, parts = set(), set()
    for leaf in jax.tree.leaves(params):
        part = leaf.sharding.shard_shape(leaf.shape)
        for found, shape in ((whole, leaf.shape), (parts, part)):
            found |= {_plain(shape), _plain(shape[1:])} if len(shape) > 2 else {_plain(shape)}
    kernels = lambda found: frozenset(shape for shape in found if len(shape) > 1)  # noqa: E731
    return kernels(whole), kernels(parts)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a transposed array, and one with axes of length 1."""
    return tuple(sorted(size for size in shape if size > 1))


# What a plan says -------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """How often a kind of collective runs, the bytes it leaves on a device, and those of weights and gradients."""

    number: int
    num_bytes: int
    of_weights: int


def moved(found: Plan) -> dict[str, Moved]:
    """Kind -> collectives of a plan."""
    table: dict[str, Moved] = {}
    for one in found.collectives:
        own = one.turns * sum(size for size, shape in one.arrays if _plain(shape) in found.weights)
        number, num_bytes, of_weights = table.get(one.kind, Moved(0, 0, 0))
        table[one.kind] = Moved(number + one.turns, num_bytes + one.num_bytes, of_weights + own)
    return dict(sorted(table.items()))


def reduced_whole(found: Plan) -> int:
    """Bytes of all-reduces of whole kernels: gradients that a layout by fsdp should reduce and scatter."""
    return sum(
        one.turns * size
        for one in found.collectives
        if one.kind == "all-reduce"
        for size, shape in one.arrays
        if _plain(shape) in found.whole_weights
    )


class Estimate(NamedTuple):
    """Seconds of a call at the makers' peaks: products, the device's memory, the links between devices. All at a time
    it is the longest of them; one after the other, their sum."""

    products: float
    memory: float
    links: float


def estimate(found: Plan, chip: chips.Chip) -> Estimate:
    """Not a measurement: no program reaches the peaks."""
    devices = math.prod(found.mesh.values())
    sent = sum(one.sent for one in found.collectives)
    return Estimate(found.flops / devices / chip.flops, found.accessed / chip.hbm, sent / chip.links)


# Searches ---------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """peak: bytes, None where nobody says. fixed: what does not grow with the batch, about."""

    peak: float | None
    fits: bool
    fixed: float = 0.0


def largest(
    job: Job, first: int, known: Plan | None = None, compiles: int = COMPILES
) -> tuple[Plan | None, list[Plan]]:
    """(the plan of the largest batch that was found to fit, all that were compiled), by up to `compiles` compilations
    from a first, whose plan may be known. Raises ValueError where no limit is known."""
    # what the rows of the search are of: parts on devices, and in turn on one
    parts = math.lcm(parts_of_batch(mesh_of(job)), job.config.train.get("microbatches", 0) or 1)
    found = {} if known is None else {known.batch_size // parts: known}

    def measure(rows: int) -> Measured:
        if rows not in found:
            found[rows] = plan(job, rows * parts)
        return Measured(found[rows].peak, found[rows].fits, found[rows].state)

    if job.target.limit is None:
        raise ValueError(f"no limit is known of a device of {job.target.topology}: give --budget=16GiB")
    rows = largest_rows(measure, job.target.limit, max(first // parts, 1), compiles)
    return found.get(rows), list(found.values())


def largest_rows(measure: Callable[[int], Measured], limit: float, first: int, compiles: int = COMPILES) -> int:
    """The largest number of rows, of up to `compiles` that are measured, that fits; 0 for none. Memory is taken to grow
    evenly: each guess is where the line through the two nearest the limit meets it."""
    tried: dict[int, Measured] = {}
    rows = first
    while rows and len(tried) < compiles:
        tried[rows] = found = measure(rows)
        rows = 0 if found.fits and (found.peak or 0) >= _CLOSE * limit else _guess(tried, limit)
    return max((n for n, found in tried.items() if found.fits), default=0)


def _guess(tried: Mapping[int, Measured], limit: float) -> int:
    """The next number to measure, above all that fit and below all that do not; 0 for none."""
    most = max((n for n, found in tried.items() if found.fits), default=0)
    least = min((n for n, found in tried.items() if not found.fits), default=0)
    points = [(n, found.peak) for n, found in tried.items() if found.peak]
    if len(points) == 1:
        points.append((0, tried[points[0][0]].fixed))
    if len(points) > 1:
        (n0, size0), (n1, size1) = sorted(points, key=lambda point: abs(point[1] - limit))[:2]
        slope = (size1 - size0) / (n1 - n0)
        guess = math.floor(n0 + (limit - size0) / slope) if slope > 0 else 2 * most
    else:
        guess = least // 2
    guess = _even(min(guess, 64 * max(tried)))
    if least and guess >= least:
        guess = _even(least - 1)
    return guess if guess > most else 0


def _even(rows: int) -> int:
    """Down to a multiple of 8, of 4 for few, where it is not very few."""
    step = 8 if rows >= 64 else 4 if rows >= 16 else 1
    return rows // step * step


class Change(NamedTuple):
    """What was changed, as flags and their values, and the job with it."""

    flags: Mapping[str, Any]
    job: Job

    @property
    def text(self) -> str:
        """As they are typed."""
        return " ".join(f"{name}={value}" for name, value in self.flags.items())

    def to(self, flag: str, value: Any, **job: Any) -> "Change":
        """With one more."""
        return Change({**self.flags, flag: value}, self.job._replace(**job))


def fixes(job: Job, batch_size: int) -> Iterator[tuple[Change, Plan]]:
    """What may make a step fit, in this order, up to the first that does: less kept for the gradient, more and more of
    the devices on fsdp, and then a smaller batch, the largest that fits. Flags are those of diffjax.cli.train, or of
    diffjax.cli.sample."""
    change = Change({}, job)
    for attempt in (_with_remat, *[_with_fsdp] * len(job.target.devices)):
        following = attempt(change)
        if following is not None:
            change = following
            found = plan(change.job, batch_size)
            yield change, found
            if found.fits:
                return
    found, _ = largest(change.job, batch_size // 2)
    if found is not None:
        yield change.to("--batch_size" if job.is_sample else "--config.train.batch_size", found.batch_size), found


def _with_remat(change: Change) -> Change | None:
    job = change.job
    with planned.planning(job.teachers):
        model = build.resolve(job.config).model
    if job.is_sample or "remat" not in networks.defaults(model.name) or model.get("remat") == "nothing":
        return None
    config = ConfigDict(job.config.to_dict())
    config.model.remat = "nothing"
    return change.to("--config.model.remat", "nothing", config=config)


def _with_fsdp(change: Change) -> Change | None:
    """Twice as many devices on fsdp, as long as data has them."""
    shape = dict(mesh_of(change.job).shape)
    if shape["data"] % 2:
        return None
    shape |= {"data": shape["data"] // 2, "fsdp": 2 * shape["fsdp"]}
    text = ",".join(f"{axis}:{size}" for axis, size in shape.items() if size > 1)
    return change.to("--mesh" if change.job.is_sample else "--config.train.mesh", text, layout=text)
