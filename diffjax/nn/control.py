"""What a network is told beside its semantics: sizes, crops and flips of a picture; and the padding of its text.

Control metadata (Berrada et al. 2024, section 3.1) joins the noise embedding, apart from class and text:

    c = E_high(phi_high) + gamma(u) E_low(phi_low)                                                           (1)

phi_high moves what is seen (corner of the crop, flip, aspect), phi_low changes its detail (size of the original). gamma
is 0 at pure noise (u = 1) and 1 at the data (u = 0), so that a size cannot choose the composition:

    "power_cosine"  (1 - cos(pi (1 - u)^alpha)) / 2       "cosine_power"  ((1 + cos(pi u)) / 2)^alpha        (2)
    "constant"      1, as Podell 2023

Each number becomes 256 cosines and sines, in pixels, a flip as 0 or 1; E is linear, SiLU, linear. Metadata of a sample
can be dropped (guidance): a learned vector stands for all of it, since a size of 0 is a size.

    embed = Control(width, high=("top", "left", "flip"), low=("height", "width"), rngs=rngs)
    c_BD = embed({"top": top_B, ..., "width": width_B, "u": u_B})             # all (B,)

Text tokens behind the real ones (section 3.3 there): `pad_text`.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core import guidance, names
from diffjax.core.types import Array, Cond, Key
from diffjax.nn import embeddings
from diffjax.nn.layers import Init
from diffjax.nn.transformer import ZERO, Mlp

FEATURES = 256  # cosines and sines of a number
METADATA = ("height", "width", "top", "left", "flip", "aspect")  # pixels; aspect = width / height


def cosine_power(u: Array, alpha: Array | float) -> Array:
    """(2), the same as `guidance.rising` at alpha = 1."""
    return ((1 + jnp.cos(jnp.pi * u)) / 2) ** alpha


WEIGHTS: Mapping[str, Callable[[Array, float], Array]] = {
    "power_cosine": guidance.rising, "cosine_power": cosine_power, "constant": lambda u, alpha: jnp.ones_like(u),
}  # fmt: skip


class Control(nnx.Module):
    """(1): cond with each number (B,) of `high` and `low`, u (B,) in 0..1, and drop_control bool (B,), absent = nothing
    dropped -> (B, width) float32. zero_init: zero at first, whatever the metadata.

    Raises ValueError for names that are not in METADATA, an unknown weight, and metadata that is missing or misshapen.
    """

    def __init__(
        self, width: int, high: Sequence[str] = (), low: Sequence[str] = (), weight: str = "power_cosine",
        alpha: float = 4.0, zero_init: bool = True, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        unknown = [name for name in (*high, *low) if name not in METADATA]
        if unknown or len({*high, *low}) < len(high) + len(low) or not (high or low):
            raise ValueError(
                f"found metadata high={tuple(high)}, low={tuple(low)}; expected some of {METADATA}, each once"
            )
        self.names_high, self.names_low, self.alpha = tuple(high), tuple(low), alpha
        self.weight = names.lookup(WEIGHTS, weight, "model.metadata.weight")
        self.high, self.low = (_embedding(len(group), width, zero_init, rngs) for group in (high, low))
        self.null = nnx.Param(jnp.zeros(width))

    def __call__(self, cond: Cond, batch: int) -> Array:
        self._check(cond, batch)
        total = jnp.zeros((batch, self.null[...].shape[0]))
        if self.high is not None:
            total = total + self.high(_features(cond, self.names_high))
        if self.low is not None:
            total = total + self.weight(cond["u"], self.alpha)[:, None] * self.low(_features(cond, self.names_low))
        dropped = cond.get("drop_control")
        return total if dropped is None else jnp.where(dropped[:, None], self.null[...][None], total)

    def _check(self, cond: Cond, batch: int) -> None:
        needed = (*self.names_high, *self.names_low, *(("u",) if self.low is not None else ()))
        wrong = {name: getattr(cond.get(name), "shape", None) for name in needed}
        wrong = {name: shape for name, shape in wrong.items() if shape != (batch,)}
        if wrong:
            raise ValueError(
                f"this network is told {needed}; found cond of shapes {wrong}, expected ({batch},): set "
                "data.metadata=True, or take latents that were prepared with metadata"
            )


def _embedding(count: int, width: int, zero_init: bool, rngs: nnx.Rngs) -> Mlp | None:
    """E of `count` numbers, None of none."""
    last = ZERO if zero_init else None
    return Mlp(count * FEATURES, width, width, jax.nn.silu, Init("normal", 0.02), last, rngs=rngs) if count else None


def _features(cond: Cond, group: tuple[str, ...]) -> Array:
    parts = [embeddings.positional(cond[name].astype(jnp.float32), FEATURES) for name in group]
    return jnp.concatenate(parts, axis=-1)


# Text ----------------------------------------------------------------------------------------------------------

PADDINGS = ("zero", "replicate", "noisy_replicate")


def pad_text(
    text_BSD: Array, length_B: Array, kind: str = "noisy_replicate", beta: Array | float = 0.1, key: Key | None = None
) -> Array:
    """Tokens (B, S, D) whose first length_B (B,) >= 1 are real, the others made of them. Berrada 2024, section 3.3.

        zero             0
        replicate        e_(j mod n) at j >= n
        noisy_replicate  the same plus beta sqrt(S / n - 1) std_k z,  z ~ N(0, 1), std_k of channel k over real tokens

    With `key` None there is no noise (sampling). Every token is then attended to, none masked. Raises ValueError for an
    unknown kind and shapes that do not fit.
    """
    names.lookup(dict.fromkeys(PADDINGS), kind, "text_padding")
    batch, slots, _ = text_BSD.shape
    if length_B.shape != (batch,):
        raise ValueError(f"found text_length {length_B.shape} for text {text_BSD.shape}, expected ({batch},)")
    place, count = jnp.arange(slots)[None, :], length_B[:, None]
    is_real = (place < count)[..., None]
    if kind == "zero":
        return jnp.where(is_real, text_BSD, 0)
    padded = jnp.take_along_axis(text_BSD, (place % count)[..., None], axis=1)
    if kind == "replicate" or key is None:
        return padded
    wide = text_BSD.astype(jnp.float32)
    mean = jnp.sum(wide, axis=1, where=is_real, keepdims=True) / count[..., None]
    std = jnp.sqrt(jnp.sum((wide - mean) ** 2, axis=1, where=is_real, keepdims=True) / count[..., None])
    scale = beta * jnp.sqrt(slots / count - 1)[..., None] * std
    noise = scale * jax.random.normal(key, text_BSD.shape)
    return jnp.where(is_real, text_BSD, (padded + noise).astype(text_BSD.dtype))
