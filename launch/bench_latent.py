"""Speed of latent-diffusion networks beside the same classes of diffusers in eager PyTorch; compile time of scans.

Both sides hold the same random weights, in one process, on as many threads, and are first shown to agree. Then each
measures one call in turn, so that a busy machine slows both; the ratio is the median of the ratios of neighbouring
turns. A train step is the mean square of the output as loss, its gradients, and AdamW. Run by launch/bench.sh; writes
runs/bench_latent/report.{md,json}.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from diffjax.core import trees
from diffjax.models.dit import SIZES, DiT
from diffjax.models.unet import UNet
from diffjax.models.vae import AutoencoderKL
from diffjax.nn import embeddings, stack
from diffjax.nn.functional import functionalize
from diffjax.runtime import report
from diffjax.weights import dit as dit_weights
from diffjax.weights import keymap
from diffjax.weights import unet as unet_weights
from diffjax.weights import vae as vae_weights

LEARNING_RATE = 1e-4
TOLERANCE = 1e-3  # relative; float32 through tens of layers differs by about 1e-5
# PyTorch 2.13's float32 gradients of convolutions are rough on CPUs with bfloat16 instructions: the U-Net's norm is off by
# 4e-3 there, and ours to 1e-6, from what PyTorch gets in float64
GRADIENT_TOLERANCE = 1e-2


class Case(NamedTuple):
    """The same computation twice: `network(params, *inputs)` (B, H, W, C), and `output()` of `peer` (B, C, H, W)."""

    network: Callable[..., jax.Array]
    params: dict
    inputs: tuple
    peer: torch.nn.Module
    output: Callable[[], torch.Tensor]
    passes: tuple[str, ...] = ("forward", "train")


def dit(batch: int) -> Case:
    """Four blocks of DiT-S/2. Of diffusers' class, the embedders that it has in every block are one, as DiT's are."""
    size, classes, width, depth, heads = 32, 10, 384, 4, 6
    network, init = functionalize(lambda rngs: DiT(size, 4, 8, classes, 2, width, depth, heads, rngs=rngs))
    params = random_params(init)
    positions = embeddings.grid(np.arange(size // 2), np.arange(size // 2), width)
    options = dict(num_attention_heads=heads, attention_head_dim=width // heads, out_channels=8, num_layers=depth)
    peer = _diffusers().DiTTransformer2DModel(**options, sample_size=size, num_embeds_ada_norm=classes, norm_eps=1e-6)
    _load(peer, dit_weights.to_weights(params, "diffusers", positions))
    for block in peer.transformer_blocks:
        block.norm1.emb = peer.transformer_blocks[0].norm1.emb
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, label = _normal(batch, size, size, 4), np.linspace(0, 999, batch, dtype=np.int64), np.arange(batch) % classes
    given = _nchw(x), torch.from_numpy(t), torch.from_numpy(label)
    inputs = x, t.astype(np.float32), {"label": label.astype(np.int32)}
    return Case(network, params, inputs, peer, lambda: peer(*given).sample)


def unet(batch: int, size: int) -> Case:
    """Stable Diffusion 1's at 0.3 of its width, 96 channels: groups of 32 do not divide a quarter."""
    width, mults = 96, (1, 2, 4, 4)
    network, init = functionalize(lambda rngs: UNet(size, 4, 4, width, mults, heads=8, context_width=768, rngs=rngs))
    params = random_params(init)
    peer = _diffusers().UNet2DConditionModel(
        block_out_channels=[width * mult for mult in mults], attention_head_dim=8, cross_attention_dim=768
    )
    _load(peer, keymap.to_weights(unet_weights.diffusers(), params))
    x, t, text = _normal(batch, size, size, 4), np.linspace(1, 999, batch, dtype=np.float32), _normal(batch, 77, 768)
    given = _nchw(x), torch.from_numpy(t), torch.from_numpy(text)
    return Case(network, params, (x, t, {"text": text}), peer, lambda: peer(*given).sample)


