"""The residual MLP: identity at the start, conditions that start silent, errors for conditions it does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.toy import ResidualMLP
from diffjax.nn.functional import functionalize

SHAPE = (4, 4, 2)


def make(method="__call__", **options):
    return functionalize(lambda rngs: ResidualMLP(SHAPE, 16, 2, 3, rngs=rngs, **options), method)


def randomly(params):
    """Weights that are nowhere zero."""
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda a: 0.3 * jax.random.normal(next(keys), a.shape), params)


def test_starts_at_zero_and_the_null_label_is_the_absent_one():
    network, init = make()
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, *SHAPE))
    np.testing.assert_array_equal(network(params, x, jnp.zeros(2)), jnp.zeros_like(x))
    params = randomly(params)
    null = {"label": jnp.array([3, 3])}
    np.testing.assert_array_equal(network(params, x, jnp.zeros(2)), network(params, x, jnp.zeros(2), null))
    assert np.abs(network(params, x, jnp.zeros(2)) - network(params, x, jnp.zeros(2), {"label": jnp.array([0, 1])})).max() > 0.01


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step_condition": True, "zero_init_step": True}, {"step": jnp.float32(4)}),
        ({"guidance_condition": True}, {"guidance_scale": jnp.array([1.0, 4.0])}),
    ],
)
def test_conditions_start_silent_and_then_matter(options, told):
    network, init = make(**options)
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, *SHAPE))
    params = params | {"blocks": randomly(params["blocks"]), "image_out": randomly(params["image_out"])}
    plain = network(params, x, jnp.zeros(2))
    np.testing.assert_allclose(plain, network(params, x, jnp.zeros(2), told), atol=1e-6)  # a bias of zeros is added
    assert np.abs(plain - network(randomly(params), x, jnp.zeros(2), told)).max() > 0.01


def test_a_skip_gives_back_the_length_that_normalisation_takes():
    """Twice the input is the same to the blocks, but for a layer's bias; with the skip it is seen at the end."""
    network, init = make(skip=True)
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, *SHAPE))
    np.testing.assert_array_equal(network(params, x, jnp.zeros(2)), jnp.zeros_like(x))
    params["skip"]["bias"] = params["skip"]["bias"] + 1
    np.testing.assert_allclose(network(params, 3 * x, jnp.zeros(2)), 3 * x, rtol=1e-6)


@pytest.mark.parametrize(("name", "prefix"), [("step", "step"), ("guidance_scale", "guidance")])
def test_a_condition_it_does_not_have_is_refused(name, prefix):
    network, init = make()
    with pytest.raises(ValueError, match=f"set model.{prefix}_condition=True"):
        network(init(jax.random.key(0)), jnp.zeros((1, *SHAPE)), jnp.zeros(1), {name: jnp.ones(1)})


def test_bottleneck_is_normalised_and_half_way():
    bottleneck, init = make("bottleneck")
    params, x = randomly(init(jax.random.key(0))), jax.random.normal(jax.random.key(1), (5, *SHAPE))
    found = bottleneck(params, x, jnp.zeros(5))
    assert found.shape == (5, 16)
    np.testing.assert_allclose(np.var(found, axis=1), 1, rtol=1e-3)  # eps of the normalisation
    first, second = params["blocks"][0], params["blocks"][1]
    later = params | {"blocks": {0: first, 1: jax.tree.map(jnp.zeros_like, second)}}
    np.testing.assert_array_equal(found, bottleneck(later, x, jnp.zeros(5)))
