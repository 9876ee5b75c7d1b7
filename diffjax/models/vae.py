"""Autoencoders of latent diffusion (Rombach 2022, appendix G; Esser 2021, table 7): KL and vector-quantised.

Images (B, H, W, C) in [-1, 1] become latents (B, H/f, W/f, c), f = 2^(levels - 1). With (mean, logvar) or, quantised, h
what the encoder gives,

    z = (mean + exp(logvar / 2) eps - shift) scale       KL, eps unit noise                                      (1)
    z = h scale                                          quantised: diffusion sees h, codes are the decoder's    (2)
    image = decoder(z / scale + shift)                   KL                                                      (3)
    image = decoder(nearest code of z / scale)           quantised                                               (4)

scale makes a network's input have about unit variance: it is applied here, once, and nowhere else.

    apply, init = functionalize(lambda rngs: PRESETS["sd_v1"](rngs=rngs), "decode")
    image_BHWC = jax.jit(apply)(params, z_BHWC)

A picture of 512 pixels keeps 256 channels of it at once. The caller decodes many in parts:

    images = jax.lax.map(lambda z: apply(params, z[None])[0], z_BHWC, batch_size=4)

`remat` names what a block keeps for a gradient, see `nn.stack`; "" = all.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Key
from diffjax.nn import attention, stack
from diffjax.nn.layers import Conv, Embedding, Init, Linear, over_channels
from diffjax.nn.norms import GroupNorm

_INIT = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))  # PyTorch's own
_LOGVAR = -30.0, 20.0  # released code: its exponential is finite, and not 0, in float32
_norm = functools.partial(GroupNorm, eps=1e-6, groups=32)


class AutoencoderKL(nnx.Module):
    """Images with a Gaussian for each latent. quant_conv: a 1x1 convolution on either side of the latents.

    Raises ValueError for a name that is no policy of `remat`; its methods for images and latents of another shape.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        quant_conv: bool = True,
        scale: float = 0.18215,
        shift: float = 0.0,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        stack.check(remat)
        self.channels, self.latent_channels, self.scale, self.shift = channels, latent_channels, scale, shift
        self.factor = 2 ** (len(channel_mult) - 1)
        widths, double = [width * mult for mult in channel_mult], 2 * latent_channels
        self.encoder = Encoder(channels, double, widths, num_blocks, dtype, remat, rngs=rngs)
        self.decoder = Decoder(latent_channels, channels, widths, num_blocks, dtype, remat, rngs=rngs)
        point = lambda channels: Conv(channels, channels, 1, init=_INIT, dtype=dtype, rngs=rngs)  # noqa: E731
        self.quant_conv = point(double) if quant_conv else None
        self.post_quant_conv = point(latent_channels) if quant_conv else None

    def moments(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Mean and log variance of the latents before they are scaled, (B, H/f, W/f, c) each, at least float32."""
        check_images(x_BHWC, self.channels, self.factor)
        h = self.encoder(x_BHWC)
        return gaussian(h if self.quant_conv is None else self.quant_conv(h))

    def encode(self, x_BHWC: Array, key: Key) -> Array:
        """Latents drawn with `key`, and scaled, eq. 1."""
        return draw(*self.moments(x_BHWC), key, self.scale, self.shift)

    def encode_mean(self, x_BHWC: Array) -> Array:
        """Latents without their noise, scaled."""
        return (self.moments(x_BHWC)[0] - self.shift) * self.scale

    def decode(self, z_BHWC: Array) -> Array:
        """Images (B, H, W, C) of scaled latents (B, H/f, W/f, c), eq. 3, in their type; about -1..1, not clipped."""
        _check_latents(z_BHWC, self.latent_channels)
        h = _wide(z_BHWC) / self.scale + self.shift
        h = h if self.post_quant_conv is None else self.post_quant_conv(h)
        return self.decoder(h).astype(z_BHWC.dtype)


def gaussian(h_BHWC: Array) -> tuple[Array, Array]:
    """Mean and log variance of what an encoder gives, (B, H/f, W/f, 2 c), at least float32."""
    mean, logvar = jnp.split(_wide(h_BHWC), 2, axis=-1)
    return mean, jnp.clip(logvar, *_LOGVAR)


def draw(mean_BHWC: Array, logvar_BHWC: Array, key: Key, scale: float = 1.0, shift: float = 0.0) -> Array:
    """Latents (B, H/f, W/f, c) drawn with `key`, and scaled, eq. 1."""
    noise = jax.random.normal(key, mean_BHWC.shape, mean_BHWC.dtype)
    return (mean_BHWC + jnp.exp(logvar_BHWC / 2) * noise - shift) * scale


class VQModel(nnx.Module):
    """Images with one of `codes` vectors for each place. Latents are those before quantisation, as LDM trains on them.

    Raises ValueError as `AutoencoderKL`.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 3,
        codes: int = 8192,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_blocks: int = 2,
        scale: float = 1.0,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        stack.check(remat)
        self.channels, self.latent_channels, self.scale = channels, latent_channels, scale
        self.factor = 2 ** (len(channel_mult) - 1)
        widths = [width * mult for mult in channel_mult]
        self.encoder = Encoder(channels, latent_channels, widths, num_blocks, dtype, remat, rngs=rngs)
        self.decoder = Decoder(latent_channels, channels, widths, num_blocks, dtype, remat, rngs=rngs)
        self.quant_conv = Conv(latent_channels, latent_channels, 1, init=_INIT, dtype=dtype, rngs=rngs)
        self.post_quant_conv = Conv(latent_channels, latent_channels, 1, init=_INIT, dtype=dtype, rngs=rngs)
        self.codebook = Embedding(codes, latent_channels, 1 / codes, rngs=rngs)

    def encode(self, x_BHWC: Array) -> Array:
        """Scaled latents (B, H/f, W/f, c), at least float32, eq. 2."""
        check_images(x_BHWC, self.channels, self.factor)
        return _wide(self.quant_conv(self.encoder(x_BHWC))) * self.scale

    def decode(self, z_BHWC: Array) -> Array:
        """Images (B, H, W, C) of scaled latents, eq. 4, in their type; about -1..1, not clipped."""
        _check_latents(z_BHWC, self.latent_channels)
        codes = self.codebook(self.nearest(z_BHWC))
        return self.decoder(self.post_quant_conv(codes)).astype(z_BHWC.dtype)

    def nearest(self, z_BHWC: Array) -> Array:
        """int32 (B, H/f, W/f): the code at the least distance of each scaled latent."""
        z, codes = _wide(z_BHWC) / self.scale, self.codebook.embedding[...]
        # channel by channel: a product would be rounded where products are, and held for all codes at once
        squares = (jnp.square(z[..., c, None] - codes[:, c].reshape(1, 1, 1, -1)) for c in range(self.latent_channels))
        return jnp.argmin(functools.reduce(jnp.add, squares), axis=-1).astype(jnp.int32)


class Encoder(nnx.Module):
    """(B, H, W, inputs) -> (B, H/f, W/f, outputs), with widths[i] channels at level i; level 0 is the image's."""

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], num_blocks: int, dtype: Any, remat: str, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.remat, options = remat, dict(init=_INIT, dtype=dtype, rngs=rngs)
        self.conv_in = Conv(inputs, widths[0], 3, **options)
        self.down = nnx.List()
        for level, width in enumerate(widths):
            # zeros on the right and below only
            half = Conv(width, width, 3, stride=2, pad=(0, 1), **options) if level < len(widths) - 1 else None
            self.down.append(Level(widths[max(level - 1, 0)], width, num_blocks, half, dtype, rngs=rngs))
        self.mid = Middle(widths[-1], dtype, rngs=rngs)
        self.norm_out = _norm(widths[-1], rngs=rngs)
        self.conv_out = Conv(widths[-1], outputs, 3, **options)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x, self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x, self.remat))))


