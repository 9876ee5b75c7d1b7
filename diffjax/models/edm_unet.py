"""The U-Nets of EDM (Karras 2022, appendix F): DDPM++ and NCSN++ of Song 2021, ADM of Dhariwal & Nichol 2021.

Raw networks F of (x, noise label, conditions), images (B, H, W, C). Blocks have the names of the
released PyTorch code ("enc/16x16_block0/conv0"), so its weights map by name, see `weights.edm`.

    DDPM++  SongUNet(embedding="positional", encoder="standard", taps=(1, 1))
    NCSN++  SongUNet(embedding="fourier", encoder="residual", taps=(1, 3, 3, 1), noise_channels_mult=2)
    ADM     DhariwalUNet

Conditions: label (int, num_classes = null), augment (B, 9), with `step_condition` what an SFD-v student is told
(Zhou 2024): a second embedding, and a second projection of it in every block; with `guidance_condition` the scale
(B,) that a guidance-distilled student stands for (Meng 2023), added to the noise embedding from zero weights.

`remat` names what a block keeps for a gradient, see `nn.stack`; "" = all.

`bottleneck` gives what AMED's predictor sees: the channel mean of the encoder's last state.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array, Cond, Key
from diffjax.models.edm_blocks import BlockStyle, Keys, UNetBlock
from diffjax.nn import embeddings, stack
from diffjax.nn.layers import Conv, Init, Linear
from diffjax.nn.norms import GroupNorm


class SongUNet(nnx.Module):
    """DDPM++ and NCSN++: x (B, R, R, in_channels), noise_label (B,) -> (B, R, R, out_channels). Song 2021, appendix H.

    Raises ValueError for an encoder or embedding it does not have, and for images of another size.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 4,
        attention_sizes: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding: str = "positional",
        encoder: str = "standard",
        taps: Sequence[float] = (1, 1),
        noise_channels_mult: int = 1,
        step_condition: bool = False,
        zero_init_step: bool = False,
        guidance_condition: bool = False,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        if embedding not in ("positional", "fourier") or encoder not in ("standard", "residual"):
            raise ValueError(
                f"found embedding={embedding!r}, encoder={encoder!r}; expected positional or fourier, standard or residual"
            )
        stack.check(remat)
        self.image_size, self.in_channels, self.num_classes, self.remat = image_size, in_channels, num_classes, remat
        self.noise_channels, self.channels, self.step_condition = channels * noise_channels_mult, channels, step_condition
        init, width = Init("xavier_uniform"), 4 * channels
        style = BlockStyle(
            embedding=width, eps=1e-6, skip_scale=math.sqrt(0.5), adaptive_scale=False, project_resampled=True,
            head_channels=None, init=init, init_zero=Init("xavier_uniform", 1e-5),
            init_attention=Init("xavier_uniform", math.sqrt(0.2)), taps=tuple(taps), dropout=dropout,
            step_condition=step_condition, zero_init_step=zero_init_step, dtype=dtype,
        )  # fmt: skip
        self.map_noise = embeddings.Fourier(self.noise_channels, rngs=rngs) if embedding == "fourier" else None
        if num_classes:
            self.map_label = Linear(num_classes, self.noise_channels, init=init, rngs=rngs)
        if augment_dim:
            self.map_augment = Linear(augment_dim, self.noise_channels, bias=False, init=init, rngs=rngs)
        if guidance_condition:
            self.map_guidance = _guidance_layer(self.noise_channels, rngs)
        self.map_layer0 = Linear(self.noise_channels, width, init=init, rngs=rngs)
        self.map_layer1 = Linear(width, width, init=init, rngs=rngs)
        if step_condition:
            self.map_step_layer0 = Linear(self.noise_channels, width, init=init, rngs=rngs)
            self.map_step_layer1 = Linear(width, width, init=init, rngs=rngs)
        shape = tuple(channel_mult), num_blocks, attention_sizes
        enc, skips, last = _encoder(self, style, channels, *shape, rngs, residual=encoder == "residual")
        dec, last = _decoder(self, style, last, skips, *shape, rngs, attend_last_only=True)
        dec[f"{image_size}x{image_size}_aux_norm"] = GroupNorm(last, 1e-6, rngs=rngs)
        dec[f"{image_size}x{image_size}_aux_conv"] = Conv(last, out_channels, 3, init=style.init_zero, dtype=dtype, rngs=rngs)
        _keep(self, enc, dec)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        x, skips, *rest = self._encode(x, noise_label, cond or {}, Keys(key))
        x = _decode(self, x, skips, *rest)
        size = self.image_size
        return self.dec[f"{size}x{size}_aux_conv"](jax.nn.silu(self.dec[f"{size}x{size}_aux_norm"](x)))

    def bottleneck(self, x: Array, noise_label: Array, cond: Cond | None = None) -> Array:
        """The encoder's last state, its channels averaged: (B, h w)."""
        return _channel_mean(self._encode(x, noise_label, cond or {}, Keys(None))[0])

    def _encode(self, x: Array, noise_label: Array, cond: Cond, keys: Keys) -> tuple:
        _check_input(self, x, cond)
        embedding = self._embed(noise_label, cond)
        step_embedding = _embed_step(self, cond, embedding, swap=True, channels=self.noise_channels)
        skips, aux = [], x
        for name in self.enc_names:
            block = self.enc[name]
            if name.endswith("aux_residual"):
                x = aux = skips[-1] = (x + block(aux)) * math.sqrt(0.5)
                continue
            x = _apply(self, block, (x,), embedding, step_embedding, keys)
            skips.append(x)
        return x, skips, embedding, step_embedding, keys

    def _embed(self, noise_label: Array, cond: Cond) -> Array:
        if self.map_noise is None:
            embedding = embeddings.positional(noise_label, self.noise_channels, endpoint=True)
        else:
            embedding = self.map_noise(noise_label)
        embedding = _add_guidance(self, cond, embeddings.swap_halves(embedding))
        if self.num_classes:
            # one-hot vectors of unit variance per entry
            embedding = embedding + self.map_label(_one_hot(self, cond, embedding) * math.sqrt(self.num_classes))
        if cond.get("augment") is not None:
            embedding = embedding + self.map_augment(cond["augment"])
        return jax.nn.silu(self.map_layer1(jax.nn.silu(self.map_layer0(embedding))))


