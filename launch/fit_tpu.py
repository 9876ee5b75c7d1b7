"""Whether DiT-XL/2's training step fits the TPUs of a topology: the TPU compiler says, on a machine without them.

The step is method edm's: noise prediction at DDPM's levels, Adam, an average of the weights, classes dropped for one
image in ten, products in bfloat16, blocks computed again for the gradient. Nothing is run and no weights are made; what
fits and what does not is the compiler's own answer. State in float32, laid out in one of three ways:

    replicated  everything on every chip
    optimiser   Adam's moments and the average in parts, the weights on every chip    Rajbhandari 2020, stage 1
    all         the weights in parts too                                              Rajbhandari 2020, stage 3

Batches grow from the first of --images until one does not fit. Run by launch/fit_tpu.sh; writes
runs/fit_tpu/report.{md,json}.
"""

import argparse
import os
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

from diffjax.build import networks
from diffjax.core import trees
from diffjax.data.sources import DataShape
from diffjax.methods import edm
from diffjax.runtime import report
from diffjax.train import ema, optim, step
from diffjax.train import state as train_state

AXIS = "fsdp"
LAYOUTS = ("replicated", "optimiser", "all")
LATENTS = DataShape(32, 4, 1000)  # of 256 x 256 pixels, with ImageNet's classes
GIB = 2**30


def training(batch_size: int, learned_variance: bool) -> tuple[Callable, Callable[[], train_state.TrainState]]:
    """(step, init) of DiT-XL/2, whose sizes are the network's defaults."""
    model = {"name": "dit", "precondition": "eps", "compute_dtype": "bfloat16", "remat": "nothing"}
    model["learned_variance"] = learned_variance
    denoise, init = networks.denoiser(model, LATENTS)
    settings = edm.Settings("discrete", weighting="eps", label_dropout=0.1, num_classes=LATENTS.num_classes)
    variance = networks.variance_denoiser(model, LATENTS)
    method = edm.make(settings, denoise, optim.make_optimizer("adam"), lambda i: jnp.float32(1e-4), variance=variance)
    decay = ema.make_decay(batch_size, halflife_images=500_000)
    fresh = lambda: train_state.create(method, init(jax.random.key(0)), 0, averaged=True)  # noqa: E731
    return step.make_train_step(method, decay), fresh


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


def compile_step(mesh: Mesh, layout: str, images: int, learned_variance: bool) -> dict[str, Any]:
    """The row of a layout with `images` a chip: bytes of a chip, or what the compiler says where it does not fit."""
    batch_size = images * mesh.size
    train_step, init = training(batch_size, learned_variance)
    state = layout_of(layout, mesh, jax.eval_shape(init))
    spread = NamedSharding(mesh, PartitionSpec(AXIS))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, *LATENTS.shape), jnp.float32, sharding=spread),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=spread),
    }
    outputs = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())
    lowered = jax.jit(train_step, donate_argnums=0, out_shardings=outputs).lower(state, {}, batch)
    row = {"layout": layout, "learned_variance": learned_variance, "images_per_chip": images, "batch": batch_size}
    start = time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "compiler": str(error).splitlines()[0][:160]}
    return row | {
        "fits": True,
        "peak_GiB": memory.peak_memory_in_bytes / GIB,
        "state_GiB": memory.argument_size_in_bytes / GIB,
        "work_GiB": memory.temp_size_in_bytes / GIB,
        "seconds_to_compile": time.perf_counter() - start,
    }


def rows_of(mesh: Mesh, layout: str, images: list[int], learned_variance: bool) -> list[dict[str, Any]]:
    """Rows of growing batches up to the first that does not fit."""
    rows = []
    for number in sorted(images):
        rows.append(compile_step(mesh, layout, number, learned_variance))
        row, variance = rows[-1], "on" if learned_variance else "off"
        head = f"{layout:>10}, {number:4d} images a chip, learned variance {variance}:"
        if not row["fits"]:
            print(f"{head} does not fit. {row['compiler']}", flush=True)
            break
        print(
            f"{head} fits, peak {row['peak_GiB']:.2f} GiB a chip ({row['state_GiB']:.2f} state and batch, "
            f"{row['work_GiB']:.2f} work), compiled in {row['seconds_to_compile']:.0f} s", flush=True,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="of chips, as JAX names it")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--images", nargs="+", type=int, default=[32, 128, 256], help="for a chip")
    parser.add_argument("--learned_variance", action="store_true", help="by the hybrid loss")
    parser.add_argument("--out", default="runs/fit_tpu")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.exit(2, "error: the TPU compiler is not installed: type python -m pip install --no-deps libtpu\n")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
    compiler = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    _, init = training(mesh.size, arguments.learned_variance)
    count = trees.count(jax.eval_shape(init).method.params)
    print(f"DiT-XL/2, {count:,} parameters, for {len(devices)} chips of {arguments.topology}; {compiler}")
    options = arguments.images, arguments.learned_variance
    rows = [row for name in arguments.layouts for row in rows_of(mesh, name, *options)]
    text = (
        f"{count:,} parameters, {arguments.topology}, {compiler}. Bytes of one chip as the TPU compiler plans them; "
        "the step was not run. A batch that does not fit ends its layout.\n\n<!-- table: fit -->\n\n"
        "Again: `bash launch/fit_tpu.sh`"
    )
    path = report.write_report(arguments.out, "Memory of a training step", [("DiT-XL/2", text)], {"fit": rows})
    print(f"report: {path}")


if __name__ == "__main__":
    main()
