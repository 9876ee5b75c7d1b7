"""The assignment beside the step: the same plan as the step's own, pools, resumption, and that it is made ahead."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.assign import costs, host, pair
from diffjax.core import rng
from diffjax.train import loop

NUM, SHAPE = 16, (4, 4, 1)


class Stream:
    """Batches of random images; counts how many were taken."""

    def __init__(self):
        self.at, self.taken = 0, threading.Semaphore(0)

    def __next__(self):
        random = np.random.default_rng(self.at)
        self.at += 1
        self.taken.release()
        return {"image": random.normal(size=(NUM, *SHAPE)).astype(np.float32), "label": np.arange(NUM, dtype=np.int32) % 4}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def inputs(batch, step):
    return batch["image"], rng.stream(3, "train", step)


def noise_of(batch):
    return np.asarray(pair.draw(jax.random.wrap_key_data(batch[pair.NOISE_KEY]), SHAPE))


@pytest.mark.fast
@pytest.mark.parametrize("options", [{}, {"group_by": "label"}, {"cost": "l2"}])
def test_the_plan_is_that_of_the_step(options):
    batches = host.Assigned(Stream(), inputs, **options)
    for step in range(3):
        batch = next(batches)
        key = rng.stream(3, "train", step)
        expected, _ = pair.training_noise(key, jnp.asarray(batch["image"]), dict(batch), "linear", **options)
        np.testing.assert_array_equal(noise_of(batch), expected)
        shipped, found = pair.training_noise(key, jnp.asarray(batch["image"]), dict(batch), "linear", route="host", **options)
        np.testing.assert_array_equal(shipped, expected)
        assert found["assign_reduction"] > 1


def test_a_pool_deals_out_the_noise_of_all_its_batches():
    """The noise of three batches in a better order than each batch can have alone."""
    pooled, single = host.Assigned(Stream(), inputs, pool=3), host.Assigned(Stream(), inputs)
    together, alone = ([next(batches) for _ in range(3)] for batches in (pooled, single))
    keys = [np.concatenate([batch[pair.NOISE_KEY] for batch in part]) for part in (together, alone)]
    assert sorted(map(tuple, keys[0])) == sorted(map(tuple, keys[1]))
    totals = [sum(np.vdot(batch["image"], noise_of(batch)) for batch in part) for part in (together, alone)]
    assert totals[0] > totals[1]
    x, drawn = (np.concatenate(part) for part in ([b["image"] for b in together], [noise_of(b) for b in together]))
    perm = pair.assign(jnp.asarray(x), jnp.asarray(drawn), "linear")
    np.testing.assert_array_equal(perm, np.arange(3 * NUM))  # nothing is left to gain


@pytest.mark.parametrize("given", [0, 1, 3, 4, 5])
def test_resumed_anywhere_in_a_pool(given):
    straight = host.Assigned(Stream(), inputs, pool=2)
    expected = list(itertools.islice(straight, given + 3))
    left = host.Assigned(Stream(), inputs, pool=2)
    for _ in range(given):
        next(left)
    resumed = host.Assigned(Stream(), inputs, pool=2)
    next(resumed)
    resumed.set_state(left.get_state())
    for batch, found in zip(expected[given:], resumed, strict=False):
        assert set(batch) == set(found)
        for name in batch:
            np.testing.assert_array_equal(batch[name], found[name])


def test_the_next_batch_is_made_while_this_one_is_used():
    stream = Stream()
    next(host.Assigned(stream, inputs))
    for _ in range(3):  # the one that was given, and two ahead, without being asked; the minute is for a busy machine
        assert stream.taken.acquire(timeout=60)
    assert not stream.taken.acquire(timeout=0.2)


def test_an_image_that_is_not_finite_is_masked():
    stream = Stream()
    plain = stream.__class__.__next__

    class Bad(Stream):
        def __next__(self):
            batch = plain(self)
            batch["image"][2] = np.nan
            return batch

    batch = next(host.Assigned(Bad(), inputs))
    noise, found = pair.training_noise(
        rng.stream(3, "train", 0), jnp.asarray(batch["image"]), dict(batch), "linear", route="host"
    )
    assert found["assign_nonfinite"] == 1 and np.all(np.isfinite(noise)) and found["assign_reduction"] > 1


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="pool is a number of batches, at least 1, found 0"):
        host.Assigned(Stream(), inputs, pool=0)
    with pytest.raises(ValueError, match="group_by='text' needs that condition in the batch"):
        next(host.Assigned(Stream(), inputs, group_by="text"))
    with pytest.raises(ValueError, match="needs 'noise_key' in the batch"):
        pair.training_noise(jax.random.key(0), jnp.zeros((4, *SHAPE)), {}, "linear", route="host")
    for method, options, message in (
        ("auction", {"route": "host"}, "for the exact assignment, found 'auction'"),
        ("linear", {"pool": 2}, "set assign_options.route = 'host'"),
        ("linear", {"route": "gpu"}, "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pair.check_options(method, options)
    config = small("immiscible_digits.py:flow_linear", method__assign_options={"route": "host"})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="numbers the rows of one process, found 2"):
        build.experiment(config)
    monkeypatch.undo()
    config.train.overfit_one_batch = True
    with pytest.raises(ValueError, match="train.overfit_one_batch repeats the batch"):
        build.experiment(config)


def test_a_run_left_in_a_pool_goes_on_bit_by_bit(tmp_path):
    def train(folder, steps):
        options = {"route": "host", "pool": 2}
        config = small("immiscible_digits.py:flow_linear", num_steps=steps, method__assign_options=options)
        config.model.update({"width": 16, "depth": 1})
        return loop.run(build.experiment(config), config, tmp_path / folder).method.params

    straight = train("straight", 4)
    train("left", 3)
    jax.tree.map(np.testing.assert_array_equal, train("left", 4), straight)


def test_label_leak():
    """Noise that is its class's mean gives every label away, independent noise 100 / classes of them."""
    random = np.random.default_rng(0)
    label = jnp.asarray(random.integers(0, 5, 2000))
    means = random.normal(size=(5, 30))
    x = jnp.asarray(means[label] + random.normal(size=(2000, 30)), jnp.float32)
    assert float(costs.label_leak(x, jnp.asarray(means[label], jnp.float32), label)) == pytest.approx(100, abs=0.5)
    independent = float(costs.label_leak(x, jnp.asarray(random.normal(size=(2000, 30)), jnp.float32), label))
    assert independent == pytest.approx(20, abs=4)  # four standard deviations of 2,000 guesses
    assert float(costs.label_leak(x, x, jnp.arange(2000))) == 0  # a class of one has no other image to go by
