"""T5's encoder against transformers' class, with drawn weights and at the published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.t5 import T5, T5_BASE, T5_SMALL, T5_XXL, bucket
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import text as tables

# float32 in another order of sums; the states below have a deviation of about 1
TOLERANCE = 3e-5

TINY = dict(width=24, depth=2, heads=3, hidden=40, head_size=16, vocabulary=30, buckets=8, max_distance=12)


def theirs(transformers, preset):
    return transformers.T5Config(
        d_model=preset["width"], num_layers=preset["depth"], num_heads=preset["heads"], d_ff=preset["hidden"],
        d_kv=preset.get("head_size", 64), vocab_size=preset.get("vocabulary", 32128), feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=preset.get("buckets", 32),
        relative_attention_max_distance=preset.get("max_distance", 128),
    )  # fmt: skip


def inputs(length=20):
    random = np.random.default_rng(1)
    mask = np.arange(length) < np.array([[length], [7], [1]])
    return np.where(mask, random.integers(1, 30, (3, length)), 0).astype(np.int32), mask


def made(**options):
    constructor = lambda rngs: T5(**TINY | options, rngs=rngs)  # noqa: E731
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.3 * random.standard_normal(a.shape, np.float32))  # noqa: E731
    params = jax.tree.map(draw, abstract(constructor))
    return jax.jit(functionalize(constructor)[0]), params


@pytest.mark.fast
def test_states_equal_transformers(transformers, drawn):
    import torch

    config = theirs(transformers, TINY)
    module = drawn(transformers.T5EncoderModel, config)
    options = tables.t5_options(config.to_dict())
    assert options == TINY
    constructor = lambda rngs: T5(**options, rngs=rngs)  # noqa: E731
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    assert "encoder.embed_tokens.weight" in weights  # the table of tokens twice
    params = keymap.to_params(tables.T5, weights, abstract(constructor))
    network = jax.jit(functionalize(constructor)[0])
    ids, mask = inputs()
    for given in (None, mask):
        with torch.no_grad():
            expected = module(torch.from_numpy(ids).long(), None if given is None else torch.from_numpy(mask).long())
        found = network(params, ids, given)
        assert 0.5 < np.std(found) < 1.5
        np.testing.assert_allclose(found, expected.last_hidden_state.numpy(), atol=TOLERANCE)
    back = keymap.to_weights(tables.T5, params)
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert set(weights) - set(back) == {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (16, 100), (4, 20)])
def test_buckets_equal_transformers(transformers, buckets, max_distance):
    """At whole powers of the ratio, where the logarithm is rounded, too."""
    import torch
    from transformers.models.t5 import modeling_t5

    relative = np.arange(-700, 701)
    expected = modeling_t5.T5Attention._relative_position_bucket(
        torch.from_numpy(relative), True, num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(bucket(relative, buckets, max_distance), expected.numpy())


@pytest.mark.fast
def test_buckets_by_hand():
    """Rows 0..7 for a distance each; then from 8, 8 sqrt 2, 16, ..., 64 sqrt 2; keys after the query 16 further."""
    found = bucket(np.array([0, -1, -7, -8, -11, -12, -15, -16, -64, -91, -128, -5000, 1, 8, 5000]))
    assert found.tolist() == [0, 1, 7, 8, 8, 9, 9, 10, 14, 15, 15, 15, 17, 24, 31]


@pytest.mark.parametrize(("preset", "count"), [(T5_SMALL, 35_332_800), (T5_BASE, 109_628_544), (T5_XXL, 4_762_310_656)])
def test_published_sizes(transformers, fits, preset, count):
    import torch

    with torch.device("meta"):
        module = transformers.T5EncoderModel(theirs(transformers, preset))
    ours = abstract(lambda rngs: T5(**preset, rngs=rngs))
    assert trees.count(ours) == sum(tensor.numel() for tensor in module.parameters()) == count
    fits(tables.T5, module, ours)


def test_padding_changes_nothing():
    network, params = made()
    ids, mask = inputs()
    found = network(params, ids, mask)
    other = network(params, np.where(mask, ids, 5), mask)
    np.testing.assert_array_equal(np.where(mask[..., None], found, 0), np.where(mask[..., None], other, 0))
    short = network(params, ids[:, :7], mask[:, :7])
    # other lengths are summed in another order
    np.testing.assert_allclose(short[1], found[1, :7], atol=1e-5)
    assert np.abs(network(params, ids)[1, :7] - found[1, :7]).max() > 1e-3


def test_policies_keep_values_and_gradients():
    ids, mask = inputs()

    def gradient(remat):
        network, params = made(remat=remat)
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.square(network(params, ids, mask)))))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in ("", "nothing")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def test_bfloat16():
    """Weights of bfloat16 keep the sum over blocks in it; products of it leave the sum in float32."""
    ids, mask = inputs()
    (network, params), (reference, _) = made(dtype=jnp.bfloat16), made()
    found, expected = network(params, ids, mask), reference(params, ids, mask)
    assert found.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % a product, and a dozen layers
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert reference(half, ids, mask).dtype == jnp.bfloat16


def test_wrong_input_is_refused():
    network, params = made()
    ids, mask = inputs()
    with pytest.raises(ValueError, match=r"expected bool\[3, 20\], of the shape"):
        network(params, ids, mask[:, :5])
    with pytest.raises(ValueError, match="found a mask int32"):
        network(params, ids, mask.astype(np.int32))
    with pytest.raises(ValueError, match="expected integers"):
        network(params, ids.astype(np.float32))
    with pytest.raises(ValueError, match="found 6 buckets"):
        abstract(lambda rngs: T5(**TINY | {"buckets": 6}, rngs=rngs))
    with pytest.raises(ValueError, match="feed_forward_proj='relu', expected 'gated-gelu'"):
        tables.t5_options({"feed_forward_proj": "relu"})
