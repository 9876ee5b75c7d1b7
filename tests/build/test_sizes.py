"""Parameters and operations of published models by block: against torch's counts and the compiler's; the table."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_folders
from ml_collections import ConfigDict

from diffjax.build import networks, sizes
from diffjax.cli import flags, inspect
from diffjax.data.sources import DataShape
from diffjax.nn import stack

SMALL_DIT = {"name": "dit", "width": 64, "depth": 3, "heads": 2}


@pytest.fixture(scope="module")
def model(transformers, tmp_path_factory):
    """(folder, pipeline) of a Stable Diffusion 3 with three text encoders, without its weights."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    pipeline = tiny_folders.stable_diffusion_3(transformers, folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder, pipeline


def compiler_flops(function, *shapes):
    with stack.unrolled():
        return jax.jit(lambda *arguments: function(*arguments)).lower(*shapes).cost_analysis()["flops"]


def test_parameters_are_those_of_the_pipeline(model):
    folder, pipeline = model
    parts = {part.source: sizes.total(part).parameters for part in sizes.model_parts(folder)}
    expected = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in parts}
    # the table of positions is stored with the network and is no parameter of torch's
    expected["transformer"] += pipeline.transformer.pos_embed.pos_embed.numel()
    assert set(parts) == {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"}
    assert parts == expected


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (SMALL_DIT, DataShape(16, 4, 10)),
        ({**SMALL_DIT, "name": "mmdit", "text_width": 48, "pooled_width": 32}, DataShape(16, 4)),
        ({**SMALL_DIT, "name": "pixart", "text_width": 48, "controls": 3, "width": 96}, DataShape(16, 4)),
        ({"name": "unet", "width": 64, "channel_mult": (1,), "num_blocks": 1, "transformer_depth": (2,), "heads": 2,
          "context_width": 48, "pooled_width": 32, "controls": 6}, DataShape(16, 4)),
        ({"name": "ddpmpp", "channels": 32, "channel_mult": (1,), "num_blocks": 1, "attention_sizes": (16,)},
         DataShape(16, 3)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_operations_are_the_compilers(model, data):
    part = sizes.denoiser_part(model, data)
    denoise, init = networks.denoiser(model, data)
    x, sigma = jax.ShapeDtypeStruct((1, *data.shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    given = jax.eval_shape(init, jax.random.key(0)), x, sigma, sizes.conditions(model, data)
    # the compiler counts norms, softmax and activations too, and no products with the zeros around an image
    assert sizes.total(part).flops == pytest.approx(compiler_flops(denoise, *given), rel=0.1)


@pytest.mark.fast
def test_operations_of_each_block_by_hand():
    """DiT of 3 blocks on 64 tokens; a product of (m, k) and (k, n) is 2 m k n."""
    part = sizes.denoiser_part(SMALL_DIT, DataShape(16, 4, 10))
    blocks, tokens, width = {block.name: block for block in part.blocks}, 64, 64
    weights = tokens * 12 * width**2 + 6 * width**2  # of attention and MLP; of the modulation, once an image
    attention = 2 * tokens**2 * width  # scores, and values weighted by them
    assert blocks["blocks"].flops == 3 * 2 * (weights + attention)
    assert blocks["embed"].flops == 2 * tokens * 16 * width
    assert blocks["head"].flops == 2 * (2 * width**2 + tokens * width * 16)
    assert [block.name for block in part.blocks] == ["conditions", "embed", "blocks", "head"]
    assert [block.repeats for block in part.blocks] == [1, 1, 3, 1]
    # of two heads the scores; queries, keys, values, attention twice, hidden and output of the MLP; the modulation
    results = 4 * (2 * tokens**2 + tokens * width * (3 + 2 + 4 + 1) + 6 * width)
    assert blocks["blocks"].result_bytes == 3 * results


def test_the_table_needs_no_weights(model):
    folder, _ = model
    text = "\n".join(inspect.model_lines(folder))
    assert "mmdit (transformer): FLOPs for an image of 8 x 8 x 16 and a text of 154 tokens" in text
    assert "T5's encoder (text_encoder_3): FLOPs for a text of 77 tokens" in text
    assert "autoencoder (vae): FLOPs for an image of 16 x 16 x 3, encoded and decoded" in text
    assert "  blocks (2 equal) " in text and text.count("\n  all ") == 5


def test_every_block_of_a_training_step_counts():
    """Its stack is a loop, whose body the compiler would count once."""

    def flops(depth):
        config = flags.load_config(str(Path(__file__).parents[2] / "configs/quick/edm_digits.py"))
        config.model = ConfigDict({"name": "dit", "width": 64, "depth": depth, "heads": 2})
        return float(re.search(r"training step +(\S+) FLOPs", "\n".join(inspect.config_lines(config)))[1])

    one, two, four = (flops(depth) for depth in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)  # four digits are shown
    assert two - one > 0.3 * one


def test_a_folder_beside_a_run_is_refused(capsys):
    argv = ["inspect", "sd15", "--workdir=runs/a"]
    assert flags.run(inspect.__doc__, inspect.define, inspect.main, argv, inspect.POSITIONAL) == 2
    assert "found the folder sd15 beside --config or --workdir" in capsys.readouterr().err


def test_a_folder_without_a_denoiser(model, tmp_path):
    shutil.copytree(model[0] / "vae", tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match="neither unet/ nor transformer/"):
        sizes.model_parts(tmp_path)
