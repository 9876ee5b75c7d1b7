"""DINOv2 against transformers' class with drawn weights, its positions against torch's interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.dinov2 import DEVIATION, DINOV2_L, MEAN, Dinov2, cubic, normalise
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import dinov2 as tables
from diffjax.weights import keymap

# float32 in another order of sums; the tokens below have a deviation of about 1
TOLERANCE = 3e-5

TINY = dict(width=32, depth=3, heads=4, hidden=128, patch=4, trained_size=28)
FULL = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)


def theirs(transformers, **options):
    return transformers.Dinov2Config(**options)


@pytest.fixture(scope="module")
def tiny(transformers, drawn):
    config = theirs(
        transformers, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=4
    )
    return drawn(transformers.Dinov2Model, config)


def arrays(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def image(size):
    return np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)


@pytest.mark.fast
@pytest.mark.parametrize("size", [28, 16])
def test_tokens_equal_transformers(tiny, size):
    """Of the size of training, and of a smaller one, which transformers reads without an offset."""
    import torch

    weights = arrays(tiny)
    options = tables.options(tiny.config.to_dict())
    assert options == TINY
    constructor = lambda rngs: Dinov2(**options, image_size=size, offset=0.0, rngs=rngs)  # noqa: E731
    params = keymap.to_params(tables.table(weights), weights, abstract(constructor))
    with torch.no_grad():
        expected = tiny(torch.from_numpy(image(size)).permute(0, 3, 1, 2))
    found = jax.jit(functionalize(constructor)[0])(params, image(size))
    assert 0.5 < np.std(found.tokens) < 1.5
    np.testing.assert_allclose(found.tokens, expected.last_hidden_state.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found.pooled, expected.pooler_output.numpy(), atol=TOLERANCE)


@pytest.mark.fast
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_equal_torch(transformers, offset):
    """As the authors' code calls it: with an offset by scale, without one by size. 37 places for 16."""
    import torch

    table = np.random.default_rng(0).standard_normal((1, 8, 37, 37), np.float32)
    size = dict(scale_factor=((16 + offset) / 37,) * 2) if offset else dict(size=(16, 16))
    expected = torch.nn.functional.interpolate(torch.from_numpy(table), mode="bicubic", **size).numpy()
    weights = cubic(37, 16, offset)
    found = np.einsum("ia,jb,ncab->ncij", weights, weights, table)
    # torch has places in float32: 2e-6 of a place at 37, between numbers that differ by up to 6
    np.testing.assert_allclose(found, expected, atol=5e-5)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert np.abs(found - np.einsum("ia,jb,ncab->ncij", *[cubic(37, 16, 0.1 - offset)] * 2, table)).max() > 0.1


def test_published_size(transformers, fits):
    import torch

    config = theirs(transformers, **FULL)
    with torch.device("meta"):
        module = transformers.Dinov2Model(config)
    ours = abstract(lambda rngs: Dinov2(**DINOV2_L, rngs=rngs))
    count = sum(tensor.numel() for tensor in module.parameters())
    # a token for masked patches is theirs alone
    assert trees.count(ours) == count - 1024 == 304_367_616
    assert DINOV2_L.items() <= tables.options(config.to_dict()).items()
    fits(tables.table(module.state_dict()), module, ours)


def test_names_of_published_files(tiny):
    """The authors' have queries, keys and values in one matrix, transformers' before version 5 other names."""
    expected = abstract(lambda rngs: Dinov2(**TINY, image_size=28, rngs=rngs))
    params = keymap.to_params(tables.TRANSFORMERS_5, arrays(tiny), expected)
    original = keymap.to_weights(tables.ORIGINAL, params)
    outside = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    assert {name for name in original if "blocks" not in name} == outside
    inside = {name.removeprefix("blocks.1.") for name in original if ".1." in name}
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert inside == {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")} | {"ls1.gamma", "ls2.gamma"}
    before = keymap.to_weights(tables.TRANSFORMERS, params)
    layer = "encoder.layer.2.attention."
    assert {f"{layer}attention.key.bias", f"{layer}output.dense.weight"} < set(before)
    unused = np.zeros((1, 32))
    for weights in (original | {"mask_token": unused}, before | {"embeddings.mask_token": unused}):
        jax.tree.map(np.testing.assert_array_equal, keymap.to_params(tables.table(weights), weights, expected), params)


@pytest.mark.fast
def test_normalised_pixels():
    x = jnp.stack([jnp.full((2, 2, 3), -1.0), jnp.full((2, 2, 3), 1.0)])
    found = normalise(x)
    np.testing.assert_allclose(found[0, 0, 0], -np.array(MEAN) / DEVIATION, rtol=1e-6)
    np.testing.assert_allclose(found[1, 1, 1], (1 - np.array(MEAN)) / DEVIATION, rtol=1e-6)
    np.testing.assert_array_equal(normalise(x[None]), found[None])


def test_wrong_input_is_refused():
    constructor = lambda rngs: Dinov2(**TINY, image_size=16, rngs=rngs)  # noqa: E731
    network, params = functionalize(constructor)[0], abstract(constructor)
    with pytest.raises(ValueError, match=r"expected \(B, 16, 16, 3\): resize them"):
        jax.eval_shape(network, params, jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32))
    with pytest.raises(ValueError, match="images of 15 and 28 with patches of 4"):
        abstract(lambda rngs: Dinov2(**TINY, image_size=15, rngs=rngs))
    with pytest.raises(ValueError, match="no weights of a DINOv2"):
        tables.table(["text_model.embeddings.token_embedding.weight"])
    with pytest.raises(ValueError, match="found use_swiglu_ffn=True"):
        tables.options({"use_swiglu_ffn": True})
    with pytest.raises(ValueError, match="found model_type=clip"):
        tables.options({"model_type": "clip"})
