"""Whether a latent network's training step fits the TPUs of a topology, by the TPU compiler on a machine without them.

The step is method edm's, with Adam and an average of the weights, products in bfloat16 and blocks computed again for
the gradient: of DiT-XL/2 as it was published, or of any recipe in configs/conditioning/imagenet.py. Nothing is run and
no weights are made; what fits and what does not is the compiler's own answer. State in float32, laid out in one of
four ways:

    replicated  everything on every chip
    optimiser   Adam's moments and the average in parts, the weights on every chip    Rajbhandari 2020, stage 1
    gathered    the weights in parts too, and put together before they are used       Rajbhandari 2020, stage 3
    all         the same without the last: the partitioner may move activations in their stead

Batches grow from the first of --images until one does not fit. Of each that fits also: FLOPs of the step as it was
traced, blocks that are computed again among them, and the collectives that the partitioner chose. Run by
launch/fit_tpu.sh; writes runs/fit_tpu/report.{md,json}.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# read when JAX is imported: the compiler asks no server what this machine is, and two of them may run at a time
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import networks
from diffjax.cli import flags
from diffjax.core import trees
from diffjax.data.latents import METADATA
from diffjax.methods import edm
from diffjax.nn import attention, stack
from diffjax.runtime import report, xla
from diffjax.train import ema, optim, step
from diffjax.train import state as train_state

AXIS = "fsdp"
LAYOUTS = ("replicated", "optimiser", "gathered", "all")
PUBLISHED, RECIPES = "dit", "configs/conditioning/imagenet.py"
GIB = 2**30

attention.MAX_SCORES_CPU = attention.MAX_SCORES  # this host is a CPU, the program is not for one


def config_of(model: str, learned_variance: bool) -> ConfigDict:
    """Sections data, model and method: of DiT-XL/2, whose sizes are the network's defaults, or of a recipe. Raises
    ValueError for a recipe that does not exist."""
    if model == PUBLISHED:
        config = ConfigDict({"data": {"image_size": 32, "channels": 4, "num_classes": 1000}})
        config.model = {"name": "dit", "precondition": "eps", "compute_dtype": "bfloat16", "remat": "nothing"}
        config.method = {"name": "edm", "distribution": "discrete", "weighting": "eps", "label_dropout": 0.1}
    else:
        config = build.resolve(flags.load_config(f"{RECIPES}:{model}"))
    config.model.learned_variance = learned_variance
    return config


def training(
    config: ConfigDict, batch_size: int, gather: NamedSharding | None = None
) -> tuple[Callable, Any, dict[str, jax.ShapeDtypeStruct]]:
    """The step, and the shapes of its state and of a batch. gather: where the weights are put before they are used."""
    shape = networks.data_shape(config.data)
    denoise, init = networks.denoiser(config.model, shape)

    def used(network: Callable) -> Callable:
        if gather is None:
            return network
        return lambda params, *args: network(jax.lax.with_sharding_constraint(params, gather), *args)

    options = {key: value for key, value in config.method.items() if key not in ("name", "start", "mask_ratio")}
    variance = networks.variance_denoiser(config.model, shape)
    masked = networks.masked_denoisers(config.model, shape, config.method.get("mask_ratio", 0.0), 1)
    method = edm.make(
        edm.Settings(**options, num_classes=shape.num_classes), used(denoise), optim.make_optimizer("adam"),
        lambda i: jnp.float32(1e-4), variance=variance and used(variance), masked=[used(network) for network in masked],
    )  # fmt: skip
    fresh = lambda: train_state.create(method, init(jax.random.key(0)), 0, averaged=True)  # noqa: E731
    told = METADATA if config.model.get("metadata") else ()
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *shape.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        **{name: jax.ShapeDtypeStruct((batch_size,), jnp.float32) for name in told},
    }
    train_step = step.make_train_step(method, ema.make_decay(batch_size, halflife_images=500_000))
    return train_step, jax.eval_shape(fresh), batch


def flops(config: ConfigDict, batch_size: int) -> float:
    """Of a step on all chips together, every block counted."""
    with stack.unrolled():
        train_step, state, batch = training(config, batch_size)
        return jax.jit(train_step).lower(state, {}, batch).cost_analysis()["flops"]


def layout_of(name: str, mesh: Mesh, state: Any) -> Any:
    """The state's shapes with where their parts lie: an array in parts is cut along its longest axis that divides."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_weight = jax.tree_util.keystr(path).startswith(".method.params")
        axes: list[str | None] = [None] * leaf.ndim
        fits = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if fits and not (name == "replicated" or (name == "optimiser" and is_weight)):
            axes[max(fits, key=lambda axis: leaf.shape[axis])] = AXIS
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(place, state)


