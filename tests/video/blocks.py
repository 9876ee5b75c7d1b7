"""A small network of every kind of group: with and without a change of shape, with others, nested, with statistics."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.attention import attend
from diffjax.nn.functional import functionalize
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, TOKENS
from diffjax.nn.layers import Conv, Linear, upsample
from diffjax.nn.norms import GroupNorm

CHANNELS = 16


class Blocks(nnx.Module):
    """(B, T, H, W, C), numbers of frames (B T, C) -> (B, T, 2 H, 2 W, C)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (GroupNorm(CHANNELS, 1e-5, 4, rngs=rngs) for _ in range(2))
        self.conv = Conv(CHANNELS, CHANNELS, 3, rngs=rngs)
        self.qkv, self.out = Linear(CHANNELS, 3 * CHANNELS, rngs=rngs), Linear(CHANNELS, CHANNELS, rngs=rngs)
        self.expand, self.contract = Linear(CHANNELS, 128, rngs=rngs), Linear(128, CHANNELS, rngs=rngs)
        self.mix, self.join = Linear(CHANNELS, CHANNELS, rngs=rngs), Linear(2 * CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x, numbers, run=PLAIN):
        b, t, h, w, c = x.shape
        inside = run.within("down/0")

        def attention(x, numbers):
            tokens = x.reshape(x.shape[0], -1, c)
            q, k, v = (part[:, :, None] for part in jnp.split(self.qkv(tokens), 3, axis=-1))
            operators = {
                "attention": lambda x, q: x + self.out(attend(q, k, v)[:, :, 0]),
                "mlp": lambda x, q: x + self.contract(jax.nn.gelu(self.expand(x))),
            }
            return inside.within("spatial")("tokens", TOKENS, operators, tokens, q).reshape(x.shape)

        operators = {
            "resnet": lambda x, numbers: x + self.conv(jax.nn.silu(self.norm1(x))) + numbers[:, None, None, :],
            "attention": attention,
        }
        y = inside("spatial", FRAMES, operators, x.reshape(b * t, h, w, c), numbers).reshape(x.shape)
        moments = inside.moments("temporal", ROWS, self.norm2, y)

        def temporal(y):  # each frame beside the mean of all
            z = self.mix(jax.nn.silu(self.norm2(y, moments)))
            return z * jnp.mean(z, axis=1, keepdims=True)

        y = inside("temporal", ROWS, {"temporal": temporal}, y)
        operators = {
            "resample": lambda y, skip: upsample(y, (1, 1)),
            "join": lambda y, skip: jnp.concatenate([y, upsample(skip, (1, 1))], axis=-1),
            "resnet": lambda y, skip: self.join(y),
        }
        y = run("up", FRAMES, operators, y.reshape(b * t, h, w, c), x.reshape(b * t, h, w, c))
        return y.reshape(b, t, 2 * h, 2 * w, c)


GROUPS = ("down/0/spatial", "down/0/spatial/tokens", "down/0/temporal", "up")
network, init = functionalize(lambda rngs: Blocks(rngs=rngs))


def arrays(frames=7, height=10, width=6):
    """Parameters and inputs of one video."""
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (1, frames, height, width, CHANNELS))
    return jax.jit(init)(jax.random.key(0)), x, jax.random.normal(keys[1], (frames, CHANNELS))


def shapes(*sizes):
    return jax.eval_shape(lambda: arrays(*sizes))
