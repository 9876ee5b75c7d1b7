"""What a run needs on devices that need not be here: its own step, compiled for them. See `fitting` for what fits.

    where = target("v5e:4x4")                                    # cpu:8 and gpu are targets too
    job = Job(config, where, "fsdp:16", teachers={"runs/teacher": teacher_config})
    found = plan(job, batch_size=256)                            # found.peak, found.collectives ...

Nothing is run and no weights are made. Memory is the compiler's own answer, FLOPs are counted in the traced step, bytes
and collectives in the compiled program; times are estimates from the makers' peaks (`runtime.chips`).
"""

import importlib.metadata
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import methods, planned, runs, sizes
from diffjax.core import guidance, trees
from diffjax.nn import attention
from diffjax.runtime import checkpoint, chips, traffic, xla
from diffjax.runtime import mesh as meshes
from diffjax.sampling import generate
from diffjax.train import loop
from diffjax.video import memory


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
    does not say by how much; what follows it is 0 and empty where it does not fit. problem: why there is no program, a
    fault of the compiler's own. state: of its arguments. flops: of products on all devices. accessed: read from and written to memory. weights: shapes that tell a collective of
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
    problem: str = ""


class CompilerError(RuntimeError):
    """The compiler failed at a program that is none of its own making: another batch may do."""


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
    layout that does not divide; CompilerError."""
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
            why = checkpoint.short(error)
            raise CompilerError(f"{job.target.compiler} failed at a batch of {batch_size:,}: {why}; try another") from error
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
