"""Optimisers against their formulas, learning rates in numbers, names and values that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train import optim

GRADS = [np.array([0.5, -2.0, 0.0]), np.array([-1.0, 3.0, 0.2]), np.array([0.1, 0.1, -4.0])]
START = np.array([1.0, -1.0, 2.0])


def _run(optimizer, rate=0.1):
    params, state = jnp.asarray(START), optimizer.init(jnp.asarray(START))
    for grad in GRADS:
        direction, state = optimizer.update(jnp.asarray(grad), state, params)
        params = params - rate * direction
    return params


@pytest.mark.fast
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_and_adamw_by_hand(decay, x64):
    name = "adamw" if decay else "adam"
    optimizer = optim.make_optimizer(name, b1=0.8, b2=0.95, eps=1e-3, weight_decay=decay)
    params, first, second = START, np.zeros(3), np.zeros(3)
    for step, grad in enumerate(GRADS, 1):
        first, second = 0.8 * first + 0.2 * grad, 0.95 * second + 0.05 * grad**2
        direction = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.95**step)) + 1e-3)
        params = params - 0.1 * (direction + decay * params)
    np.testing.assert_allclose(_run(optimizer), params, rtol=1e-12)  # float64, the same formulas


def test_sgd_by_hand(x64):
    params, trace = START, np.zeros(3)
    for grad in GRADS:
        trace = 0.5 * trace + grad
        params = params - 0.1 * trace
    np.testing.assert_allclose(_run(optim.make_optimizer("sgd", momentum=0.5)), params, rtol=1e-13)


def test_updates_are_those_of_optax_without_the_rate(x64):
    optimizer = optax.adam(0.1)
    params, state = jnp.asarray(START), optimizer.init(jnp.asarray(START))
    for grad in GRADS:
        updates, state = optimizer.update(jnp.asarray(grad), state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(_run(optim.make_optimizer("adam")), params, rtol=1e-13)


def test_radam_is_torchs(x64):
    """Thirty steps: the rectification begins at the sixth."""
    import torch

    random = np.random.default_rng(0).normal(size=(30, 3))
    theirs = torch.tensor(START, requires_grad=True)
    peer = torch.optim.RAdam([theirs], lr=0.1, eps=1e-8)
    optimizer, params = optim.make_optimizer("radam"), jnp.asarray(START)
    state = optimizer.init(params)
    for grad in random:
        theirs.grad = torch.tensor(grad)
        peer.step()
        direction, state = optimizer.update(jnp.asarray(grad), state, params)
        params = params - 0.1 * direction
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-6)  # eps stands at another place


def test_clipping_is_by_the_global_norm(x64):
    optimizer = optim.make_optimizer("sgd", momentum=0.0, clip_norm=1.0)
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([0.0, 4.0])}
    found, _ = optimizer.update(grads, optimizer.init(grads))
    jax.tree.map(lambda f, g: np.testing.assert_allclose(f, g / 5, rtol=1e-14), found, grads)
    small = jax.tree.map(lambda g: g / 10, grads)
    found, _ = optimizer.update(small, optimizer.init(small))
    jax.tree.map(np.testing.assert_array_equal, found, small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Adam W"}, "unknown optimizer 'Adam W'; did you mean 'adamw'. Known: adam, adamw, radam, sgd"),
        ({"name": None}, "unknown optimizer None; did you mean"),
        ({"name": "adam", "weight_decay": 0.1}, "weight_decay=0.1 needs optim.name='adamw', found 'adam'"),
        ({"clip_norm": -1.0}, "clip_norm must be positive, or 0 for no clipping, found -1.0"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(**options)


def _rates(iterations, **options):
    rate = jax.jit(optim.make_learning_rate(0.2, 10, 1000, **options))
    values = [rate(jnp.int32(i)) for i in iterations]
    assert all(value.dtype == jnp.float32 and value.shape == () for value in values)
    return np.array(values)


# float32: one rounding per factor
RTOL = 1e-6


@pytest.mark.fast
def test_warm_up_is_linear_in_images():
    np.testing.assert_allclose(_rates([0, 1, 5, 10, 99]), 0.2, rtol=RTOL)
    found = _rates([0, 1, 5, 10, 99], warmup_images=100)
    np.testing.assert_allclose(found, [0, 0.02, 0.1, 0.2, 0.2], rtol=RTOL)


def test_cosine_ends_at_zero():
    found = _rates([0, 25, 50, 75, 100, 200], schedule="cosine")
    half = 0.1 / np.sqrt(2)
    # atol: the cosine of pi in float32
    np.testing.assert_allclose(found, [0.2, 0.1 + half, 0.1, 0.1 - half, 0, 0], rtol=RTOL, atol=1e-8)
    both = _rates([5], schedule="cosine", warmup_images=100)
    np.testing.assert_allclose(both, 0.1 * np.cos(np.pi * 0.025) ** 2, rtol=RTOL)


def test_linear_ends_at_zero():
    np.testing.assert_allclose(_rates([0, 25, 50, 100, 200], schedule="linear"), [0.2, 0.15, 0.1, 0, 0], rtol=RTOL)


@pytest.mark.parametrize("total", [1000, 1001, 999, 10])
def test_half_drop_is_the_published_loop(total):
    rate = optim.make_learning_rate(0.2, 10, total, schedule="half_drop")
    current, seen = 0.2, 0
    for iteration in range(-(-total // 10) + 2):
        np.testing.assert_allclose(rate(jnp.int32(iteration)), current, rtol=RTOL)
        if seen >= 0.5 * total:  # tested after the iteration, before it is counted
            current = 0.02
        seen += 10


def test_half_drop_of_the_cifar10_recipe():
    rate = optim.make_learning_rate(5e-5, 128, 200_000, schedule="half_drop")
    drop = 783  # the first j with (j - 1) * 128 >= 100,000
    assert (drop - 2) * 128 < 100_000 <= (drop - 1) * 128
    np.testing.assert_allclose([rate(j) for j in (0, drop - 1, drop, 10**6)], [5e-5, 5e-5, 5e-6, 5e-6], rtol=RTOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "Cosin"}, "unknown schedule 'Cosin'; did you mean 'cosine'. Known: constant, cosine, linear, half_drop"),
        ({"warmup_images": -1}, "warmup_images not negative, found 0.1, 8, 100, -1"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"total_images": 0}, "must be positive"),
    ],
)
def test_rates_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.make_learning_rate(**{"learning_rate": 0.1, "batch_size": 8, "total_images": 100, **options})
