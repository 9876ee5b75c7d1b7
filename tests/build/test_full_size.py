"""Networks of published size are built and lowered from their `model` section, with shapes in place of arrays."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.build import networks
from diffjax.core import trees
from diffjax.data.sources import DataShape
from diffjax.models.dit import SIZES
from diffjax.models.mmdit import SIZES as JOINT_SIZES
from diffjax.models.unet import PRESETS

EPS, FLOW = {"precondition": "eps"}, {"precondition": "velocity", "label_scale": 1000.0}
SCALED = {**EPS, "process": "scaled_linear"}


def unet(preset):
    """The `model` section of a published U-Net: shapes are those of the data."""
    data = ("image_size", "channels", "out_channels")
    return {"name": "unet", **SCALED} | {key: value for key, value in PRESETS[preset].items() if key not in data}


def text(tokens, width, **more):
    """Shapes of a text of so many tokens, and of further conditions (pooled=768, control=6)."""
    return {"text": (tokens, width)} | {name: (size,) for name, size in more.items()}


LATENTS, LARGE, CLIP = DataShape(32, 4), DataShape(128, 4), text(77, 768, pooled=768)
# name -> model section, data, shapes of the conditions of a sample, parameters
CASES = {
    "DiT-XL/2": (
        {"name": "dit", **EPS, "learned_variance": True, **SIZES["XL"]}, DataShape(32, 4, 1000), {}, 674_834_720
    ),
    "PixArt-XL/2": (
        {"name": "pixart", **EPS, "learned_variance": True, "controls": 3}, LARGE, text(120, 4096, control=3),
        611_349_152 + 120 * 4096,  # the stored text that stands for none
    ),
    "mmDiT-XL/2-A": ({"name": "mmdit", **FLOW, **JOINT_SIZES["XL/2-A"]}, LATENTS, CLIP, 1_328_851_600),
    "mmDiT-XL/2-B": ({"name": "mmdit", **FLOW, **JOINT_SIZES["XL/2-B"]}, LATENTS, CLIP, 850_745_104),
    "SD3-medium": (
        {"name": "mmdit", **FLOW, **JOINT_SIZES["SD3-medium"]}, DataShape(128, 16), text(154, 4096, pooled=2048),
        2_028_328_000 + 192**2 * 1536,  # its table of positions is stored
    ),
    "SD-1.5": (unet("sd_v1"), DataShape(64, 4), text(77, 768), 859_520_964),
    "SDXL": (unet("sdxl"), LARGE, text(77, 2048, pooled=1280, control=6), 2_567_463_684),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_published_sizes_are_lowered(name):
    """Compute type bfloat16 and blocks computed again, as in training; U-Nets take 4 s of a core, the others 1 or 2."""
    model, data, given, parameters = CASES[name]
    denoise, init = networks.denoiser({**model, "compute_dtype": "bfloat16", "remat": "nothing"}, data)
    params = jax.eval_shape(init, jax.random.key(0))
    cond = {key: jax.ShapeDtypeStruct((2, *shape), jnp.float32) for key, shape in given.items()}
    if data.num_classes:
        cond["label"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, *data.shape), (2,)))
    lowered = jax.jit(denoise).lower(params, x, sigma, cond)
    assert trees.count(params) == parameters
    assert (lowered.out_info.shape, lowered.out_info.dtype) == (x.shape, x.dtype)
    assert "bf16" in lowered.as_text()


@pytest.mark.fast
def test_a_gradient_of_the_largest_transformer_is_lowered():
    model, data, _, _ = CASES["DiT-XL/2"]
    denoise, init = networks.denoiser({**model, "compute_dtype": "bfloat16", "remat": "nothing"}, data)
    params = jax.eval_shape(init, jax.random.key(0))
    x, sigma = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, *data.shape), (2,)))
    gradient = jax.grad(lambda params, x, sigma: jnp.sum(denoise(params, x, sigma) ** 2))
    lowered = jax.jit(gradient).lower(params, x, sigma)
    assert jax.tree.map(lambda leaf: leaf.shape, lowered.out_info) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert "stablehlo.while" in lowered.as_text()  # 28 blocks, one program
