"""Cross-entropy by hand: its value, its gradient, and batches that have nothing to learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.methods import classify

IMAGE = np.random.default_rng(0).uniform(-1, 1, (6, 2, 2, 1)).astype(np.float32)
LABEL = np.array([0, 1, 2, 0, 1, 2], np.int32)


def linear(params, x):
    return x.reshape(len(x), -1) @ params["kernel"]


@pytest.mark.fast
def test_one_step_descends_the_gradient_by_hand():
    """d loss / d W = x^T (p - y) / B for logits x W."""
    kernel = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    method = classify.make(linear, optax.identity(), learning_rate=lambda iteration: 0.5)
    state = method.init({"kernel": jnp.asarray(kernel)})
    new, metrics = jax.jit(method.step)(state, {}, {"image": IMAGE, "label": LABEL}, jax.random.key(0), 0)
    flat = IMAGE.reshape(6, 4).astype(np.float64)
    logits = flat @ kernel
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = flat.T @ (share - np.eye(3)[LABEL]) / 6
    np.testing.assert_allclose(new.params["kernel"], kernel - 0.5 * gradient, rtol=1e-5, atol=1e-6)  # float32
    assert metrics["loss"] == pytest.approx(-np.log(share[np.arange(6), LABEL]).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == LABEL))
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert metrics["nonfinite_leaf"] == -1


def test_equal_logits_cost_the_logarithm_of_the_classes():
    assert jax.jit(classify.loss)(np.zeros((6, 10), np.float32), LABEL) == pytest.approx(np.log(10), rel=1e-6)


def test_images_are_prepared_and_labels_needed():
    def double(batch, key):
        return {"image": 2 * batch["image"], "label": batch["label"]}

    method = classify.make(linear, optax.identity(), lambda iteration: 0.5, double)
    plain = classify.make(linear, optax.identity(), lambda iteration: 0.5)
    state = plain.init({"kernel": np.eye(4, 3, dtype=np.float32)})
    # equal logits would cost the same whatever the image
    twice = jax.jit(method.step)(state, {}, {"image": IMAGE, "label": LABEL}, jax.random.key(0), 0)[1]
    expected = jax.jit(plain.step)(state, {}, {"image": 2 * IMAGE, "label": LABEL}, jax.random.key(0), 0)[1]
    # float32, in two programs
    assert twice["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    with pytest.raises(ValueError, match="learns labels, found a batch with .* set data.num_classes"):
        jax.eval_shape(plain.step, state, {}, {"image": IMAGE}, jax.random.key(0), 0)
