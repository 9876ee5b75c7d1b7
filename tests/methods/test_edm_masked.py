"""MDT's second loss: a pass that sees some tokens, at the same image and level with other noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.build import networks
from diffjax.data.sources import DataShape
from diffjax.methods import edm

MODEL = {"name": "mdt", "width": 16, "depth": 4, "decoder_depth": 2, "heads": 2, "precondition": "eps"}
SETTINGS = edm.Settings(distribution="discrete", weighting="eps", num_classes=3)


def whole(params, x, sigma, cond=None, key=None):
    return params["a"] * x


def passes(params, x, sigma, cond=None, key=None, *, factor):
    return factor * params["a"] * x


MASKED = [lambda *inputs, factor=factor: passes(*inputs, factor=factor) for factor in (0.5, 0.25)]
PARAMS = {"a": jnp.float32(0.5)}


def run(masked, seed):
    """(gradient's step of a, metrics) of one step with rate 1."""
    method = edm.make(SETTINGS, whole, optax.identity(), lambda i: jnp.float32(1), masked=masked)
    batch = {"image": jax.random.uniform(jax.random.key(9), (8, 4, 4, 1)), "label": jnp.zeros(8, jnp.int32)}
    state, metrics = jax.jit(method.step)(method.init(PARAMS), {}, batch, jax.random.key(seed), 0)
    return batch["image"], float(state.params["a"]), {name: float(value) for name, value in metrics.items()}


@pytest.mark.fast
def test_both_losses_are_added():
    """Redrawn by hand: the noise of the second by its own key, image and level the same."""
    chosen = set()
    for seed in range(6):
        image, _, plain = run((), seed)
        _, _, found = run(MASKED, seed)
        keys = edm.split(jax.random.key(seed))
        sigma = edm.noise_levels.draw(keys.level, 8, "discrete")
        noise = jax.random.normal(jax.random.fold_in(keys.noise, 1), image.shape)
        losses = [
            float(jnp.mean(jnp.sum(edm.loss(SETTINGS, one, PARAMS, image, sigma, noise), axis=(1, 2, 3)))) for one in MASKED
        ]
        matches = [i for i, value in enumerate(losses) if np.isclose(found["loss_masked"], value, rtol=1e-5)]
        assert len(matches) == 1
        chosen.update(matches)
        assert found["loss"] == pytest.approx(plain["loss"] + found["loss_masked"], rel=1e-6)
        assert "loss_masked" not in plain
    assert chosen == {0, 1}  # each with probability 1 / 2: 2^-5 to miss one


def test_passes_of_a_network():
    """As many as numbers of tokens are kept; the step trains the block that completes them, and the mask's token."""
    data = DataShape(8, 4, 3)
    model = {**MODEL, "learned_variance": True}
    masked = networks.masked_denoisers(model, data, 0.3, 2)
    assert len(masked) == 2
    assert len(networks.masked_denoisers(MODEL, data, 0.0, 1)) == 0
    _, init = networks.denoiser(model, data)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.asarray(0.2 * random.standard_normal(a.shape), jnp.float32), shapes)
    variance = networks.variance_denoiser(model, data)
    method = edm.make(
        SETTINGS, lambda *a: variance(*a)[0], optax.identity(), lambda i: jnp.float32(1), variance=variance, masked=masked
    )
    batch = {"image": jnp.asarray(random.standard_normal((2, 8, 8, 4)), jnp.float32), "label": jnp.array([0, 2])}
    state, metrics = jax.jit(method.step)(method.init(params), {}, batch, jax.random.key(0), 0)
    assert np.isfinite(metrics["loss_masked"]) and metrics["loss_masked"] > 0
    for name in ("mask_token", "interpolate"):
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params[name], params[name])
        assert max(jax.tree.leaves(moved)) > 0


def test_masks_of_another_network_are_refused():
    with pytest.raises(ValueError, match="method.mask_ratio=0.3 is of model.name='mdt', found 'dit'"):
        networks.masked_denoisers({"name": "dit"}, DataShape(8, 4, 3), 0.3, 1)
