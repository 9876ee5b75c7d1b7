"""The train step: pure, compiled once, the same after a restart and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.core import noise_levels, prediction, rng, trees
from diffjax.core.types import Method
from diffjax.methods import edm
from diffjax.train import ema, state, step

SHAPE, CLASSES = (4, 4, 1), 3


def _network(params, x, noise_label, cond=None, key=None):
    """A small MLP with labels, and dropout where there is a key."""
    flat = x.reshape(x.shape[0], -1) @ params["in"]["kernel"] + params["label"][cond["label"]]
    hidden = jnp.tanh(flat + noise_label[:, None] * params["noise"][None])
    if key is not None:
        hidden = hidden * jax.random.bernoulli(key, 0.8, hidden.shape) / 0.8
    return (hidden @ params["out"]["kernel"]).reshape(x.shape)


def _params():
    draw = np.random.RandomState(0).standard_normal
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        {
            "in": {"kernel": draw((16, 32)) / 4},
            "label": draw((CLASSES + 1, 32)),
            "noise": draw(32),
            "out": {"kernel": draw((32, 16)) / 6},
        },
    )


def _method():
    denoise = prediction.edm_denoiser(_network, sigma_data=0.5)
    settings = edm.Settings(label_dropout=0.2, num_classes=CLASSES)
    return edm.make(settings, denoise, optax.scale_by_adam(), lambda i: jnp.float32(1e-2) / (1 + i))


DECAY = ema.make_decay(batch_size=16, halflife_images=500)


def _start(seed=5):
    return state.create(_method(), _params(), seed, averaged=True)


def _batch(number):
    random = np.random.RandomState(100 + number)
    image = jnp.asarray(random.uniform(-1, 1, (16, *SHAPE)), jnp.float32)
    return {"image": image, "label": jnp.asarray(random.randint(0, CLASSES, 16), jnp.int32)}


def _run(train_step, current, numbers):
    losses = []
    for number in numbers:
        current, metrics = train_step(current, {}, _batch(number))
        losses.append(np.asarray(metrics["loss"]))
    return current, losses


def _bit_equal(a, b):
    assert trees.compare(a, b) == []
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.fast
def test_one_compilation_serves_every_step_and_seed():
    traces = []
    plain = step.make_train_step(_method(), DECAY)

    def counted(*args):
        traces.append(None)
        return plain(*args)

    train_step = jax.jit(counted, donate_argnums=0)
    current, losses = _run(train_step, _start(seed=5), range(4))
    _run(train_step, _start(seed=6), range(1))
    assert len(traces) == 1
    assert train_step._cache_size() == 1
    assert int(current.step) == 4 and current.step.dtype == jnp.int32
    assert int(current.seed) == 5 and current.seed.dtype == jnp.uint32
    assert len(set(map(float, losses))) == 4


def test_the_state_may_be_donated_and_keeps_its_types():
    start = _start()
    abstract = jax.eval_shape(lambda: start)
    after, _ = jax.jit(step.make_train_step(_method(), DECAY), donate_argnums=0)(start, {}, _batch(0))
    assert trees.compare(abstract, after) == []
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((start.method, start.ema_params)))


def test_a_restarted_run_is_the_same_run_bit_by_bit():
    whole, losses = _run(jax.jit(step.make_train_step(_method(), DECAY)), _start(), range(6))
    half, first = _run(jax.jit(step.make_train_step(_method(), DECAY)), _start(), range(3))
    stored = jax.tree.map(np.asarray, half)
    rest, second = _run(jax.jit(step.make_train_step(_method(), DECAY)), jax.tree.map(jnp.asarray, stored), range(3, 6))
    _bit_equal(whole, rest)
    np.testing.assert_array_equal(losses, first + second)


def test_the_seed_and_the_step_make_the_key():
    seen = []

    def method_step(method_state, frozen, batch, key, iteration):
        jax.debug.callback(lambda *a: seen.append(a), jax.random.key_data(key), iteration, frozen["f"], ordered=True)
        return method_state, {"loss": jnp.float32(0)}

    method = Method(lambda params: edm.EDMState(params, ()), method_step)
    current = state.create(method, {"w": jnp.ones(2)}, 9, averaged=False)
    train_step = jax.jit(step.make_train_step(method))
    for _ in range(3):
        current, _ = train_step(current, {"f": jnp.float32(7)}, {})
    jax.effects_barrier()
    for number, (bits, iteration, frozen) in enumerate(seen):
        np.testing.assert_array_equal(bits, jax.random.key_data(rng.stream(9, "train", number)))
        assert iteration == number and frozen == 7
    assert len(seen) == 3


def test_the_average_follows_the_new_weights():
    train_step = jax.jit(step.make_train_step(_method(), DECAY))
    first, _ = train_step(_start(), {}, _batch(0))
    _bit_equal(first.ema_params, first.method.params)  # beta is 0 at the first step
    second, _ = train_step(first, {}, _batch(1))
    beta = 0.5 ** (16 / (16 * 0.05))
    expected = jax.tree.map(lambda e, p: beta * e + (1 - beta) * p, first.ema_params, second.method.params)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-7), second.ema_params, expected)
    assert state.sampling_params(second) is second.ema_params


def test_without_an_average_the_weights_are_sampled():
    start = state.create(_method(), _params(), 0, averaged=False)
    after, _ = jax.jit(step.make_train_step(_method()))(start, {}, _batch(0))
    assert after.ema_params == {}
    assert state.sampling_params(after) is after.method.params


@pytest.mark.parametrize(("averaged", "decay"), [(True, None), (False, DECAY)])
def test_a_state_of_another_kind_is_refused(averaged, decay):
    start = state.create(_method(), _params(), 0, averaged=averaged)
    with pytest.raises(ValueError, match=r"use state.create\(..., averaged=decay is not None\)"):
        step.make_train_step(_method(), decay)(start, {}, _batch(0))


def test_eight_devices_train_as_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    copied, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    train_step = jax.jit(step.make_train_step(_method(), DECAY))
    single, sharded = _start(), jax.device_put(_start(), copied)
    for number in range(4):
        single, one = train_step(single, {}, _batch(number))
        sharded, many = train_step(sharded, {}, jax.device_put(_batch(number), split))
        # the same draws, float32 sums in another order; Adam carries it on through the weights
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-4, err_msg=name)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded.method.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), sharded.method.params, single.method.params)


def test_the_draws_do_not_depend_on_the_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))

    def draw(key):
        return noise_levels.draw(key, 16, "lognormal"), jax.random.normal(key, (16, *SHAPE))

    key = rng.stream(0, "train", 0)
    for a, b in zip(jax.jit(draw)(key), jax.jit(draw, out_shardings=split)(key)):
        np.testing.assert_array_equal(a, b)
