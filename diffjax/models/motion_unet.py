"""The U-Net of AnimateDiff: Stable Diffusion's for each frame, and motion modules in which frames see each other.

A motion module follows every residual block and its transformer, also where a level has none, and, with `mid_motion`,
the transformer of the middle. It attends over the frames of one place, twice (Guo 2024, section 3.2):

    z = in(norm(x));    z = z + attention_i(LN_i(z) + p), i = 1, 2;    z = z + mlp(LN_3(z));    x + out(z)

with p the sines and cosines of the frame's number, added after each normalisation. `norm` has groups over the frames
too, as in `diffusers`, whose weights map by name (`weights.motion`); per_frame_norm=True: over the places of each frame
alone, as in the authors' code.

    net = MotionUNet(**PRESETS["animatediff_v2"], rngs=rngs)
    f = net(x_BTHWC, noise_label_B, {"text": text_BSD})

x (B, T, H, W, channels), T up to max_frames, latents of any size; text (B, S, context_width), one for each video; the
noise label as in `models.unet`. Parameters are "unet", those of a `UNet`, and "motion": either may come from elsewhere.

Operators are written in groups, see `nn.groups`, here by their names for level i and layer j:

    conv_in, conv_out                      frames  {conv_in}; {norm_out, conv_out}
    {down,up}_blocks/i/resnets/j/spatial   frames  {[resample, join,] resnet, attention}
    mid_block/resnets/{0,1}/spatial        frames  {resnet, attention}; {resnet}
    .../resnets/j/spatial/tokens           tokens  {self_attention, cross_attention, mlp}, inside of the group of frames
    .../motion_modules/j                   rows    {motion}, after the moments of its norm
    down_blocks/i/resample                 frames  {resample}

For feature reuse (Zhan 2024, section 4.3; Ma 2024), `keep` also returns what enters the last 0, 1 or 2 layers of the
way up, by the anchors "literal", "temporal" and "deepcache"; `reuse` takes it in place of all before.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import names, sinusoids
from diffjax.core.types import Array, Cond, Key
from diffjax.models.unet import UNet, given
from diffjax.models.unet_blocks import GROUPS, INIT, ZERO, GatedMlp, ResBlock, SpatialTransformer, TransformerBlock
from diffjax.models.video_blocks import frames_of, of_frames, transform, videos_of
from diffjax.nn import embeddings, stack
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, Operator, Runner
from diffjax.nn.layers import Conv, Linear
from diffjax.nn.norms import GroupNorm, LayerNorm, Moments
from diffjax.nn.transformer import SelfAttention

ANCHORS = MappingProxyType({"literal": 0, "temporal": 1, "deepcache": 2})  # layers of the way up that come after
# of the published motion modules, all for Stable Diffusion 1
_SD_V1 = dict(image_size=64, channels=4, out_channels=4)
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "animatediff_v1": dict(**_SD_V1, max_frames=24, mid_motion=False),
    "animatediff_v2": dict(**_SD_V1, max_frames=32, mid_motion=True),
    "animatediff_v3": dict(**_SD_V1, max_frames=32, mid_motion=False),
})  # fmt: skip


class MotionBlock(nnx.Module):
    """The frames of a place (B, T, D) attend to each other twice, then each passes a gated MLP."""

    def __init__(self, width: int, heads: int, dtype: Any = None, *, rngs: nnx.Rngs):
        options = dict(dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, 1e-5, affine=True, rngs=rngs) for _ in range(3))
        self.attention1, self.attention2 = (
            SelfAttention(width, heads, bias=False, init=INIT, **options) for _ in range(2)
        )
        self.mlp = GatedMlp(width, **options)

    def __call__(self, x_BTD: Array, positions_TD: Array) -> Array:
        for norm, attention in ((self.norm1, self.attention1), (self.norm2, self.attention2)):
            x_BTD = x_BTD + attention(norm(x_BTD) + positions_TD[None])
        return x_BTD + self.mlp(self.norm3(x_BTD))


class FrameNorm(NamedTuple):
    """A norm of frames, for videos (B, T, H, W, C)."""

    norm: GroupNorm

    def __call__(self, x: Array, moments: Moments | None) -> Array:
        return self.norm(frames_of(x), moments).reshape(x.shape)

    def moments(self, x: Array) -> Moments:
        return self.norm.moments(frames_of(x))


class MotionModule(nnx.Module):
    """`depth` blocks over the frames of each place of (B, T, H, W, C), added to it; adds nothing when new. Guo 2024,
    section 3.2."""

    def __init__(self, width: int, heads: int, depth: int, per_frame_norm: bool, dtype: Any = None, *, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"found {heads} heads for {width} channels; expected a divisor: set model.motion_heads")
        self.per_frame_norm = per_frame_norm
        self.norm = GroupNorm(width, 1e-6, GROUPS, rngs=rngs)
        self.proj_in = Linear(width, width, init=INIT, dtype=dtype, rngs=rngs)
        self.blocks = stack.stacked(lambda rngs: MotionBlock(width, heads, dtype, rngs=rngs), depth, rngs=rngs)
        self.proj_out = Linear(width, width, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, run: Runner, name: str) -> Array:
        norm = FrameNorm(self.norm) if self.per_frame_norm else self.norm
        moments = run.moments(name, ROWS, norm, x)
        positions = jnp.asarray(sinusoids.interleaved(x.shape[1], x.shape[-1]), x.dtype)
        return run(name, ROWS, {"motion": lambda x: x + self._moved(norm(x, moments), positions)}, x)

    def _moved(self, x: Array, positions_TD: Array) -> Array:
        b, t, h, w, c = x.shape
        tokens = self.proj_in(jnp.moveaxis(x, 1, 3).reshape(b * h * w, t, c))
        apply = lambda block, tokens, _: (block(tokens, positions_TD), None)  # noqa: E731
        tokens, _ = stack.scan(self.blocks, apply, tokens)
        return jnp.moveaxis(self.proj_out(tokens).reshape(b, h, w, t, c), 3, 1)


class MotionLevel(nnx.Module):
    """The motion modules of one level."""

    def __init__(self, modules: Sequence[MotionModule]):
        self.motion_modules = nnx.List(modules)


class Motion(nnx.Module):
    """All motion modules, after each residual block of a U-Net with `num_blocks` on a level of the way down."""

    def __init__(self, widths: Sequence[int], num_blocks: int, middle: bool, make: Callable[[int], MotionModule]):
        def level(width: int, number: int) -> MotionLevel:
            return MotionLevel([make(width) for _ in range(number)])

        self.down_blocks = nnx.List([level(width, num_blocks) for width in widths])
        self.mid_block = level(widths[-1], 1) if middle else None
        self.up_blocks = nnx.List([level(width, num_blocks + 1) for width in reversed(widths)])


class _Layer(NamedTuple):
    """What runs on one resolution: a residual block, what follows it, and what leads to it from the level before."""

    path: str  # of its level
    index: int
    resnet: ResBlock
    attention: SpatialTransformer | None
    motion: MotionModule | None
    resample: Conv | None = None


class _Told(NamedTuple):
    """What all layers are given: the noise as (B, E), the text, which video each frame is of (B T), and T."""

    embedding: Array
    text: Array
    video: Array
    frames: int


class MotionUNet(nnx.Module):
    """Raw network F: x (B, T, H, W, channels), noise_label (B,) -> (B, T, H, W, out_channels); 0 everywhere when new.

    motion_depth and motion_heads count the blocks of each motion module and their heads; other arguments are those of
    `UNet`. Raises ValueError for more frames than max_frames, for which a motion module was not trained, for arrays of
    other shapes and an unknown anchor. `key` is not used: there is no dropout.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        out_channels: int,
        width: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        transformer_depth: Sequence[int] = (1, 1, 1, 0),
        heads: int = 8,
        head_dim: int = 0,
        context_width: int = 768,
        motion_heads: int = 8,
        motion_depth: int = 1,
        max_frames: int = 32,
        mid_motion: bool = True,
        per_frame_norm: bool = False,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.channels, self.max_frames, self.context_width = channels, max_frames, context_width
        self.unet = UNet(
            image_size, channels, out_channels, width, channel_mult, num_blocks, transformer_depth, heads, head_dim,
            context_width, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        widths = [width * mult for mult in channel_mult]
        self.motion = Motion(
            widths, num_blocks, mid_motion,
            lambda width: MotionModule(width, motion_heads, motion_depth, per_frame_norm, dtype, rngs=rngs),
        )  # fmt: skip

    def __call__(
        self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None, run: Runner = PLAIN
    ) -> Array:
        return self.keep(x, noise_label, cond, run=run)[0]

    def keep(
        self, x: Array, noise_label: Array, cond: Cond | None = None, anchor: str = "literal", run: Runner = PLAIN
    ) -> tuple[Array, Array]:
        """What a call returns, and the feature (B T, H', W', C) for `reuse` with the same anchor and condition."""
        after, told, up = _after(anchor), self._tell(x, noise_label, cond), self._up()
        states, skips = zip(*self._descend(x, told, run), strict=True)
        left, middle = list(skips), self.unet.mid_block
        mid_motion = None if self.motion.mid_block is None else self.motion.mid_block.motion_modules[0]
        attention = middle.attentions[0] if middle.attentions else None
        x = self._layer(states[-1], _Layer("mid_block", 0, middle.resnets[0], attention, mid_motion), told, run)
        x = self._layer(x, _Layer("mid_block", 1, middle.resnets[1], None, None), told, run)
        x = self._ascend(x, up[: len(up) - after], left, told, run)
        feature = x
        return self._out(self._ascend(x, up[len(up) - after :], left, told, run), told, run), feature

    def reuse(
        self, feature: Array, x: Array, noise_label: Array, cond: Cond | None = None, anchor: str = "literal",
        run: Runner = PLAIN,
    ) -> Array:  # fmt: skip
        """What a call returns, of a feature that `keep` returned for another x and noise level."""
        after, told, up = _after(anchor), self._tell(x, noise_label, cond), self._up()
        skips = [skip for _, skip in itertools.islice(self._descend(x, told, run), after)]
        return self._out(self._ascend(feature, up[len(up) - after :], skips, told, run), told, run)

    def _tell(self, x: Array, noise_label: Array, cond: Cond | None) -> _Told:
        if x.ndim != 5 or x.shape[-1] != self.channels:
            wanted = f"(batch, frames, height, width, {self.channels})"
            raise ValueError(f"found latents of shape {x.shape}, expected {wanted}")
        b, t = x.shape[:2]
        if t > self.max_frames:
            raise ValueError(
                f"found {t} frames, expected up to {self.max_frames}: the motion module knows no more positions; make "
                "shorter videos, or take weights with a longer table and set model.max_frames"
            )
        text = given(cond or {}, "text", (b, None, self.context_width), "model.context_width")
        wide = noise_label.astype(jnp.promote_types(noise_label.dtype, jnp.float32))
        embedding = jax.nn.silu(self.unet.time(embeddings.positional(wide, self.unet.width)))
        return _Told(embedding, text.astype(x.dtype), jnp.repeat(jnp.arange(b), t), t)

    def _up(self) -> list[_Layer]:
        """Layers of the way up, in their order."""
        layers, resample = [], None
        for number, (level, motion) in enumerate(zip(self.unet.up_blocks, self.motion.up_blocks, strict=True)):
            for layer in _layers(f"up_blocks/{number}", level, motion):
                layers.append(layer._replace(resample=resample))
                resample = None
            resample = level.resample
        return layers

    def _descend(self, x: Array, told: _Told, run: Runner) -> Iterator[tuple[Array, Array]]:
        """The state (B T, H, W, C) after every step of the way down, and what this leaves for the way up, in turn."""
        x, skip = run.stow(run("conv_in", FRAMES, {"conv_in": self.unet.conv_in}, frames_of(x)))
        yield x, skip
        for index, (level, motion) in enumerate(zip(self.unet.down_blocks, self.motion.down_blocks, strict=True)):
            for layer in _layers(f"down_blocks/{index}", level, motion):
                x, skip = run.stow(self._layer(x, layer, told, run))
                yield x, skip
            if level.resample is not None:
                resample = {"resample": level.resample}
                x, skip = run.stow(run(f"down_blocks/{index}/resample", FRAMES, resample, x))
                yield x, skip

    def _ascend(self, x: Array, layers: Sequence[_Layer], skips: list[Array], told: _Told, run: Runner) -> Array:
        for layer in layers:
            x = self._layer(x, layer, told, run, skips.pop())
        return x

    def _layer(self, x: Array, layer: _Layer, told: _Told, run: Runner, skip: Array | None = None) -> Array:
        """(B T, H, W, C) after the layer. `skip` joins its input, which is brought to the skip's size first."""
        operators: dict[str, Operator] = {}
        if layer.resample is not None:
            operators["resample"] = lambda x, video, skip: layer.resample(x, skip.shape[1:3])
        if skip is not None:
            operators["join"] = lambda x, video, skip: jnp.concatenate([x, skip], axis=-1)
        operators["resnet"] = lambda x, video, *_: layer.resnet(x, of_frames(told.embedding, video))
        name = f"{layer.path}/resnets/{layer.index}/spatial"
        if layer.attention is not None:
            operators["attention"] = _attention(layer.attention, told.text, run.within(name))
        x = run(name, FRAMES, operators, x, told.video, *(() if skip is None else (skip,)))
        if layer.motion is None:
            return x
        return frames_of(layer.motion(videos_of(x, told.frames), run, f"{layer.path}/motion_modules/{layer.index}"))

    def _out(self, x: Array, told: _Told, run: Runner) -> Array:
        operators = {"norm_out": lambda x: jax.nn.silu(self.unet.norm_out(x)), "conv_out": self.unet.conv_out}
        return videos_of(run("conv_out", FRAMES, operators, x), told.frames)


def _layers(path: str, level: Any, motion: MotionLevel) -> list[_Layer]:
    """Of one level of a U-Net and its motion modules."""
    attentions = [*level.attentions, *[None] * len(level.resnets)]
    return [
        _Layer(path, index, resnet, attentions[index], module)
        for index, (resnet, module) in enumerate(zip(level.resnets, motion.motion_modules, strict=True))
    ]


def _attention(transformer: SpatialTransformer, text: Array, run: Runner) -> Operator:
    """The transformer on frames. Keys and values of the text are made once for each video, not for each frame."""
    make = lambda block, carry, _: (carry, block.cross_attention.keys_values(text))  # noqa: E731
    _, texts = stack.scan(transformer.blocks, make, None)

    def apply(x: Array, video: Array, *_: Array) -> Array:
        def step(block: TransformerBlock, tokens: Array, keys_values: tuple[Array, Array]) -> tuple[Array, None]:
            k, v = (of_frames(part, video) for part in keys_values)
            cross = lambda x: x + block.cross_attention.look(block.norm2(x), k, v)  # noqa: E731
            return transform(block, tokens, cross, run), None

        tokens = transformer.proj_in(transformer.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        tokens, _ = stack.scan(transformer.blocks, step, tokens, texts)
        return x + transformer.proj_out(tokens).reshape(x.shape)

    return apply


def _after(anchor: str) -> int:
    return names.lookup(ANCHORS, anchor, "anchor")
