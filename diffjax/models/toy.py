"""A small class-conditional network for demos and tests: a residual MLP on flattened pixels.

On a CPU matrix products are the cheap part, and images of 8x8 have no use for convolutions: every
layer here is one product. Blocks are modulated by the noise level and the class (adaLN-Zero,
Peebles & Xie 2023), so each starts as the identity.

    net = ResidualMLP(image_shape=(8, 8, 1), width=256, depth=4, num_classes=10, rngs=nnx.Rngs(0))
    f = net(x_BHWC, noise_label_B, {"label": label_B})
"""

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.broadcast import per_sample
from diffjax.core.types import Array, Cond, Key
from diffjax.nn import stack

_FREQUENCIES = 32  # pairs of sine and cosine; noise labels (a quarter of log sigma) span about [-2, 2]


def _fourier_features(noise_label: Array) -> Array:
    """(B,) -> (B, 2 * _FREQUENCIES), periods from 8 (the whole range) down to 1/16. Step conditions and guidance
    scales, of the same size, are embedded in the same way."""
    frequencies = jnp.geomspace(2 * jnp.pi / 8, 2 * jnp.pi * 16, _FREQUENCIES, dtype=noise_label.dtype)
    angles = noise_label[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _modulate(h_BD: Array, shift_BD: Array, scale_BD: Array) -> Array:
    """Layer normalisation without parameters of its own, then the condition's scale and shift."""
    mean = jnp.mean(h_BD, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h_BD), axis=-1, keepdims=True) - jnp.square(mean)
    return (h_BD - mean) * jax.lax.rsqrt(variance + 1e-6) * (1 + scale_BD) + shift_BD


class _Block(nnx.Module):
    def __init__(self, width: int, embedding_width: int, *, rngs: nnx.Rngs):
        self.modulation = nnx.Linear(
            embedding_width, 3 * width, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        self.expand = nnx.Linear(width, 2 * width, rngs=rngs)
        self.contract = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, h_BD: Array, embedding_BD: Array, keep_BD: Array | None) -> Array:
        shift, scale, gate = jnp.split(self.modulation(embedding_BD), 3, axis=-1)
        hidden = jax.nn.silu(self.expand(_modulate(h_BD, shift, scale)))
        if keep_BD is not None:
            hidden = hidden * keep_BD
        return h_BD + gate * self.contract(hidden)


class ResidualMLP(nnx.Module):
    """Raw network F: x (B, H, W, C), noise_label (B,) -> (B, H, W, C), float32.

    cond["label"] (B,) int in 0..num_classes selects the class, num_classes (also where absent) is
    the null class. `embedding_width` is that of the embedding of noise level and class, 0 = `width`; images of D numbers
    need a width of D or more, or they do not pass. With `step_condition` cond["step"] (a scalar) is added to the embedding, from zero weights with
    `zero_init_step`; with `guidance_condition` cond["guidance_scale"] (B,), from zero weights. `key` switches dropout
    (probability `dropout`) on. remat: what blocks keep for a gradient, see `nn.stack`; "" = all. skip: a multiple of x,
    which noise level and class choose, is added to the output: the blocks are normalised and lose the length of x, which
    networks that predict noise or velocity must give back.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        depth: int,
        num_classes: int = 0,
        dropout: float = 0.0,
        step_condition: bool = False,
        zero_init_step: bool = False,
        guidance_condition: bool = False,
        embedding_width: int = 0,
        remat: str = "",
        skip: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        stack.check(remat)
        embedding = embedding_width or width
        pixels = image_shape[0] * image_shape[1] * image_shape[2]
        self.image_shape, self.num_classes, self.dropout, self.remat = image_shape, num_classes, dropout, remat
        self.noise_in = nnx.Linear(2 * _FREQUENCIES, embedding, rngs=rngs)
        self.noise_out = nnx.Linear(embedding, embedding, rngs=rngs)
        if num_classes:
            self.label_embedding = nnx.Embed(num_classes + 1, embedding, rngs=rngs)
        self.condition_names = ("step",) * step_condition + ("guidance_scale",) * guidance_condition
        zero = nnx.initializers.zeros_init()
        if step_condition:
            self.step_in = nnx.Linear(2 * _FREQUENCIES, embedding, rngs=rngs)
            self.step_out = nnx.Linear(embedding, embedding, **({"kernel_init": zero} if zero_init_step else {}), rngs=rngs)
        if guidance_condition:
            self.guidance_in = nnx.Linear(2 * _FREQUENCIES, embedding, rngs=rngs)
            self.guidance_out = nnx.Linear(embedding, embedding, kernel_init=zero, rngs=rngs)
        self.image_in = nnx.Linear(pixels, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, embedding, rngs=rngs) for _ in range(depth)])
        self.image_out = nnx.Linear(width, pixels, kernel_init=zero, rngs=rngs)
        self.skip = nnx.Linear(embedding, 1, kernel_init=zero, rngs=rngs) if skip else None

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        embedding = self._embed(noise_label, cond or {})
        h = self._hidden(x, embedding, key, len(self.blocks))
        zero = jnp.zeros((1, 1), h.dtype)
        out = self.image_out(_modulate(h, zero, zero)).reshape(x.shape)
        return out if self.skip is None else out + per_sample(self.skip(embedding)[:, 0], x) * x

    def bottleneck(self, x: Array, noise_label: Array, cond: Cond | None = None) -> Array:
        """The state half way through, normalised: (B, width)."""
        h = self._hidden(x, self._embed(noise_label, cond or {}), None, len(self.blocks) // 2)
        zero = jnp.zeros((1, 1), h.dtype)
        return _modulate(h, zero, zero)

    def _hidden(self, x: Array, embedding: Array, key: Key | None, depth: int) -> Array:
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"found images of shape {x.shape[1:]}, expected {self.image_shape}: set config.data to match")
        h = self.image_in(x.reshape(x.shape[0], -1))
        for i, block in enumerate(self.blocks[:depth]):
            # the mask is drawn inside, so that it is drawn again and not kept
            masked = lambda h, embedding, key, i=i, block=block: block(h, embedding, self._keep_mask(key, i, h))  # noqa: E731
            h = stack.remat(masked, self.remat)(h, embedding, key)
        return h

    def _embed(self, noise_label: Array, cond: Cond) -> Array:
        embedding = self.noise_out(jax.nn.silu(self.noise_in(_fourier_features(noise_label))))
        if self.num_classes:
            null = jnp.full(noise_label.shape, self.num_classes, jnp.int32)
            embedding = embedding + self.label_embedding(cond.get("label", null))
        for name, prefix in (("step", "step"), ("guidance_scale", "guidance")):
            if cond.get(name) is None:
                continue
            if name not in self.condition_names:
                raise ValueError(f"cond[{name!r}] is given to a network without it: set model.{prefix}_condition=True")
            value = jnp.broadcast_to(cond[name], noise_label.shape).astype(noise_label.dtype)
            hidden = getattr(self, f"{prefix}_in")(_fourier_features(value))
            embedding = embedding + getattr(self, f"{prefix}_out")(jax.nn.silu(hidden))
        return jax.nn.silu(embedding)

    def _keep_mask(self, key: Key | None, block: int, h_BD: Array) -> Array | None:
        if key is None or self.dropout == 0.0:
            return None
        keep = jax.random.bernoulli(jax.random.fold_in(key, block), 1 - self.dropout, (h_BD.shape[0], 2 * h_BD.shape[1]))
        return keep / (1 - self.dropout)
