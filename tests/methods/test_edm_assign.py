"""EDM with assigned noise: the loss uses it throughout, groups, statistics, refusals, warnings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.assign import pair
from diffjax.build import parts
from diffjax.cli import flags
from diffjax.core import noise_levels, solvers
from diffjax.methods import edm

SHAPE, NUM = (4, 4, 2), 24
LABEL = jnp.arange(NUM, dtype=jnp.int32) % 3
BATCH = {"image": 0.5 * jax.random.normal(jax.random.key(0), (NUM, *SHAPE)), "label": LABEL}


def scale(params, x, sigma, cond=None, key=None):
    """The least denoiser: one number."""
    return params["a"] * x


def step(settings, batch=BATCH):
    method = edm.make(settings, scale, optax.identity(), lambda iteration: jnp.float32(0.1))
    state = method.init({"a": jnp.float32(0.7)})
    return jax.jit(method.step)(state, {}, batch, jax.random.key(5), jnp.int32(0))


@pytest.mark.fast
@pytest.mark.parametrize("assign", ["linear", "auction", "knn"])
def test_the_step_trains_on_the_assigned_noise(assign):
    """Loss and gradient by hand from `pair` on the step's own noise key."""
    options = {"k": 4} if assign == "knn" else {}
    state, metrics = step(edm.Settings(assign=assign, assign_options=options))
    _, sigma_key, noise_key, *_ = jax.random.split(jax.random.key(5), 5)
    noise, _, found = pair.pair(noise_key, BATCH["image"], assign, **options)
    sigma = noise_levels.draw(sigma_key, NUM, "lognormal")[:, None, None, None]
    noisy = BATCH["image"] + sigma * noise
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    loss = lambda a: jnp.mean(jnp.sum(weight * (a * noisy - BATCH["image"]) ** 2, axis=(1, 2, 3)))  # noqa: E731
    assert float(metrics["loss"]) == pytest.approx(float(loss(0.7)), rel=1e-5)  # float32 sums
    assert float(state.params["a"]) == pytest.approx(0.7 - 0.1 * float(jax.grad(loss)(0.7)), rel=1e-4)
    for name, value in found.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert metrics["assign_reduction"] > 1


def test_without_assignment_nothing_changes():
    _, metrics = step(edm.Settings())
    assert not any(name.startswith("assign") for name in metrics)


def test_noise_stays_within_a_label():
    noise, _ = pair.training_noise(jax.random.key(1), BATCH["image"], BATCH, "linear", group_by="label")
    _, perm, _ = pair.pair(jax.random.key(1), BATCH["image"], "linear", LABEL)
    drawn, *_ = pair.pair(jax.random.key(1), BATCH["image"], "none")
    np.testing.assert_array_equal(noise, drawn[perm])
    np.testing.assert_array_equal(LABEL[perm], LABEL)
    _, metrics = step(edm.Settings(assign="linear", assign_options={"group_by": "label"}))
    assert 0 < metrics["assign_reduction"] < step(edm.Settings(assign="linear"))[1]["assign_reduction"]
    with pytest.raises(ValueError, match=r"group_by='label' needs that condition in the batch, found \[\]"):
        step(edm.Settings(assign="linear", assign_options={"group_by": "label"}), {"image": BATCH["image"]})


@pytest.mark.parametrize(
    ("assign", "options", "message"),
    [
        ("liner", {}, "the assignment must be one of .*found 'liner'"),
        ("linear", {"costs": "l2"}, "unknown option 'costs' of assign_options.*'cost'"),
        ("knn", {"k": 0}, "at least 1, found 0"),
        ("knn", {"group_by": "label"}, "only 'linear' and 'auction' keep noise within groups"),
    ],
)
def test_assignments_that_cannot_be(assign, options, message):
    with pytest.raises(ValueError, match=message):
        edm.make(edm.Settings(assign=assign, assign_options=options), scale, optax.identity(), lambda i: 0.1)


def test_warnings():
    """Where assignment does nothing, or the sampler is biased by it."""
    config = flags.load_config("configs/quick/edm_digits.py")
    stochastic = solvers.make_plan("edm_stochastic", np.array([80.0, 1.0, 0.0]), s_churn=1.0)
    heun = solvers.make_plan("heun", np.array([80.0, 1.0, 0.0]))
    assert parts.assignment_warning(config, stochastic) == ""
    config.method.assign = "linear"
    assert parts.assignment_warning(config, heun) == parts.assignment_warning(config, None) == ""
    assert "this sampler adds noise" in parts.assignment_warning(config, stochastic)
    config.train.batch_size = 1
    assert "--config.method.assign=knn" in parts.assignment_warning(config, heun)
    config.method.assign = "knn"
    assert parts.assignment_warning(config, heun) == ""


def test_warnings_of_consistency_models():
    """Their own steps add noise and are no score's; in distillation the teacher pairs noise and images."""
    config = flags.load_config("configs/quick/immiscible_digits.py:consistency_linear")
    two = solvers.make_plan("consistency", np.array([80.0, 0.8, 0.0]))
    assert parts.assignment_warning(config, two) == ""
    config.method.teacher = "runs/teacher"
    assert "is not known to help" in parts.assignment_warning(config, two)
