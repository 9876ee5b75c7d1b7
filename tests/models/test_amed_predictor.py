"""AMED's predictor: size, equations in NumPy, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.amed_predictor import AmedPredictor
from diffjax.nn.functional import functionalize

PREDICT, INIT = functionalize(lambda rngs: AmedPredictor(64, rngs=rngs))


@pytest.mark.fast
def test_size():
    """64-128-4 with biases, 8-8 for the levels, three heads on 4 + 8 + 8."""
    params = INIT(jax.random.key(0))
    assert trees.count(params) == (64 * 128 + 128) + (128 * 4 + 4) + (8 * 8 + 8) + (20 * 3 + 3) == 8971
    network, init = functionalize(lambda rngs: AmedPredictor(16, hidden=32, rngs=rngs))
    assert network(init(jax.random.key(0)), jnp.ones((5, 16)), jnp.float32(2), jnp.float32(1)).shape == (5, 3)


def test_equations_in_numpy(x64):
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), INIT(jax.random.key(1)))
    for layer in params.values():
        layer["bias"] = layer["bias"] + 0.3  # they start at 0
    features = np.random.default_rng(0).normal(size=(3, 64))

    def silu(x):
        return x / (1 + np.exp(-x))

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def embed(t):
        frequencies = 10_000.0 ** (-np.arange(4) / 3)  # 1 down to 1e-4
        angles = t * frequencies
        return np.tile(silu(linear("map_noise", np.concatenate([np.sin(angles), np.cos(angles)]))), (3, 1))

    narrow = linear("narrow_out", silu(linear("narrow_in", features)))
    expected = linear("head", np.concatenate([narrow, embed(9.7), embed(0.47)], axis=1))
    found = PREDICT(jax.tree.map(jnp.asarray, params), jnp.asarray(features), jnp.float64(9.7), jnp.float64(0.47))
    np.testing.assert_allclose(found, expected, rtol=1e-11)  # sums of 128 products in float64
    swapped = PREDICT(jax.tree.map(jnp.asarray, params), jnp.asarray(features), jnp.float64(0.47), jnp.float64(9.7))
    assert np.max(np.abs(found - swapped)) > 1e-3  # the two levels have their places


def test_starts_between_the_extremes():
    """Heads of unit inputs have deviation below 1, so no sigmoid starts flat."""
    raw = PREDICT(INIT(jax.random.key(2)), jax.random.normal(jax.random.key(3), (256, 64)), 80.0, 10.9)
    assert raw.dtype == jnp.float32 and np.all(np.abs(raw) < 5)
    assert np.all(np.std(raw, axis=0) > 0.01)  # it sees the features


@pytest.mark.parametrize("shape", [(4, 32), (64,), (4, 8, 8)])
def test_features_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected features of shape \(B, 64\), found .*: set inputs"):
        PREDICT(INIT(jax.random.key(0)), jnp.zeros(shape), 1.0, 0.5)
