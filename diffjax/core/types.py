"""Shared signatures: what every part of diffjax passes to every other part.

Notation (the same from README to tests): clean data `x0`, unit noise `eps`, noise level `sigma`,
noisy data `x = x0 + sigma * eps`. A *network* is a raw neural network F; a *denoiser* estimates
E[x0 | x] in sigma space, whatever the network predicts inside. Solvers, methods and metrics see
denoisers only, and parameters as plain nested dicts of arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array  # a typed key, jax.random.key
Params = Mapping[str, Any]  # nested dict of arrays
Batch = Mapping[str, Array]
Metrics = Mapping[str, Array]  # float32 scalars; "nonfinite_*" are reserved, see Method

# Conditions by name; absent keys (or None) mean "not given". The names in use:
#   label      int32 (B,), 0..num_classes; num_classes itself is the null class
#   text       float (B, S, D), tokens of a text encoder; text_mask bool (B, S), true where they are real
#   text_length  int32 (B,), how many of them are real where the rest is made of these, see nn.control.pad_text
#   pooled     float (B, P), one vector of the whole text
#   image      float (B, S, D), tokens of an image encoder; image_latents (B, h, w, c), the latents of that image
#   control    float32 (B, k), numbers a network knows the meaning of: sizes, crops, aspect
#   height, width, top, left, flip, aspect  float32 (B,), of the training picture and its crop; drop_control bool (B,),
#              true where the network shall not know them; see nn.control
#   augment    float32 (B, 9), EDM's non-leaking augmentation labels
#   step       float32 scalar, what an SFD-v student is told, see sampling.few_step
#   guidance_scale  float32 (B,), the scale that a guidance-distilled student stands for
Cond = Mapping[str, Array]


class Network(Protocol):
    """Raw network F. `x` (B, H, W, C); `noise_label` (B,); `key` switches dropout on."""

    def __call__(
        self, params: Params, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None
    ) -> Array: ...


class Denoiser(Protocol):
    """E[x0 | x]. `x` (B, ...); `sigma` scalar or (B,); same shape and dtype as `x` back."""

    def __call__(
        self, params: Params, x: Array, sigma: Array, cond: Cond | None = None, key: Key | None = None
    ) -> Array: ...


class Method(NamedTuple):
    """A training method as two pure functions.

    init(params) -> state: a NamedTuple whose `params` are the weights that will be sampled.
    step(state, frozen, batch, key, iteration) -> (state, metrics): one iteration. `frozen` holds
      parameters that are read, never trained (a teacher), `iteration` is an int32 scalar that
      counts from 0. metrics["nonfinite_leaf"] is the index (order of `trees.paths`) of the first
      parameter whose gradient was not finite, "nonfinite_sample" that of a sample, -1 where all were.
    """

    init: Callable[[Params], Any]
    step: Callable[[Any, Params, Batch, Key, Array], tuple[Any, Metrics]]