def decoder(batch: int, size: int) -> Case:
    """Stable Diffusion's at full width."""
    network, init = functionalize(lambda rngs: AutoencoderKL(scale=1.0, rngs=rngs), "decode")
    params = random_params(init)
    width = [128, 256, 512, 512]
    peer = _diffusers().AutoencoderKL(
        latent_channels=4, layers_per_block=2, block_out_channels=width,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    _load(peer, keymap.to_weights(vae_weights.diffusers(4), params))
    z = _normal(batch, size // 8, size // 8, 4)
    given = _nchw(z)
    return Case(network, params, (z,), peer, lambda: peer.decode(given).sample, ("forward",))


CASES: Mapping[str, tuple[str, Callable[[], Case]]] = {
    "dit": ("DiT, 4 blocks of S/2, 32x32, batch 4", lambda: dit(4)),
    "unet32": ("SD v1 U-Net, 96 channels, 32x32, batch 2", lambda: unet(2, 32)),
    "unet64": ("SD v1 U-Net, 96 channels, 64x64, batch 1", lambda: unet(1, 64)),
    "vae": ("SD's decoder to 128x128, batch 1", lambda: decoder(1, 128)),
}


def _diffusers() -> Any:
    # transformers, which it imports, would take it: not needed here, and a build for CUDA beside torch for CPUs fails
    sys.modules.setdefault("torchvision", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    return diffusers


def random_params(init: Callable) -> dict:
    """Weights that make every layer matter, products of unit variance; scales about one."""
    random = np.random.default_rng(0)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        values = random.standard_normal(shape.shape)
        fan_in = np.prod(shape.shape[-4:-1] if len(shape.shape) > 3 else shape.shape[-2:-1])
        values = values / np.sqrt(fan_in) if name == "kernel" else 0.1 * values + (name == "scale")
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _nchw(x_BHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x_BHWC, -1, 1)))


def _load(module: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})  # strict
    module.eval()  # no classes dropped; gradients are made all the same


def objective(case: Case, params: dict) -> jax.Array:
    return jnp.mean(jnp.square(case.network(params, *case.inputs)))


def agree(case: Case) -> float:
    """Largest relative difference of output and loss; raises where it, or that of the gradient's norm, is no rounding."""
    output = np.asarray(jax.jit(case.network)(case.params, *case.inputs))
    if "train" in case.passes:
        theirs = case.output()
        loss = theirs.square().mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in case.peer.parameters() if p.grad is not None]).norm()
        found, grads = jax.jit(jax.value_and_grad(lambda params: objective(case, params)))(case.params)
        pairs = [(found, loss.item())]
        if not (off := abs(float(optax.global_norm(grads)) / gradient.item() - 1)) < GRADIENT_TOLERANCE:
            raise RuntimeError(f"norms of the gradients differ by {off:.1e}, expected less than {GRADIENT_TOLERANCE}")
    else:
        with torch.no_grad():
            theirs, pairs = case.output(), []
    expected = np.moveaxis(theirs.detach().numpy(), 1, -1)
    worst = max([np.abs(output - expected).max() / np.abs(expected).max(), *(abs(float(a) / b - 1) for a, b in pairs)])
    if not worst < TOLERANCE:
        raise RuntimeError(f"the sides differ by {worst:.1e}, expected less than {TOLERANCE}: not the same network")
    return float(worst)


def ours(case: Case, what: str) -> Callable[[], None]:
    """One call, which returns when its result is there."""
    inputs = jax.tree.map(jnp.asarray, case.inputs)
    params = jax.tree.map(jnp.array, case.params)
    if what == "forward":
        forward = jax.jit(case.network)
        return lambda: jax.block_until_ready(forward(params, *inputs))
    optimizer = optax.adamw(LEARNING_RATE)

    def step(params: dict, state: Any, inputs: tuple) -> tuple[dict, Any]:
        grads = jax.grad(lambda params: objective(case._replace(inputs=inputs), params))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled, held = jax.jit(step, donate_argnums=(0, 1)), [params, jax.jit(optimizer.init)(params)]

    def one() -> None:
        held[:] = compiled(*held, inputs)
        jax.block_until_ready(held)

    return one