class Decoder(nnx.Module):
    """(B, H/f, W/f, inputs) -> (B, H, W, outputs): the encoder's levels from the last to 0, one block more in each."""

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], num_blocks: int, dtype: Any, remat: str, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.remat, options = remat, dict(init=_INIT, dtype=dtype, rngs=rngs)
        self.conv_in = Conv(inputs, widths[-1], 3, **options)
        self.mid = Middle(widths[-1], dtype, rngs=rngs)
        self.up = nnx.List()
        for level, width in enumerate(widths):
            double = Double(width, dtype, rngs=rngs) if level > 0 else None
            before = widths[min(level + 1, len(widths) - 1)]
            self.up.append(Level(before, width, num_blocks + 1, double, dtype, rngs=rngs))
        self.norm_out = _norm(widths[0], rngs=rngs)
        self.conv_out = Conv(widths[0], outputs, 3, **options)

    def __call__(self, x: Array) -> Array:
        x = self.mid(self.conv_in(x), self.remat)
        for level in reversed(self.up):
            x = level(x, self.remat)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution, the first with its own width before it; then what leads to the next level."""

    def __init__(
        self, inputs: int, outputs: int, num_blocks: int, resample: nnx.Module | None, dtype: Any, *, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(ResBlock(outputs if i else inputs, outputs, dtype, rngs=rngs) for i in range(num_blocks))
        self.resample = resample

    def __call__(self, x: Array, remat: str) -> Array:
        for block in self.blocks:
            x = stack.remat(block, remat)(x)
        return x if self.resample is None else self.resample(x)


class Double(nnx.Module):
    """(B, H, W, C) -> (B, 2H, 2W, C): every place four times, then a 3x3 convolution.

    The nine places that an output sees hold only four values of x: the weights of equal ones are added first, and a 2x2
    convolution of x gives every second output. It takes 4/9 of the products, and saves a CPU a sixth of a decoding.
    """

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, 3, init=_INIT, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, height, width, c = x.shape
        x = x if self.conv.dtype is None else x.astype(self.conv.dtype)
        parts = [_every_second(x, self.conv.kernel[...], row, column) for row in (0, 1) for column in (0, 1)]
        y = jnp.stack(parts, axis=3).reshape(b, height, width, 2, 2, c)
        return y.swapaxes(2, 3).reshape(b, 2 * height, 2 * width, c) + over_channels(self.conv.bias[...], x)


def _every_second(x: Array, kernel: Array, row: int, column: int) -> Array:
    """Outputs 2i + row, 2j + column of `Double`, (B, H, W, C)."""

    def fold(k: Array, odd: int) -> Array:
        """(3, ...) -> (2, ...): an even output sees the place before its own once, an odd one the place after."""
        return jnp.stack([k[0] + k[1], k[2]] if odd else [k[0], k[1] + k[2]])

    folded = fold(fold(kernel, row).swapaxes(0, 1), column).swapaxes(0, 1).astype(x.dtype)
    pads = [(1 - row, row), (1 - column, column)]
    return jax.lax.conv_general_dilated(x, folded, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Middle(nnx.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        self.block0 = ResBlock(width, width, dtype, rngs=rngs)
        self.attention = Attention(width, dtype, rngs=rngs)
        self.block1 = ResBlock(width, width, dtype, rngs=rngs)

    def __call__(self, x: Array, remat: str) -> Array:
        for block in (self.block0, self.attention, self.block1):
            x = stack.remat(block, remat)(x)
        return x


class ResBlock(nnx.Module):
    """Two convolutions, each behind normalisation and SiLU, added to x."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, *, rngs: nnx.Rngs):
        options = dict(init=_INIT, dtype=dtype, rngs=rngs)
        self.norm1, self.conv1 = _norm(inputs, rngs=rngs), Conv(inputs, outputs, 3, **options)
        self.norm2, self.conv2 = _norm(outputs, rngs=rngs), Conv(outputs, outputs, 3, **options)
        self.skip = Conv(inputs, outputs, 1, **options) if inputs != outputs else None

    def __call__(self, x: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nnx.Module):
    """Every place attends to all others with one head as wide as x, added to x."""

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        options = dict(init=_INIT, dtype=dtype, rngs=rngs)
        self.norm, self.qkv = _norm(width, rngs=rngs), Linear(width, 3 * width, **options)
        self.out = Linear(width, width, **options)

    def __call__(self, x: Array) -> Array:
        b, height, width, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, height * width, 1, 3 * c)
        attended = attention.attend(*jnp.split(qkv, 3, axis=-1))
        return x + self.out(attended.reshape(x.shape))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_images(x_BHWC: Array, channels: int, factor: int) -> None:
    """Raises ValueError for images that are not (B, H, W, channels) with sides that `factor` divides."""
    shape = x_BHWC.shape
    if len(shape) != 4 or shape[3] != channels or shape[1] % factor or shape[2] % factor or not shape[1] * shape[2]:
        raise ValueError(
            f"found images of shape {shape}, expected (B, H, W, {channels}) with H and W multiples of {factor}: "
            "crop or resize them, or give the autoencoder other channels"
        )


def _check_latents(z_BHWC: Array, channels: int) -> None:
    if z_BHWC.ndim != 4 or z_BHWC.shape[3] != channels:
        raise ValueError(
            f"found latents of shape {z_BHWC.shape}, expected (B, h, w, {channels}): decode with the autoencoder "
            "that encoded them, channels last"
        )


# published autoencoders: the files' own factor and shift
PRESETS: dict[str, Callable[..., nnx.Module]] = {
    "sd_v1": AutoencoderKL,  # and v2, sd-vae-ft-ema, sd-vae-ft-mse: 8 times smaller, 4 channels
    "sdxl": functools.partial(AutoencoderKL, scale=0.13025),
    "sd3": functools.partial(AutoencoderKL, latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609),
    "ldm_vq_f4": VQModel,  # LDM at 256 pixels: 64 x 64 x 3, latents as they are
}
