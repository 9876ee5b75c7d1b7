"""Names of the U-Net's published weights: our two tables against what diffusers makes of a single file."""

import warnings

import jax
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.unet import UNet
from diffjax.nn.functional import abstract
from diffjax.weights import keymap
from diffjax.weights import unet as weights
from diffjax.weights.load import Weights

# the levels of the published networks, narrow; whether projections are matrices; transformers of each level
NETWORKS = {
    "sd_v1": (False, (1, 1, 1, 0), {}),
    "sdxl": (True, (0, 2, 3), dict(pooled_width=8, controls=1)),
}
OTHERS = {"betas": np.zeros(3), "first_stage_model.encoder.conv_in.weight": np.zeros(3)}


@pytest.fixture(scope="module")
def convert(transformers):
    """Single file -> folder, by diffusers."""
    reason = "diffusers is not installed: pip install 'diffjax[test]'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers.loaders.single_file_utils", reason=reason).convert_ldm_unet_checkpoint


def narrow(depths, **options):
    """Drawn parameters of a network with these levels."""
    sizes = dict(image_size=8, channels=4, out_channels=4, width=32, channel_mult=(1,) * len(depths), context_width=8)
    random = np.random.default_rng(0)
    shapes = abstract(lambda rngs: UNet(**sizes, transformer_depth=depths, **options, rngs=rngs))
    return jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), shapes)


def same(some, others):
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in others)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_single_files_are_those_that_diffusers_converts(convert, name):
    linear, depths, options = NETWORKS[name]
    params = narrow(depths, **options)
    table, config = weights.original(depths, 2, linear), {"layers_per_block": 2}
    config |= {"addition_embed_type": "text_time"} if options else {}
    single, folder = keymap.to_weights(table, params), keymap.to_weights(weights.diffusers(linear), params)
    assert weights.keymap_of(single, depths) == table and weights.keymap_of(folder, depths) == weights.diffusers(linear)
    assert same(convert(dict(single), config), folder)
    back = keymap.to_params(table, single | OTHERS, params)
    assert same(trees.flatten(back), trees.flatten(params))
    inner = {key.removeprefix(weights.PREFIX): array for key, array in single.items()}
    assert same(trees.flatten(keymap.to_params(weights.keymap_of(inner, depths), inner, params)), trees.flatten(params))


def test_averages_take_the_place_of_weights(convert):
    single = keymap.to_weights(weights.original((0, 1)), narrow((0, 1)))
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): array + 1 for key, array in single.items()}
    file = Weights(single | averages | OTHERS, "file")
    found = weights.averaged(file)
    assert same({key: found[key] for key in single}, {key: array + 1 for key, array in single.items()})
    config = {"layers_per_block": 2}
    assert same(convert(dict(file), config, extract_ema=True), convert({key: found[key] for key in single}, config))


@pytest.mark.fast
def test_class_tokens_and_the_step_condition_have_their_places():
    params = narrow((0, 1), num_classes=3, step_condition=True, guidance_condition=True)
    table = weights.original((0, 1))
    single = keymap.to_weights(table, params)
    np.testing.assert_array_equal(single["cond_stage_model.embedding.weight"], params["classes"]["embedding"])
    step = {name for name in single if "nfe" in name}
    # Zhou 2024's released names
    assert {weights.PREFIX + name for name in ("nfe_embed.0.weight", "input_blocks.1.0.emb_nfe_layers.1.bias")} < step
    assert len(step) == 2 * (2 + 12)
    assert same(trees.flatten(keymap.to_params(table, single | OTHERS, params)), trees.flatten(params))


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match=r"found names like \['encoder'\]; expected a U-Net's"):
        weights.keymap_of({"encoder": np.zeros(2)}, (1,))
    name = weights.PREFIX + "out.0.weight"
    with pytest.raises(ValueError, match="file has no averages under 'model_ema.'"):
        weights.averaged(Weights({name: np.zeros(2)}, "file"))
    with pytest.raises(ValueError, match="has averages, but none of .*out.2"):
        found = {name: np.zeros(2), weights.PREFIX + "out.2.weight": np.zeros(2)}
        weights.averaged(Weights(found | {"model_ema.diffusion_modelout0weight": np.zeros(2)}, "file"))