class DhariwalUNet(nnx.Module):
    """ADM: x (B, R, R, in_channels), noise_label (B,) -> (B, R, R, out_channels). Dhariwal & Nichol 2021, section 3."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_sizes: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        step_condition: bool = False,
        zero_init_step: bool = False,
        guidance_condition: bool = False,
        dtype: Any = None,
        remat: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        stack.check(remat)
        self.image_size, self.in_channels, self.num_classes, self.remat = image_size, in_channels, num_classes, remat
        self.channels, self.step_condition = channels, step_condition
        width = 4 * channels
        init, zero = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3)), Init(weight=0.0)
        style = BlockStyle(
            embedding=width, eps=1e-5, skip_scale=1.0, adaptive_scale=True, project_resampled=False, head_channels=64,
            init=init, init_zero=zero, init_attention=init, dropout=dropout, step_condition=step_condition,
            zero_init_step=zero_init_step, dtype=dtype,
        )  # fmt: skip
        if augment_dim:
            self.map_augment = Linear(augment_dim, channels, bias=False, init=zero, rngs=rngs)
        if guidance_condition:
            self.map_guidance = _guidance_layer(channels, rngs)
        self.map_layer0 = Linear(channels, width, init=init, rngs=rngs)
        self.map_layer1 = Linear(width, width, init=init, rngs=rngs)
        if num_classes:
            label_init = Init("kaiming_normal", math.sqrt(num_classes))
            self.map_label = Linear(num_classes, width, bias=False, init=label_init, rngs=rngs)
        if step_condition:
            self.map_step_layer0 = Linear(channels, width, init=init, rngs=rngs)
            self.map_step_layer1 = Linear(width, width, init=init, rngs=rngs)
        shape = tuple(channel_mult), num_blocks, attention_sizes
        enc, skips, last = _encoder(self, style, channels * channel_mult[0], *shape, rngs)
        dec, last = _decoder(self, style, last, skips, *shape, rngs)
        _keep(self, enc, dec)
        self.out_norm = GroupNorm(last, 1e-5, rngs=rngs)
        self.out_conv = Conv(last, out_channels, 3, init=zero, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_label: Array, cond: Cond | None = None, key: Key | None = None) -> Array:
        x, skips, *rest = self._encode(x, noise_label, cond or {}, Keys(key))
        x = _decode(self, x, skips, *rest)
        return self.out_conv(jax.nn.silu(self.out_norm(x)))

    def bottleneck(self, x: Array, noise_label: Array, cond: Cond | None = None) -> Array:
        """The encoder's last state, its channels averaged: (B, h w)."""
        return _channel_mean(self._encode(x, noise_label, cond or {}, Keys(None))[0])

    def _encode(self, x: Array, noise_label: Array, cond: Cond, keys: Keys) -> tuple:
        _check_input(self, x, cond)
        embedding = embeddings.positional(noise_label, self.channels)
        embedding = _add_guidance(self, cond, embedding)
        if cond.get("augment") is not None:
            embedding = embedding + self.map_augment(cond["augment"])
        embedding = self.map_layer1(jax.nn.silu(self.map_layer0(embedding)))
        if self.num_classes:
            embedding = embedding + self.map_label(_one_hot(self, cond, embedding))
        embedding = jax.nn.silu(embedding)
        step_embedding = _embed_step(self, cond, embedding, swap=False, channels=self.channels)
        skips = []
        for name in self.enc_names:
            block = self.enc[name]
            x = _apply(self, block, (x,), embedding, step_embedding, keys)
            skips.append(x)
        return x, skips, embedding, step_embedding, keys


