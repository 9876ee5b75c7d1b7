"""The U-Net of latent diffusion (Rombach 2022, section 3) and of its heirs: Stable Diffusion 1, 2 and XL, LDM-4-G.

Residual blocks on every level, transformers over the positions of a level where `transformer_depth` is not 0; text or
class reach the image through their cross-attention only, sizes and the text as a whole through the noise embedding
(Podell 2023, section 2.2). Networks without text or class (LDM-4 of faces and bedrooms) have attention="plain": one
layer of attention alone in place of each transformer.

    net = UNet(**PRESETS["sd_v1"], rngs=rngs)
    f = net(x_BHWC, noise_label_B, {"text": text_BSD})

x (B, H, W, channels), latents of any size that can be halved once for each level after the first; noise_label (B,) is
the index 0..999 of DDPM's noise level, or any number of that size. Conditions:

    text            (B, S, context_width), without num_classes and with transformers. Every token is attended to,
                    padding too, as these networks were trained: text_mask is not read
    label           int, with num_classes: one learned token in place of a text; absent = null, which is num_classes
    pooled          (B, pooled_width), the text as one vector
    control         (B, controls) numbers, each as 256 cosines and sines; SDXL's are height and width of the original,
                    top and left of the crop, height and width of the wanted picture
    height, ...     with metadata, the arguments of `nn.control.Control`: numbers (B,) that join the noise embedding
    step            with step_condition: what an SFD-v student is told (Zhou 2024): a second embedding, and a second
                    projection of it in every residual block
    guidance_scale  with guidance_condition: (B,), added to the noise features from zero weights (Meng 2023)

Blocks and their order are those of `diffusers`, so its weights map by name, see `weights.unet`. `remat` names what a
block keeps for a gradient, see `nn.stack`; "" = all.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Cond, Key
from diffjax.models.edm_blocks import Keys
from diffjax.models.unet_blocks import (
    GROUPS, INIT, ZERO, PlainAttention, ResBlock, SpatialTransformer, Style, downsample, upsample,
)  # fmt: skip
from diffjax.nn import embeddings, stack
from diffjax.nn.control import Control
from diffjax.nn.layers import Conv, Embedding, Linear
from diffjax.nn.norms import GroupNorm
from diffjax.nn.transformer import Mlp

CONTROL_FEATURES = 256  # cosines and sines of each number of cond["control"]

_STABLE_DIFFUSION = dict(image_size=64, channels=4, out_channels=4)
_ATTENTION = "transformer", "plain"
# arguments of published networks, and of two of their size for f8 latents of 256 x 256 images
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "sd_v1": dict(**_STABLE_DIFFUSION, context_width=768, heads=8),
    "sd_v2": dict(**_STABLE_DIFFUSION, context_width=1024, head_dim=64),
    "sdxl": dict(
        image_size=128, channels=4, out_channels=4, channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), head_dim=64,
        context_width=2048, pooled_width=1280, controls=6,
    ),
    # Rombach 2022, table 15
    "ldm4g": dict(
        image_size=64, channels=3, out_channels=3, width=192, channel_mult=(1, 2, 3, 5), transformer_depth=(0, 1, 1, 1),
        heads=1, context_width=512, num_classes=1000,
    ),
    # LDM-4 of LSUN-Bedroom, also of FFHQ and CelebA-HQ: Rombach 2022, table 12
    "ldm_bedroom": dict(
        image_size=64, channels=3, out_channels=3, width=224, channel_mult=(1, 2, 3, 4), transformer_depth=(0, 1, 1, 1),
        head_dim=32, attention="plain",
    ),
    "default": dict(
        image_size=32, channels=4, out_channels=4, channel_mult=(1, 2, 4), transformer_depth=(0, 1, 1), head_dim=64,
        context_width=768, pooled_width=768, controls=6,
    ),
    # the class-conditional example of Stability AI's generative-models: original size and corner of the crop
    "sgm_imagenet": dict(
        image_size=32, channels=4, out_channels=4, width=256, channel_mult=(1, 2, 4), transformer_depth=(1, 1, 1),
        head_dim=64, context_width=1024, num_classes=1000, controls=4,
    ),
})  # fmt: skip


Attention = SpatialTransformer | PlainAttention


class Level(nnx.Module):
    """Residual blocks of one resolution, attention after each of the first `len(attentions)`, and the way on."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention], resample: Conv | None):
        self.resnets, self.attentions, self.resample = nnx.List(resnets), nnx.List(attentions), resample

    def attend(self, index: int, x: Array, context: tuple[Array, ...]) -> Array:
        """x after the attention that follows residual block `index`, if there is one; context: what it is given."""
        return self.attentions[index](x, *context) if index < len(self.attentions) else x


