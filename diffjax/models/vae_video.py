"""The autoencoder of Stable Video Diffusion: pictures are encoded one by one, frames decoded together.

The encoder is Stable Diffusion's (`models.vae`). The decoder is its decoder with a layer over frames behind every
residual block, blended with its input, and a convolution over frames at the end, all trained on videos against
flicker (Blattmann 2023, section D.1; Blattmann 2023b, "Align your Latents", section 3.1.1). With latents z scaled as
in `models.vae`,

    frames = decoder(z / scale)                                                                                  (1)

    vae = AutoencoderKLTemporalDecoder(rngs=rngs)
    latents_BHWC = vae.mode(x_BHWC)                  # not scaled: what the U-Net is conditioned on
    frames_BTHWC = vae.decode(z_BTHWC, run)

All frames are decoded at once: decoding them in parts, as others do to save memory, gives other frames, since
convolutions and normalisations reach over all of them. The decoder is written as groups of operators, see `nn.groups`;
run in slices these keep a part of a layer at a time and give the same frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Key
from diffjax.models.unet_blocks import GROUPS, INIT
from diffjax.models.vae import Attention, Double, Encoder, ResBlock, check_images, draw, gaussian
from diffjax.models.video_blocks import TemporalConv, TemporalResBlock, frames_of, videos_of
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, Operator, Runner
from diffjax.nn.layers import Conv
from diffjax.nn.norms import GroupNorm


class AutoencoderKLTemporalDecoder(nnx.Module):
    """Pictures with a Gaussian for each latent; clips of all frames' latents. Named as `diffusers` does.

    Its methods raise ValueError for pictures and latents of another shape.
    """

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        scale: float = 0.18215,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.channels, self.latent_channels, self.scale = channels, latent_channels, scale
        self.factor = 2 ** (len(channel_mult) - 1)
        widths, double = [width * mult for mult in channel_mult], 2 * latent_channels
        self.encoder = Encoder(channels, double, widths, num_blocks, dtype, "", rngs=rngs)
        self.quant_conv = Conv(double, double, 1, init=INIT, dtype=dtype, rngs=rngs)
        self.decoder = TemporalDecoder(latent_channels, channels, widths, num_blocks, dtype, rngs=rngs)

    def moments(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Mean and log variance of the latents before they are scaled, (B, H/f, W/f, c) each, at least float32."""
        check_images(x_BHWC, self.channels, self.factor)
        return gaussian(self.quant_conv(self.encoder(x_BHWC)))

    def encode(self, x_BHWC: Array, key: Key) -> Array:
        """Latents of pictures drawn with `key`, and scaled."""
        return draw(*self.moments(x_BHWC), key, self.scale)

    def mode(self, x_BHWC: Array) -> Array:
        """Latents without their noise, not scaled: cond["image_latents"] of `models.svd`."""
        return self.moments(x_BHWC)[0]

    def decode(self, z_BTHWC: Array, run: Runner = PLAIN) -> Array:
        """Frames (B, T, H, W, C) of scaled latents (B, T, H/f, W/f, c), eq. 1, in their type; about -1..1, not
        clipped."""
        if z_BTHWC.ndim != 5 or z_BTHWC.shape[-1] != self.latent_channels:
            raise ValueError(
                f"found latents of shape {z_BTHWC.shape}, expected (videos, frames, h, w, {self.latent_channels}): "
                "give all frames of a video together, channels last"
            )
        return self.decoder(z_BTHWC, self.scale, run.within("decoder"))


class TemporalDecoder(nnx.Module):
    """(B, T, H/f, W/f, inputs) -> (B, T, H, W, outputs), with widths[-1] channels at the lowest resolution, which is
    the first of `up`."""

    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], num_blocks: int, dtype: Any, *, rngs: nnx.Rngs
    ):
        options = dict(dtype=dtype, rngs=rngs)
        self.conv_in = Conv(inputs, widths[-1], 3, init=INIT, **options)
        self.mid = Level([widths[-1]] * 3, None, **options)
        self.attention = Attention(widths[-1], **options)
        self.up, before = nnx.List(), widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            double = Double(width, **options) if level else None
            self.up.append(Level([before] + [width] * (num_blocks + 1), double, **options))
            before = width
        self.norm_out = GroupNorm(widths[0], 1e-6, GROUPS, rngs=rngs)
        self.conv_out = Conv(widths[0], outputs, 3, init=INIT, **options)
        self.time_conv_out = TemporalConv(outputs, outputs, **options)

    def __call__(self, z_BTHWC: Array, scale: float, run: Runner) -> Array:
        frames, dtype, middle = z_BTHWC.shape[1], z_BTHWC.dtype, run.within("mid")
        wide = jnp.promote_types(dtype, jnp.float32)
        conv_in = {"conv_in": lambda z: self.conv_in(z.astype(wide) / scale)}
        x = self.mid.convolve(0, frames_of(z_BTHWC), conv_in, frames, middle)
        x = self.mid.convolve(1, x, {"attention": self.attention}, frames, middle)
        before: dict[str, Operator] = {}
        for number, level in enumerate(self.up):
            for index in range(len(level.blocks)):
                x = level.convolve(index, x, {} if index else before, frames, run.within(f"up/{number}"))
            before = {"resample": level.resample}
        operators = {"norm_out": lambda x: jax.nn.silu(self.norm_out(x)), "conv_out": self.conv_out}
        x = videos_of(run("conv_out", FRAMES, operators, x), frames)
        return run("time_conv_out", ROWS, {"time_conv_out": self.time_conv_out}, x).astype(dtype)


class Block(nnx.Module):
    """A residual block within frames, and one over frames behind it."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, *, rngs: nnx.Rngs):
        self.spatial = ResBlock(inputs, outputs, dtype, rngs=rngs)
        self.temporal = TemporalResBlock(outputs, 1e-5, swapped=True, dtype=dtype, rngs=rngs)


class Level(nnx.Module):
    """Blocks of one resolution, from widths[i] to widths[i + 1] channels each; then what leads to the next level."""

    def __init__(self, widths: Sequence[int], resample: Double | None, dtype: Any, *, rngs: nnx.Rngs):
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.blocks = nnx.List(Block(inputs, outputs, dtype, rngs=rngs) for inputs, outputs in pairs)
        self.resample = resample

    def convolve(self, index: int, x: Array, before: Mapping[str, Operator], frames: int, run: Runner) -> Array:
        """x (B T, H, W, C) after the operators `before` and block `index`."""
        block, inside = self.blocks[index], run.within(f"blocks/{index}")
        x = inside("spatial", FRAMES, {**before, "block": block.spatial}, x)
        return frames_of(block.temporal(videos_of(x, frames), None, inside.within("temporal")))
