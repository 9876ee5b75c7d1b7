"""The classifier: its shapes and size, what its features are, and the images that it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.classifier import Classifier
from diffjax.nn.functional import functionalize


def network(image_size=8, channels=1, num_classes=10, method="__call__", **options):
    options = {"width": 8, "feature_width": 16, **options}
    return functionalize(lambda rngs: Classifier(image_size, channels, num_classes, **options, rngs=rngs), method)


def images(count=5, size=8, channels=1):
    return np.random.default_rng(0).uniform(-1, 1, (count, size, size, channels)).astype(np.float32)


@pytest.mark.fast
def test_logits_are_a_linear_map_of_the_features():
    logits, init = network()
    features, _ = network(method="features")
    params = init(jax.random.key(0))
    found = jax.jit(features)(params, images())
    assert found.shape == (5, 16) and found.dtype == jnp.float32
    last = params["logits_out"]
    expected = found @ last["kernel"] + last["bias"][None]
    # the same products, in programs of their own
    np.testing.assert_allclose(jax.jit(logits)(params, images()), expected, rtol=1e-5, atol=1e-6)


def test_each_image_has_its_own_features():
    features, init = network(method="features")
    params = init(jax.random.key(0))
    whole = jax.jit(features)(params, images())
    # convolutions sum in an order that depends on the batch
    np.testing.assert_allclose(jax.jit(features)(params, images()[2:3]), whole[2:3], rtol=1e-4, atol=1e-6)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("size", "stages"),
    [(4, [(8, 8)]), (8, [(8, 16)]), (9, [(8, 16), (16, 32)]), (32, [(8, 16), (16, 32), (32, 64)])],
)
def test_parameter_counts(size, stages):
    """Convolutions of 9 weights a pair of channels and two group norms a stage; odd sizes are halved upwards."""
    shapes = jax.eval_shape(network(size, channels=3)[1], jax.random.key(0))
    conv = lambda a, b: 9 * a * b + b  # noqa: E731
    last = stages[-1][1]
    expected = conv(3, 8) + sum(conv(a, b) + conv(b, b) + 4 * b for a, b in stages) + (last * 16 + 16) + (16 * 10 + 10)
    assert trees.count(shapes) == expected


def test_images_of_another_size_are_refused():
    """The mean over places would take them."""
    features, init = network(method="features")
    shapes = jax.eval_shape(init, jax.random.key(0))
    for wrong in (images(size=16), images(channels=3)):
        with pytest.raises(ValueError, match=r"expected \(8, 8, 1\): train a classifier on images of this size"):
            jax.eval_shape(features, shapes, wrong)


def test_a_classifier_of_one_class_is_refused():
    with pytest.raises(ValueError, match="needs 2 classes or more.*set config.data.num_classes"):
        network(num_classes=1)