class UNet(nnx.Module):
    """Raw network F: x (B, H, W, channels), noise_label (B,) -> (B, H, W, out_channels); 0 everywhere when new.

    transformer_depth counts the blocks of each transformer of a level, the middle has as many as the last level with
    any; with attention="plain" it is 1 for levels that attend. Each has `heads` heads, or as many as make them
    `head_dim` wide. Raises ValueError for sizes that do not fit
    together, for latents of another shape, and for conditions that are missing or misshapen.
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
        num_classes: int = 0,
        pooled_width: int = 0,
        controls: int = 0,
        dropout: float = 0.0,
        step_condition: bool = False,
        zero_init_step: bool = False,
        guidance_condition: bool = False,
        attention: str = "transformer",
        metadata: Mapping[str, Any] | None = None,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        stack.check(remat)
        depths = _checked_depths(tuple(transformer_depth), tuple(channel_mult), attention, num_classes)
        self.image_size, self.channels, self.width, self.remat = image_size, channels, width, remat
        self.num_classes, self.context_width, self.attention = num_classes, context_width, attention
        self.pooled_width, self.controls, self.step_condition = pooled_width, controls, step_condition
        self.halvings = len(depths) - 1
        self._check_size(image_size, image_size)
        self._make_embeddings(guidance_condition, rngs)
        self.metadata = Control(4 * width, **metadata, rngs=rngs) if metadata else None
        style = Style(4 * width, dropout, step_condition, zero_init_step, dtype=dtype)
        self.conv_in = Conv(channels, width, 3, init=INIT, dtype=dtype, rngs=rngs)
        self._make_levels([width * mult for mult in channel_mult], num_blocks, depths, heads, head_dim, style, rngs)
        self.norm_out = GroupNorm(width * channel_mult[0], style.eps, GROUPS, rngs=rngs)
        self.conv_out = Conv(width * channel_mult[0], out_channels, 3, init=ZERO, dtype=dtype, rngs=rngs)

    def _make_embeddings(self, guidance_condition: bool, rngs: nnx.Rngs) -> None:
        """Of the noise level, and of every condition that this network has."""
        width, outputs = self.width, 4 * self.width
        self.time = Mlp(width, outputs, outputs, jax.nn.silu, INIT, rngs=rngs)
        if self.pooled_width or self.controls:
            numbers = self.pooled_width + CONTROL_FEATURES * self.controls
            self.added = Mlp(numbers, outputs, outputs, jax.nn.silu, INIT, rngs=rngs)
        if self.num_classes:
            self.classes = Embedding(self.num_classes + 1, self.context_width, 1.0, rngs=rngs)
        if self.step_condition:
            self.step = Mlp(width, outputs, outputs, jax.nn.silu, INIT, rngs=rngs)
        if guidance_condition:
            self.map_guidance = Linear(width, width, bias=False, init=ZERO, rngs=rngs)

    def _make_levels(
        self, widths: list[int], num_blocks: int, depths: tuple[int, ...], heads: int, head_dim: int, style: Style,
        rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        """The levels from the image down, the middle, and the levels up, which also see what every step down left."""
        last, options = len(widths) - 1, dict(dtype=style.dtype, rngs=rngs)

        def attention(width: int, depth: int) -> Attention:
            num_heads = _heads(width, heads, head_dim)
            if self.attention == "plain":
                return PlainAttention(width, num_heads, remat=self.remat, **options)
            return SpatialTransformer(width, self.context_width, num_heads, depth, remat=self.remat, **options)

        def attentions(number: int, width: int, depth: int) -> list[Attention]:
            return [attention(width, depth) for _ in range(number if depth else 0)]

        skips, inputs, down = [self.width], self.width, []
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [ResBlock(inputs if index == 0 else width, width, style, rngs=rngs) for index in range(num_blocks)]
            resample = downsample(width, **options) if level < last else None
            down.append(Level(blocks, attentions(num_blocks, width, depth), resample))
            skips += [width] * (num_blocks + (level < last))
            inputs = width
        middle = next((depth for depth in reversed(depths) if depth), 0)
        blocks = [ResBlock(inputs, inputs, style, rngs=rngs) for _ in range(2)]
        self.mid_block = Level(blocks, attentions(1, inputs, middle), None)
        up = []
        for level in reversed(range(len(widths))):
            width, blocks = widths[level], []
            for _ in range(num_blocks + 1):
                blocks.append(ResBlock(inputs + skips.pop(), width, style, rngs=rngs))
                inputs = width
            resample = upsample(width, **options) if level else None
            up.append(Level(blocks, attentions(num_blocks + 1, width, depths[level]), resample))
        self.down_blocks, self.up_blocks = nnx.List(down), nnx.List(up)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        x, skips, context, *rest = self._encode(x, noise_label, cond or {}, Keys(key))
        for level in self.up_blocks:
            for index, resnet in enumerate(level.resnets):
                x = level.attend(index, self._apply(resnet, (x, skips.pop()), *rest), context)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))

    def bottleneck(self, x: Array, noise_label: Array, cond: Cond | None = None) -> Array:
        """The state after the middle, its channels averaged: (B, h w). Zhou 2024 (AMED), released code."""
        x = self._encode(x, noise_label, cond or {}, Keys(None))[0]
        return jnp.mean(x, axis=-1).reshape(x.shape[0], -1)

    def _encode(self, x: Array, noise_label: Array, cond: Cond, keys: Keys) -> tuple:
        """The state after the middle, what every block before left, and what all blocks are given."""
        self._check_input(x)
        embedding, step_embedding = self._embed(noise_label, cond), self._embed_step(noise_label, cond)
        rest = embedding, step_embedding, keys
        x = self.conv_in(x)
        context, skips = self._context(x, cond), [x]
        for level in self.down_blocks:
            for index, resnet in enumerate(level.resnets):
                x = level.attend(index, self._apply(resnet, (x,), *rest), context)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        middle = self.mid_block
        x = middle.attend(0, self._apply(middle.resnets[0], (x,), *rest), context)
        return self._apply(middle.resnets[1], (x,), *rest), skips, context, *rest

    def _apply(
        self, block: ResBlock, inputs: tuple[Array, ...], embedding: Array, step_embedding: Array | None, keys: Keys
    ) -> Array:
        """A residual block on the channels of all `inputs`."""

        def joined(inputs: tuple[Array, ...], *rest: Any) -> Array:
            # inside, so that what is kept is the skip, which the way down keeps anyway
            return block(inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, axis=-1), *rest)

        return stack.remat(joined, self.remat)(inputs, embedding, step_embedding, keys.next())

    def _embed(self, noise_label: Array, cond: Cond) -> Array:
        """Noise level, guidance scale, controls and pooled text as one vector (B, 4 width), after its SiLU."""
        features = embeddings.positional(_wide(noise_label), self.width)
        scale = cond.get("guidance_scale")
        if scale is not None:
            if not hasattr(self, "map_guidance"):
                raise ValueError(
                    "cond['guidance_scale'] is given to a network without it: set model.guidance_condition=True"
                )
            features = features + self.map_guidance(embeddings.positional(_wide(scale), self.width))
        embedding = self.time(features)
        if self.pooled_width or self.controls:
            embedding = embedding + self.added(self._added_features(noise_label.shape[0], cond).astype(embedding.dtype))
        if self.metadata is not None:
            embedding = embedding + self.metadata(cond, noise_label.shape[0])
        return jax.nn.silu(embedding)

    def _added_features(self, batch: int, cond: Cond) -> Array:
        """(B, pooled_width + 256 controls), [pooled | first control | ...]. Podell 2023, section 2.2."""
        parts = []
        if self.pooled_width:
            parts.append(given(cond, "pooled", (batch, self.pooled_width), "model.pooled_width"))
        if self.controls:
            control = _wide(given(cond, "control", (batch, self.controls), "model.controls"))
            parts.append(embeddings.positional(control.reshape(-1), CONTROL_FEATURES).reshape(batch, -1))
        return jnp.concatenate(parts, axis=-1)

    def _embed_step(self, noise_label: Array, cond: Cond) -> Array | None:
        """(B, 4 width) of the step condition after its SiLU, None where it is not given. Zhou 2024, released code."""
        step = cond.get("step")
        if step is None:
            return None
        if not self.step_condition:
            raise ValueError(
                "cond['step'] is given and this network has no step condition: set model.step_condition=True"
            )
        raw = embeddings.positional(_wide(jnp.asarray(step)).reshape(1), self.width)
        out = jax.nn.silu(self.step(raw))
        return jnp.broadcast_to(out, (noise_label.shape[0], out.shape[-1]))

    def _context(self, x: Array, cond: Cond) -> tuple[Array, ...]:
        """What transformers attend to, (B, S, context_width) in the type of x: the text, or the class as one token;
        nothing for plain attention."""
        if self.attention == "plain":
            return ()
        if self.num_classes:
            label = cond.get("label")
            label = jnp.full(x.shape[0], self.num_classes, jnp.int32) if label is None else label
            return (self.classes(label)[:, None, :].astype(x.dtype),)
        text = given(cond, "text", (x.shape[0], None, self.context_width), "model.context_width")
        return (text.astype(x.dtype),)

    def _check_input(self, x: Array) -> None:
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(f"found latents of shape {x.shape}, expected (batch, height, width, {self.channels})")
        self._check_size(*x.shape[1:3])

    def _check_size(self, height: int, width: int) -> None:
        multiple = 2**self.halvings
        if height % multiple or width % multiple:
            raise ValueError(
                f"found latents of {height} x {width}, which cannot be halved {self.halvings} times; expected "
                f"multiples of {multiple}: crop or pad the images, or set fewer levels in model.channel_mult"
            )


def _checked_depths(
    depths: tuple[int, ...], channel_mult: tuple[int, ...], attention: str, num_classes: int
) -> tuple[int, ...]:
    """Raises ValueError for depths that are not one a level, and for what plain attention does not have."""
    if len(depths) != len(channel_mult):
        raise ValueError(
            f"found transformer_depth={depths} for {len(channel_mult)} levels; expected a number for each of "
            f"model.channel_mult={channel_mult}"
        )
    if attention not in _ATTENTION:
        raise ValueError(f"found model.attention={attention!r}, expected one of {_ATTENTION}")
    if attention == "plain" and num_classes:
        raise ValueError(
            f"found {num_classes} classes, and no place for them in plain attention: set model.attention='transformer'"
        )
    if attention == "plain" and not set(depths) <= {0, 1}:
        raise ValueError(f"found transformer_depth={depths} for plain attention, expected 0 or 1 for each level")
    return depths


def _heads(width: int, heads: int, head_dim: int) -> int:
    """Of attention of this width. Raises ValueError where they do not divide it."""
    parts = head_dim or heads
    if parts < 1 or width % parts:
        found = f"heads of {head_dim}" if head_dim else f"{heads} heads"
        raise ValueError(f"found {found} for {width} channels; expected a divisor: set model.heads or model.head_dim")
    return width // head_dim if head_dim else heads


def given(cond: Cond, name: str, shape: tuple[int | None, ...], option: str) -> Array:
    """cond[name] of this shape, None for any number. Raises ValueError."""
    found, wanted = cond.get(name), "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if found is None:
        raise ValueError(f"cond[{name!r}] is missing; expected {wanted}, also for the unguided half of guidance")
    fits = [want in (None, have) for want, have in zip(shape, found.shape, strict=False)]
    if len(found.shape) != len(shape) or not all(fits):
        raise ValueError(
            f"found cond[{name!r}] of shape {found.shape}, expected {wanted}: does {option} fit what encodes it?"
        )
    return found


def _wide(values: Array) -> Array:
    """At least float32: cosines of numbers up to 1000."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