def _encoder(
    net, style, width, channel_mult, num_blocks, attention_sizes, rngs, residual=False
) -> tuple[dict[str, nnx.Module], list[int], int]:
    """Blocks from the image down, the width of the skip after each, and the final width.

    `residual` adds the image, filtered and halved again and again, to the state of every level.
    """
    options = dict(init=style.init, dtype=style.dtype, rngs=rngs)
    enc, skips, aux = {}, [], net.in_channels
    for level, mult in enumerate(channel_mult):
        size = net.image_size >> level
        if level == 0:
            enc[f"{size}x{size}_conv"] = Conv(net.in_channels, width, 3, **options)
        else:
            enc[f"{size}x{size}_down"] = UNetBlock(width, width, style, down=True, rngs=rngs)
            if residual:
                name = f"{size}x{size}_aux_residual"
                enc[name] = Conv(aux, width, 3, down=True, taps=style.taps, fused=True, **options)
                aux = width
        skips.append(width)
        for index in range(num_blocks):
            attend, outputs = size in attention_sizes, net.channels * mult
            enc[f"{size}x{size}_block{index}"] = UNetBlock(width, outputs, style, attend=attend, rngs=rngs)
            width = outputs
            skips.append(width)
    return enc, skips, width


def _decoder(
    net, style, width, skips, channel_mult, num_blocks, attention_sizes, rngs, attend_last_only=False
) -> tuple[dict[str, nnx.Module], int]:
    """Blocks from the lowest resolution up, and the final width; consumes `skips`."""
    dec = {}
    for level, mult in reversed(list(enumerate(channel_mult))):
        size = net.image_size >> level
        if level == len(channel_mult) - 1:
            dec[f"{size}x{size}_in0"] = UNetBlock(width, width, style, attend=True, rngs=rngs)
            dec[f"{size}x{size}_in1"] = UNetBlock(width, width, style, rngs=rngs)
        else:
            dec[f"{size}x{size}_up"] = UNetBlock(width, width, style, up=True, rngs=rngs)
        for index in range(num_blocks + 1):
            attend = size in attention_sizes and (index == num_blocks or not attend_last_only)
            inputs, width = width + skips.pop(), net.channels * mult
            dec[f"{size}x{size}_block{index}"] = UNetBlock(inputs, width, style, attend=attend, rngs=rngs)
    return dec, width