def theirs(case: Case, what: str) -> Callable[[], None]:
    """The same of `ours`, with PyTorch's fused update."""
    if what == "forward":
        return torch.no_grad()(case.output)
    optimizer = torch.optim.AdamW(case.peer.parameters(), lr=LEARNING_RATE, weight_decay=1e-4, fused=True)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        case.output().square().mean().backward()
        optimizer.step()

    return one


def compare(name: str, turns: int, seconds: float) -> list[dict]:
    """Rows of one case: forward pass and train step."""
    label, make = CASES[name]
    case, rows = make(), []
    difference = agree(case)
    for what in case.passes:
        sides = {"torch": theirs(case, what), "jax": ours(case, what)}
        found = {side: [] for side in sides}
        for one in sides.values():
            one()  # compiles
        count = max(1, round(seconds / sum(_time(one) for one in sides.values())))
        for _ in range(turns):
            for side, one in sides.items():
                found[side].append(min(_time(one) for _ in range(count)))
        ratio = statistics.median(a / b for a, b in zip(found["torch"], found["jax"], strict=True))
        rows.append({
            "network": label, "parameters": trees.count(case.params), "what": what,
            "jax_ms": 1e3 * statistics.median(found["jax"]), "torch_ms": 1e3 * statistics.median(found["torch"]),
            "torch_over_jax": ratio, "of_minima": min(found["torch"]) / min(found["jax"]), "turns": turns,
            "calls_a_turn": count, "relative_difference": difference,
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{label}, {what}: diffjax {row['jax_ms']:.1f} ms, PyTorch {row['torch_ms']:.1f} ms, ratio {ratio:.2f}, "
            f"of minima {row['of_minima']:.2f}", flush=True,
        )  # fmt: skip
    return rows


def _time(one: Callable[[], None]) -> float:
    start = time.perf_counter()
    one()
    return time.perf_counter() - start


def compilation() -> list[dict]:
    """Seconds to trace and compile DiT-XL/2's forward pass, blocks scanned and unrolled; nothing is computed."""
    rows = []
    for blocks in ("scanned", "unrolled"):
        network, init = functionalize(lambda rngs: DiT(32, 4, 8, 1000, **SIZES["XL"], rngs=rngs))
        shapes = jax.eval_shape(init, jax.random.key(0))
        x, t, label = (jax.ShapeDtypeStruct(*given) for given in (((1, 32, 32, 4), "f4"), ((1,), "f4"), ((1,), "i4")))
        compiled = lambda: jax.jit(network).lower(shapes, x, t, {"label": label}).compile()  # noqa: B023, E731
        if blocks == "unrolled":
            with stack.unrolled():
                seconds = _time(compiled)
        else:
            seconds = _time(compiled)
        rows.append({"blocks": blocks, "seconds": seconds, "of_unrolled": None})
        print(f"DiT-XL/2, blocks {blocks}: {seconds:.1f} s to trace and compile", flush=True)
    for row in rows:
        row["of_unrolled"] = row["seconds"] / rows[-1]["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, "compile"], default=[*CASES, "compile"])
    parser.add_argument("--turns", type=int, default=9, help="alternations of the two sides")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one turn of both")
    parser.add_argument("--out", default="runs/bench_latent")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here is measured
    names = [name for name in arguments.cases if name in CASES]
    rows = [row for name in names for row in compare(name, arguments.turns, arguments.seconds)]
    tables = {"speed": rows}
    if "compile" in arguments.cases:
        tables["compilation"] = compilation()
    text = (
        f"float32, no dropout, {threads} threads, eager PyTorch {torch.__version__} with diffusers' class and the "
        "same weights; the sides take turns. Train: mean square of the output, gradients, AdamW (PyTorch's fused one). "
        "`torch_over_jax` is the median over turns of PyTorch's time over ours (above 1: we are faster), a turn's time "
        "the least of its calls.\n\n<!-- table: speed -->\n\nAgain: `bash launch/bench.sh latent`"
    )
    path = report.write_report(arguments.out, "Speed of latent diffusion", [("Beside PyTorch", text)], tables)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