def compile_step(mesh: Mesh, config: ConfigDict, layout: str, images: int) -> tuple[dict[str, Any], str]:
    """The row of a layout with `images` a chip, and the compiled program: bytes of a chip and FLOPs of all, or what the
    compiler says where it does not fit, and ""."""
    batch_size, whole = images * mesh.size, NamedSharding(mesh, PartitionSpec())
    train_step, state, batch = training(config, batch_size, whole if layout == "gathered" else None)
    state, spread = layout_of(layout, mesh, state), NamedSharding(mesh, PartitionSpec(AXIS))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for name, x in batch.items()}
    outputs = jax.tree.map(lambda leaf: leaf.sharding, state), whole
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # of which `nn.attention` takes the number of devices
        lowered = jax.jit(train_step, donate_argnums=0, out_shardings=outputs).lower(state, {}, batch)
    row = {"layout": layout, "images_per_chip": images, "batch": batch_size}
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "compiler": str(error).splitlines()[0][:160]}, ""
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    return row | {
        "fits": True,
        "peak_GiB": memory.peak_memory_in_bytes / GIB,
        "state_GiB": memory.argument_size_in_bytes / GIB,
        "work_GiB": memory.temp_size_in_bytes / GIB,
        "TFLOPs_of_a_step": flops(config, batch_size) / 1e12,
        "seconds_to_compile": seconds,
    }, compiled.as_text()


def rows_of(mesh: Mesh, config: ConfigDict, layout: str, images: list[int]) -> tuple[list[dict], list[dict]]:
    """Rows of growing batches up to the first that does not fit, and of the collectives of each."""
    rows, moved = [], []
    for number in sorted(images):
        row, program = compile_step(mesh, config, layout, number)
        rows.append(row)
        head = f"{layout:>10}, {number:4d} images a chip:"
        if not row["fits"]:
            print(f"{head} does not fit. {row['compiler']}", flush=True)
            break
        print(
            f"{head} fits, peak {row['peak_GiB']:.2f} GiB a chip ({row['state_GiB']:.2f} state and batch, "
            f"{row['work_GiB']:.2f} work), {row['TFLOPs_of_a_step']:,.1f} TFLOPs a step of {row['batch']:,} images, "
            f"compiled in {row['seconds_to_compile']:.0f} s", flush=True,
        )  # fmt: skip
        for kind, found in xla.collectives(program).items():
            moved.append({"layout": layout, "images_per_chip": number, "kind": kind, "number": found.number})
            moved[-1]["GiB"] = found.num_bytes / GIB
            print(f"{'':12}{found.number:6d} x {kind}, {found.num_bytes / GIB:.2f} GiB a chip", flush=True)
    return rows, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PUBLISHED, help=f"dit, as published, or a variant of {RECIPES}")
    parser.add_argument("--topology", default="v5e:4x4", help="of chips, as JAX names it")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--images", nargs="+", type=int, default=[32, 128, 256], help="for a chip")
    parser.add_argument("--learned_variance", action="store_true", help="by the hybrid loss")
    parser.add_argument("--out", default="runs/fit_tpu")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.exit(2, "error: the TPU compiler is not installed: type python -m pip install --no-deps libtpu\n")
    try:
        config = config_of(arguments.model, arguments.learned_variance)
    except ValueError as error:
        parser.exit(2, f"error: --model: {error}\n")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    compiler = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    count = trees.count(training(config, mesh.size)[1].method.params)
    what = arguments.model + (" with learned variance" if arguments.learned_variance else "")
    print(f"{what}, {count:,} parameters, for {len(devices)} chips of {arguments.topology}; {compiler}", flush=True)
    tables: dict[str, list[dict]] = {"fit": [], "collectives": []}
    for layout in arguments.layouts:
        for table, rows in zip(tables.values(), rows_of(mesh, config, layout, arguments.images), strict=True):
            table.extend(rows)
    text = (
        f"{count:,} parameters, {arguments.topology}, {compiler}. Bytes of one chip as the TPU compiler plans them, "
        "FLOPs of all chips; the step was not run. A batch that does not fit ends its layout.\n\n"
        "<!-- table: fit -->\n\n"
        "Collectives of a step, bytes of what they leave on one chip.\n\n<!-- table: collectives -->\n\n"
        f"Again: `bash launch/fit_tpu.sh {' '.join(sys.argv[1:])}`"
    )
    path = report.write_report(arguments.out, "Memory of a training step", [(what, text)], tables)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
