"""The U-Net of Stable Video Diffusion: a picture and its noisy latents to a clip. Blattmann 2023, sections 3.1 and 4.2.

Stable Diffusion 2's U-Net (`models.unet`) with a layer over frames behind every layer within a frame, blended with its
input by a learned share s:

    x <- x + s temporal_resnet(x)                    behind each residual block                                  (1)
    z <- (1 - s) z + s temporal_block(z + p)         behind each transformer block, p: frame number, embedded    (2)

    net = SVDUNet(**PRESETS["svd"], rngs=rngs)
    f = net(x_BTHWC, noise_label_B, {"image": token_B1D, "image_latents": latents_BHWC, "control": numbers_B3})

x (B, T, H, W, channels), noisy latents of T frames, of any size; noise_label (B,) = ln(sigma) / 4. All conditions are
given, zeros in the unguided half for the first two:

    image           (B, S, context_width), what transformers attend to: the one CLIP token of the picture
    image_latents   (B, H, W, channels), the picture's latents, not scaled, behind the channels of every frame
    control         (B, controls): frames a second - 1, motion bucket, noise added to the picture; each as 256 cosines
                    and sines

The network is written as groups of operators, see `nn.groups`, which `run` runs. `keep` and `reuse` split it for a
sampler that computes the most of it only in some steps (Zhan 2024, section 4.3; Ma 2023, "DeepCache"). Blocks and
their order are those of `diffusers`, so its weights map by name, see `weights.svd`.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import names
from diffjax.core.types import Array, Cond, Key
from diffjax.models import unet
from diffjax.models.unet import CONTROL_FEATURES
from diffjax.models.unet_blocks import (
    GROUPS, INIT, ZERO, GatedMlp, ResBlock, Style, TransformerBlock, downsample, upsample,
)  # fmt: skip
from diffjax.models.video_blocks import (
    ANCHORS, TemporalResBlock, cross_attention, frames_of, of_frames, share_of_time, transform, videos_of,
)  # fmt: skip
from diffjax.nn import embeddings
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, Operator, Runner
from diffjax.nn.layers import Conv, Linear
from diffjax.nn.norms import GroupNorm, LayerNorm
from diffjax.nn.transformer import Mlp

# published networks; num_frames: of the clips they were trained on
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"svd": dict(num_frames=14), "svd_xt": dict(num_frames=25)})


class Given(NamedTuple):
    """What the layers are told of the videos, once for all frames."""

    frames: int
    video_F: Array  # int: the video that each of all frames is of
    embedding_BE: Array  # of noise level and controls, after its SiLU, float32
    context_BSD: Array


class SVDUNet(nnx.Module):
    """Raw network F: x (B, T, H, W, channels), noise_label (B,) -> (B, T, H, W, out_channels); 0 everywhere when new.

    transformer_depth: 1 for levels with transformers, 0 for others. heads: of their attention, for each level; the
    middle has those of the last. Raises ValueError for sizes that do not fit together, and for latents and conditions
    that are missing or misshapen.
    """

    def __init__(
        self,
        num_frames: int = 14,
        channels: int = 4,
        out_channels: int = 4,
        width: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        transformer_depth: Sequence[int] = (1, 1, 1, 0),
        heads: Sequence[int] = (5, 10, 20, 20),
        context_width: int = 1024,
        controls: int = 3,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        widths = [width * mult for mult in channel_mult]
        _check_levels(widths, transformer_depth, heads)
        self.num_frames, self.channels, self.width, self.dtype = num_frames, channels, width, dtype
        self.context_width, self.controls = context_width, controls
        self.time = Mlp(width, 4 * width, 4 * width, jax.nn.silu, INIT, rngs=rngs)
        self.added = Mlp(CONTROL_FEATURES * controls, 4 * width, 4 * width, jax.nn.silu, INIT, rngs=rngs)
        self.conv_in = Conv(2 * channels, width, 3, init=INIT, dtype=dtype, rngs=rngs)
        attention = functools.partial(Transformer, context_width=context_width, dtype=dtype, rngs=rngs)
        self._make_levels(widths, num_blocks, transformer_depth, heads, attention, rngs)
        self.norm_out = GroupNorm(width * channel_mult[0], 1e-5, GROUPS, rngs=rngs)
        self.conv_out = Conv(width * channel_mult[0], out_channels, 3, init=ZERO, dtype=dtype, rngs=rngs)

    def _make_levels(
        self, widths: Sequence[int], num_blocks: int, depths: Sequence[int], heads: Sequence[int], attention: Any,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        """The levels from the image down, the middle, and the levels up, which also see what every step down left."""
        last, options = len(widths) - 1, dict(dtype=self.dtype, rngs=rngs)

        def level(
            inputs: Sequence[int], width: int, eps: float, transformers: int, heads: int, resample: Conv | None
        ) -> Level:
            style = Style(4 * self.width, eps=eps, dtype=self.dtype)
            resnets = [Resnet(number, width, style, rngs=rngs) for number in inputs]
            return Level(resnets, [attention(width, heads=heads) for _ in range(transformers)], resample)

        skips, before, down = [self.width], self.width, []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            resample = downsample(width, **options) if i < last else None
            inputs = [before] + [width] * (num_blocks - 1)
            # the epsilons of the released networks
            down.append(level(inputs, width, 1e-6 if depth else 1e-5, depth * num_blocks, heads[i], resample))
            skips += [width] * (num_blocks + (i < last))
            before = width
        self.mid_block = level([before] * 2, before, 1e-5, 1, heads[-1], None)
        up = []
        for i, (width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            inputs = [(width if j else before) + skips.pop() for j in range(num_blocks + 1)]
            resample = upsample(width, **options) if i else None
            up.append(level(inputs, width, 1e-6, depth * (num_blocks + 1), heads[i], resample))
            before = width
        self.down_blocks, self.up_blocks = nnx.List(down), nnx.List(up)

    def __call__(
        self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None, run: Runner = PLAIN
    ) -> Array:
        """key is not used: there is no dropout."""
        return self.keep(x, noise_label, cond or {}, ANCHORS[0], run)[0]

    def keep(self, x: Array, noise_label: Array, cond: Cond, anchor: str, run: Runner = PLAIN) -> tuple[Array, Array]:
        """(F, feature) of a step that computes everything; the feature (B T, H, W, C) is for `reuse` in later steps.

        literal: what the last residual block gives. temporal: what the last layer is given by those before. deepcache:
        what the last layer but one is given by those before. Raises ValueError for other anchors.
        """
        stage = self._stage(anchor)
        given = self._given(x, noise_label, cond)
        states, skips = zip(*self._down(x, cond, given, run), strict=True)
        middle, inside = self.mid_block, run.within("mid_block")
        state = middle.convolve(0, states[-1], {}, (), given, inside)
        state = middle.convolve(1, middle.attend(0, state, given, inside), {}, (), given, inside)
        feature = self._up(state, skips, given, run, range(stage))
        return self._out(self._up(feature, skips, given, run, range(stage, self._stages)), given, run), feature

    def reuse(
        self, feature: Array, x: Array, noise_label: Array, cond: Cond, anchor: str, run: Runner = PLAIN
    ) -> Array:
        """F with the feature of another step: only what lies behind it is computed, and what that sees of the way down.
        Behind "literal" nothing sees x or noise_label. Zhan 2024, section 4.3."""
        stages = range(self._stage(anchor), self._stages)
        given = self._given(x, noise_label, cond)
        joins = sum(stage % 2 == 0 for stage in stages)
        skips = [skip for _, skip in itertools.islice(self._down(x, cond, given, run), joins)]
        return self._out(self._up(feature, skips, given, run, stages), given, run)

    def _down(self, x: Array, cond: Cond, given: Given, run: Runner) -> Iterator[tuple[Array, Array]]:
        """(B T, H, W, C) after each step of the way down, and what it leaves of it for the way up, in turn."""
        picture = cond["image_latents"].astype(x.dtype)
        operators = {
            "join": lambda x, video: jnp.concatenate([x, of_frames(picture, video)], axis=-1),
            "conv_in": lambda x, video: self.conv_in(x),
        }
        x, skip = run.stow(run("conv_in", FRAMES, operators, frames_of(x), given.video_F))
        yield x, skip
        for number, level in enumerate(self.down_blocks):
            inside = run.within(f"down_blocks/{number}")
            for index in range(len(level.resnets)):
                x = level.attend(index, level.convolve(index, x, {}, (), given, inside), given, inside)
                x, skip = run.stow(x)
                yield x, skip
            if level.resample is not None:
                x, skip = run.stow(inside("resample", FRAMES, {"resample": level.resample}, x))
                yield x, skip

    def _up(self, x: Array, skips: Sequence[Array], given: Given, run: Runner, stages: range) -> Array:
        """x after these stages of the way up; the stages of layer i are its residual block, 2 i, and its attention."""
        layers = [(number, index) for number, level in enumerate(self.up_blocks) for index in range(len(level.resnets))]
        for stage in stages:
            number, index = layers[stage // 2]
            level, inside = self.up_blocks[number], run.within(f"up_blocks/{number}")
            if stage % 2:
                x = level.attend(index, x, given, inside)
                continue
            join: dict[str, Operator] = {"join": lambda x, skip, video: jnp.concatenate([x, skip], axis=-1)}
            if index == 0 and number > 0:
                conv = self.up_blocks[number - 1].resample
                join = {"resample": lambda x, skip, video, conv=conv: conv(x, skip.shape[1:3])} | join
            x = level.convolve(index, x, join, (skips[len(layers) - 1 - stage // 2],), given, inside)
        return x

    def _out(self, x: Array, given: Given, run: Runner) -> Array:
        operators = {"norm_out": lambda x: jax.nn.silu(self.norm_out(x)), "conv_out": self.conv_out}
        return videos_of(run("conv_out", FRAMES, operators, x), given.frames)

    @property
    def _stages(self) -> int:
        """Of the way up."""
        return 2 * sum(len(level.resnets) for level in self.up_blocks)

    def _stage(self, anchor: str) -> int:
        """The first stage of the way up behind this feature."""
        behind = dict(zip(ANCHORS, (1, 2, 4), strict=True))
        return self._stages - names.lookup(behind, anchor, "anchor")

    def _given(self, x: Array, noise_label: Array, cond: Cond) -> Given:
        """Raises ValueError for latents and conditions that are missing or misshapen."""
        if x.ndim != 5 or x.shape[-1] != self.channels:
            raise ValueError(
                f"found latents of shape {x.shape}, expected (videos, frames, height, width, {self.channels}): those "
                "of the picture are cond['image_latents']"
            )
        batch, frames, height, width, _ = x.shape
        context = unet.given(cond, "image", (batch, None, self.context_width), "model.context_width")
        unet.given(cond, "image_latents", (batch, height, width, self.channels), "model.channels")
        control = unet.given(cond, "control", (batch, self.controls), "model.controls").astype(jnp.float32)
        features = embeddings.positional(control.reshape(-1), CONTROL_FEATURES).reshape(batch, -1)
        embedding = self.time(embeddings.positional(noise_label.astype(jnp.float32), self.width)) + self.added(features)
        context = context.astype(x.dtype if self.dtype is None else self.dtype)
        return Given(frames, jnp.repeat(jnp.arange(batch), frames), jax.nn.silu(embedding), context)


class Resnet(nnx.Module):
    """A residual block within frames, and one over frames behind it."""

    def __init__(self, inputs: int, outputs: int, style: Style, *, rngs: nnx.Rngs):
        self.spatial = ResBlock(inputs, outputs, style, rngs=rngs)
        self.temporal = TemporalResBlock(outputs, style.eps, style.embedding, dtype=style.dtype, rngs=rngs)


class Level(nnx.Module):
    """Residual blocks of one resolution, each with a transformer behind it if there are any, and the way on."""

    def __init__(self, resnets: list[Resnet], attentions: list["Transformer"], resample: Conv | None):
        self.resnets, self.attentions, self.resample = nnx.List(resnets), nnx.List(attentions), resample

    def convolve(
        self, index: int, x: Array, before: Mapping[str, Operator], others: Sequence[Array], given: Given, run: Runner
    ) -> Array:
        """x (B T, H, W, C) after the operators `before` (x, *others, video) and residual block `index`, eq. 1."""
        resnet, inside = self.resnets[index], run.within(f"resnets/{index}")

        def spatial(x: Array, *others: Array) -> Array:
            return resnet.spatial(x, of_frames(given.embedding_BE, others[-1]))

        x = inside("spatial", FRAMES, {**before, "resnet": spatial}, x, *others, given.video_F)
        return frames_of(resnet.temporal(videos_of(x, given.frames), given.embedding_BE, inside.within("temporal")))

    def attend(self, index: int, x: Array, given: Given, run: Runner) -> Array:
        """x after the transformer that follows residual block `index`, if there is one."""
        return self.attentions[index](x, given, run.within(f"attentions/{index}")) if len(self.attentions) else x


class Transformer(nnx.Module):
    """A transformer block over the positions of each frame, one over the frames of each position, added to x."""

    def __init__(self, width: int, context_width: int, heads: int, dtype: Any = None, *, rngs: nnx.Rngs):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm = GroupNorm(width, 1e-6, GROUPS, rngs=rngs)
        self.proj_in = Linear(width, width, init=INIT, **options)
        self.block = TransformerBlock(width, context_width, heads, **options)
        self.positions = Mlp(width, 4 * width, width, jax.nn.silu, INIT, rngs=rngs)
        self.norm_in, self.mlp_in = LayerNorm(width, 1e-5, affine=True, rngs=rngs), GatedMlp(width, **options)
        self.temporal = TransformerBlock(width, context_width, heads, **options)
        self.mix_factor = nnx.Param(jnp.full(1, 0.5))
        self.proj_out = Linear(width, width, init=ZERO, **options)

    def __call__(self, x: Array, given: Given, run: Runner) -> Array:
        cross, inside = cross_attention(self.block, given.context_BSD), run.within("spatial")

        def block(z: Array, video: Array) -> Array:
            tokens = z.reshape(z.shape[0], -1, z.shape[-1])
            return transform(self.block, tokens, lambda x: cross(x, video), inside).reshape(z.shape)

        operators = {"proj_in": lambda x, video: self.proj_in(self.norm(x)), "block": block}
        z = run("spatial", FRAMES, operators, x, given.video_F)
        operators = {"block": self._over_frames(given), "proj_out": lambda z, x: x + self.proj_out(z)}
        return frames_of(run("temporal", ROWS, operators, videos_of(z, given.frames), videos_of(x, given.frames)))

    def _over_frames(self, given: Given) -> Operator:
        """Eq. 2 for z (B, T, H, W, C)."""
        cross = cross_attention(self.temporal, given.context_BSD)
        numbers = jnp.arange(given.frames, dtype=jnp.float32)
        positions_TC = self.positions(embeddings.positional(numbers, self.proj_in.kernel.shape[0]))
        share = share_of_time(self.mix_factor[...])

        def of_videos(x_LTC: Array, batch: int) -> Array:
            """With cross-attention, of all positions of a video together."""
            return cross(x_LTC.reshape(batch, -1, x_LTC.shape[-1])).reshape(x_LTC.shape)

        def block(z: Array, _: Array) -> Array:
            b, t, h, w, c = z.shape
            y = z + positions_TC.astype(z.dtype).reshape(1, t, 1, 1, c)
            y_LTC = jnp.moveaxis(y, 1, 3).reshape(-1, t, c)
            y_LTC = y_LTC + self.mlp_in(self.norm_in(y_LTC))
            y_LTC = transform(self.temporal, y_LTC, lambda x: of_videos(x, b), PLAIN)
            y = jnp.moveaxis(y_LTC.reshape(b, h, w, t, c), 3, 1)
            return (z + share * (y - z)).astype(z.dtype)

        return block


def _check_levels(widths: Sequence[int], depths: Sequence[int], heads: Sequence[int]) -> None:
    """Raises ValueError for sizes that are not one a level, or do not fit the level's width."""
    if not len(widths) == len(depths) == len(heads) or not set(depths) <= {0, 1}:
        raise ValueError(
            f"found transformer_depth={tuple(depths)} and heads={tuple(heads)} for {len(widths)} levels; expected 0 or "
            "1 and a number of heads for each of model.channel_mult"
        )
    for width, number in zip(widths, heads, strict=True):
        if number < 1 or width % number:
            raise ValueError(f"found {number} heads for {width} channels; expected a divisor: set model.heads")