def _keep(net, enc: dict[str, nnx.Module], dec: dict[str, nnx.Module]) -> None:
    # merging sorts a dict, so the order is kept apart
    net.enc_names, net.dec_names = tuple(enc), tuple(dec)
    net.enc, net.dec = nnx.Dict(enc), nnx.Dict(dec)


def _decode(net, x: Array, skips: list[Array], embedding: Array, step_embedding: Array | None, keys: Keys) -> Array:
    for name in net.dec_names:
        block = net.dec[name]
        if isinstance(block, UNetBlock):
            inputs = (x, skips.pop()) if x.shape[-1] != block.inputs else (x,)
            x = _apply(net, block, inputs, embedding, step_embedding, keys)
    return x


def _apply(
    net, block: nnx.Module, inputs: tuple[Array, ...], embedding: Array, step_embedding: Array | None, keys: Keys
) -> Array:
    """A block of the encoder or decoder on the channels of all `inputs`."""
    if not isinstance(block, UNetBlock):
        return block(*inputs)

    def joined(inputs: tuple[Array, ...], *rest: Any) -> Array:
        # inside, so that what is kept is the skip, which the encoder keeps anyway
        return block(inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, axis=-1), *rest)

    return stack.remat(joined, net.remat)(inputs, embedding, step_embedding, keys.next())


def _embed_step(net, cond: Cond, embedding: Array, swap: bool, channels: int) -> Array | None:
    """The embedding (B, width) of the step condition, None where it is not given. Zhou 2024, released code."""
    step = cond.get("step")
    if step is None:
        return None
    raw = embeddings.positional(jnp.asarray(step, embedding.dtype).reshape(1), channels, endpoint=swap)
    raw = embeddings.swap_halves(raw) if swap else raw
    out = jax.nn.silu(net.map_step_layer1(jax.nn.silu(net.map_step_layer0(raw))))
    return jnp.broadcast_to(out, (embedding.shape[0], out.shape[-1]))


def _one_hot(net, cond: Cond, like: Array) -> Array:
    """(B, num_classes); the null class, also where no label is given, is the zero vector."""
    label = cond.get("label")
    if label is None:
        return jnp.zeros((like.shape[0], net.num_classes), like.dtype)
    return jax.nn.one_hot(label, net.num_classes, dtype=like.dtype)


def _check_input(net, x: Array, cond: Cond) -> None:
    expected = (net.image_size, net.image_size, net.in_channels)
    if x.shape[1:] != expected:
        raise ValueError(f"found images of shape {x.shape[1:]}, expected {expected}")
    if cond.get("step") is not None and not net.step_condition:
        raise ValueError("cond['step'] is given and this network has no step condition: set model.step_condition=True")


def _channel_mean(x: Array) -> Array:
    return jnp.mean(x, axis=-1).reshape(x.shape[0], -1)


def _guidance_layer(channels: int, rngs: nnx.Rngs) -> Linear:
    return Linear(channels, channels, bias=False, init=Init(weight=0.0), rngs=rngs)


def _add_guidance(net, cond: Cond, embedding: Array) -> Array:
    """The noise embedding (B, channels), with that of the guidance scale where it is given. Meng 2023, section 3.1."""
    scale = cond.get("guidance_scale")
    if scale is None:
        return embedding
    if not hasattr(net, "map_guidance"):
        raise ValueError("cond['guidance_scale'] is given to a network without it: set model.guidance_condition=True")
    return embedding + net.map_guidance(embeddings.positional(scale.astype(embedding.dtype), embedding.shape[-1]))
