"""The logit of the density ratio: equations in NumPy, and where it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.ratio_head import RatioHead
from diffjax.nn.functional import functionalize

LOGIT, INIT = functionalize(lambda rngs: RatioHead(12, 32, rngs=rngs))
FEATURES = np.random.default_rng(0).normal(size=(5, 12))


@pytest.mark.fast
def test_every_ratio_starts_at_one():
    params = INIT(jax.random.key(0))
    np.testing.assert_array_equal(LOGIT(params, jnp.asarray(FEATURES, jnp.float32)), np.zeros(5))
    # but the second layer sees the features, so that it learns at once
    grads = jax.grad(lambda params: jnp.sum(LOGIT(params, jnp.asarray(FEATURES, jnp.float32))))(params)
    assert np.all(np.abs(grads["out"]["kernel"]) > 0)


def test_equations_in_numpy(x64):
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), INIT(jax.random.key(0)))
    hidden = FEATURES @ params["narrow"]["kernel"] + params["narrow"]["bias"]
    expected = (hidden / (1 + np.exp(-hidden))) @ params["out"]["kernel"] + params["out"]["bias"]
    found = LOGIT(jax.tree.map(jnp.asarray, params), jnp.asarray(FEATURES))
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-11)  # sums of 32 products in float64
