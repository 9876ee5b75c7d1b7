"""CLIP's image encoders against transformers' class, with drawn weights and at the published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.image_encoder import CLIP_VIT_H, CLIP_VIT_L, DEVIATION, MEAN, ClipImage, normalise
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import text as tables

# float32 in another order of sums; the states below have a deviation of about 1
TOLERANCE = 3e-5

TINY = dict(width=32, depth=3, heads=4, hidden=48, patch=4, image_size=12, activation="gelu", projection=20)


def theirs(transformers, preset):
    config = transformers.CLIPVisionConfig(
        hidden_size=preset["width"], num_hidden_layers=preset["depth"], num_attention_heads=preset["heads"],
        intermediate_size=preset.get("hidden", 4 * preset["width"]), patch_size=preset["patch"],
        image_size=preset.get("image_size", 224), hidden_act=preset["activation"], projection_dim=preset["projection"],
    )  # fmt: skip
    config.architectures = ["CLIPVisionModelWithProjection"]
    return config


def image():
    return np.random.default_rng(1).standard_normal((2, 12, 12, 3), np.float32)


def made(**options):
    constructor = lambda rngs: ClipImage(**TINY | options, rngs=rngs)  # noqa: E731
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.2 * random.standard_normal(a.shape, np.float32))  # noqa: E731
    params = jax.tree.map(draw, abstract(constructor))
    return jax.jit(functionalize(constructor)[0], static_argnames="skip"), params


@pytest.mark.fast
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_states_equal_transformers(transformers, drawn, activation):
    import torch

    config = theirs(transformers, TINY | {"activation": activation})
    module = drawn(transformers.CLIPVisionModelWithProjection, config)
    options = tables.clip_image_options(config.to_dict())
    assert options == TINY | {"activation": activation}
    constructor = lambda rngs: ClipImage(**options, rngs=rngs)  # noqa: E731
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    params = keymap.to_params(tables.clip_image(weights), weights, abstract(constructor))
    with torch.no_grad():
        expected = module(torch.from_numpy(image()).permute(0, 3, 1, 2), output_hidden_states=True)
    network = jax.jit(functionalize(constructor)[0], static_argnames="skip")
    for skip in (0, 1):
        found = network(params, image(), skip=skip)
        assert 0.5 < np.std(found.pooled) < 1.5
        np.testing.assert_allclose(found.hidden, expected.hidden_states[-1 - skip].numpy(), atol=TOLERANCE)
        np.testing.assert_allclose(found.pooled, expected.image_embeds.numpy(), atol=TOLERANCE)
    back = keymap.to_weights(tables.CLIP_IMAGE, params)
    assert set(back) == set(weights)
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@pytest.mark.parametrize(("preset", "count"), [(CLIP_VIT_L, 303_966_208), (CLIP_VIT_H, 632_076_800)])
def test_published_sizes(transformers, fits, preset, count):
    import torch

    with torch.device("meta"):
        module = transformers.CLIPVisionModelWithProjection(theirs(transformers, preset))
    ours = abstract(lambda rngs: ClipImage(**preset, rngs=rngs))
    assert trees.count(ours) == sum(tensor.numel() for tensor in module.parameters()) == count
    fits(tables.clip_image(module.state_dict()), module, ours)


def test_open_clip_names():
    """Fused projections, and a last matrix that is not transposed."""
    _, params = made()
    weights = keymap.to_weights(tables.OPEN_CLIP_IMAGE, params)
    outside = {"class_embedding", "positional_embedding", "proj", "conv1.weight"}
    outside |= {f"ln_{name}.{leaf}" for name in ("pre", "post") for leaf in ("weight", "bias")}
    inside = {name.removeprefix("transformer.resblocks.1.") for name in weights if ".1." in name}
    assert {name for name in weights if "resblocks" not in name} == outside
    layers = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj")
    expected = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")}
    assert inside == expected | {"attn.in_proj_weight", "attn.in_proj_bias"}
    np.testing.assert_array_equal(weights["proj"], params["projection"]["kernel"])
    np.testing.assert_array_equal(
        weights["transformer.resblocks.1.attn.in_proj_weight"], params["blocks"]["attention"]["qkv"]["kernel"][1].T
    )
    back = keymap.to_params(tables.clip_image(weights), weights, abstract(lambda rngs: ClipImage(**TINY, rngs=rngs)))
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.fast
def test_normalised_pixels():
    x = jnp.stack([jnp.full((2, 2, 3), -1.0), jnp.full((2, 2, 3), 1.0)])
    found = normalise(x)
    np.testing.assert_allclose(found[0, 0, 0], -np.array(MEAN) / DEVIATION, rtol=1e-6)
    np.testing.assert_allclose(found[1, 1, 1], (1 - np.array(MEAN)) / DEVIATION, rtol=1e-6)


def test_bfloat16_products_and_policies():
    (network, params), (reference, _), (kept, _) = made(dtype=jnp.bfloat16), made(), made(remat="nothing", projection=0)
    found, expected = network(params, image()), reference(params, image())
    assert found.hidden.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % a product, and a dozen layers
    assert 0 < np.abs(found.hidden - expected.hidden).max() < 0.05 * np.abs(expected.hidden).max()
    plain = kept({name: leaf for name, leaf in params.items() if name != "projection"}, image())
    np.testing.assert_allclose(plain.pooled @ params["projection"]["kernel"], expected.pooled, atol=1e-5)


def test_wrong_input_is_refused():
    network, params = made()
    with pytest.raises(ValueError, match=r"expected \(B, 12, 12, 3\): resize them"):
        network(params, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="images of 13 with patches of 4"):
        abstract(lambda rngs: ClipImage(**TINY | {"image_size": 13}, rngs=rngs))
    with pytest.raises(ValueError, match="no weights of a CLIP image encoder"):
        tables.clip_image(["text_model.embeddings.token_embedding.weight"])
