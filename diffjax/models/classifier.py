"""A small classifier of images, whose last layer before the logits is a feature space without downloads.

Its features say what a classifier of these classes sees. They are not Inception's, so a distance in them is a
"classifier Frechet distance" and never an FID.

    net = Classifier(image_size=8, channels=1, num_classes=10, rngs=nnx.Rngs(0))
    logits_BK = net(x_BHWC)
    features_BD = net.features(x_BHWC)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.layers import Conv, Linear
from diffjax.nn.norms import GroupNorm

_SMALLEST = 4  # pixels a side of the last stage


class _Stage(nnx.Module):
    """Two convolutions with group norms; with `halve` the first one keeps every second place."""

    def __init__(self, inputs: int, outputs: int, halve: bool, *, rngs: nnx.Rngs):
        self.first = Conv(inputs, outputs, 3, stride=2 if halve else 1, rngs=rngs)
        self.first_norm = GroupNorm(outputs, 1e-5, rngs=rngs)
        self.second = Conv(outputs, outputs, 3, rngs=rngs)
        self.second_norm = GroupNorm(outputs, 1e-5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = jax.nn.silu(self.first_norm(self.first(x)))
        return jax.nn.silu(self.second_norm(self.second(h)))


class Classifier(nnx.Module):
    """x (B, H, W, C) float in [-1, 1] -> logits (B, num_classes).

    A convolution to `width` channels, then stages that halve the image and double the channels until it has 4 pixels or
    fewer a side; the mean over places, a layer of `feature_width` that `features` gives, and one more for the logits.
    Raises ValueError for images of another shape: places are averaged, so a wrong size would not be noticed.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        width: int = 32,
        feature_width: int = 64,
        *,
        rngs: nnx.Rngs,
    ):
        if num_classes < 2 or image_size < 1:
            raise ValueError(
                f"a classifier needs 2 classes or more, and images, found num_classes={num_classes}, "
                f"image_size={image_size}: set config.data.num_classes and config.data.image_size"
            )
        self.image_shape = (image_size, image_size, channels)
        self.image_in = Conv(channels, width, 3, rngs=rngs)
        stages, side = [], image_size
        while side > _SMALLEST:
            stages.append(_Stage(width, 2 * width, halve=True, rngs=rngs))
            width, side = 2 * width, -(-side // 2)
        self.stages = nnx.List(stages or [_Stage(width, width, halve=False, rngs=rngs)])
        self.features_out = Linear(width, feature_width, rngs=rngs)
        self.logits_out = Linear(feature_width, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.logits_out(self.features(x))

    def features(self, x: Array) -> Array:
        """(B, feature_width), what the logits are made of."""
        if x.shape[1:] != self.image_shape:
            raise ValueError(
                f"found images of shape {x.shape[1:]}, expected {self.image_shape}: train a classifier on images of "
                "this size"
            )
        h = self.image_in(x)
        for stage in self.stages:
            h = stage(h)
        return jax.nn.silu(self.features_out(jnp.mean(h, axis=(1, 2))))
