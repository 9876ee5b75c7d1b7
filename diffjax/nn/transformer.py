"""Parts of transformer blocks: attention with its projections, the two-layer perceptron, modulation.

Tokens are (B, L, D). Projections of queries, keys and values are one product, [q | k | v] along the output.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Array
from diffjax.nn.attention import attend
from diffjax.nn.layers import Init, Linear
from diffjax.nn.norms import RMSNorm

XAVIER, ZERO = Init("xavier_uniform"), Init(weight=0.0)


def gelu(x: Array) -> Array:
    """GELU by its tanh approximation, which DiT and its heirs use. Hendrycks & Gimpel 2016, section 2."""
    return jax.nn.gelu(x, approximate=True)


def modulate(x_BLD: Array, shift_BD: Array, scale_BD: Array) -> Array:
    """x (1 + scale) + shift, the same for all tokens of a sample, in the type of x. Peebles & Xie 2023, section 3.2."""
    wide = x_BLD.astype(jnp.promote_types(x_BLD.dtype, shift_BD.dtype))
    return (wide * (1 + scale_BD[:, None, :]) + shift_BD[:, None, :]).astype(x_BLD.dtype)


def add_gated(x_BLD: Array, gate_BD: Array, update_BLD: Array) -> Array:
    """x + gate update, the same gate for all tokens of a sample, in the type of x. Peebles & Xie 2023, section 3.2."""
    wide = jnp.promote_types(x_BLD.dtype, gate_BD.dtype)
    return (x_BLD.astype(wide) + gate_BD[:, None, :] * update_BLD.astype(wide)).astype(x_BLD.dtype)


class Mlp(nnx.Module):
    """(..., D) -> (..., hidden) -> (..., outputs or D)."""

    def __init__(
        self, width: int, hidden: int, outputs: int = 0, activation: Callable[[Array], Array] = gelu, init: Init = XAVIER,
        init_out: Init | None = None, dtype: Any = None, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.activation = activation
        self.expand = Linear(width, hidden, init=init, dtype=dtype, split="columns", rngs=rngs)
        self.contract = Linear(hidden, outputs or width, init=init_out or init, dtype=dtype, split="rows", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.contract(self.activation(self.expand(x)))


class SelfAttention(nnx.Module):
    """Tokens attend to each other. qk_norm: queries and keys are normalised head by head (Dehghani 2023, eq. 3).
    project_out=False leaves the last product out: such a module is there for `project` only."""

    def __init__(
        self, width: int, heads: int, bias: bool = True, qk_norm: bool = False, inner: int = 0, out_bias: bool = True,
        init: Init = XAVIER, dtype: Any = None, project_out: bool = True, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        inner = inner or width  # of all heads together
        self.heads = heads
        self.qkv = Linear(width, 3 * inner, bias=bias, init=init, dtype=dtype, split="columns", rngs=rngs)
        self.norm_q = RMSNorm(inner // heads, rngs=rngs) if qk_norm else None
        self.norm_k = RMSNorm(inner // heads, rngs=rngs) if qk_norm else None
        if not project_out:
            self.out = None
            return
        self.out = Linear(inner, width, bias=out_bias, init=init, dtype=dtype, split="rows", rngs=rngs)

    def project(self, x_BLD: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values (B, L, N, C)."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv.parts(x_BLD, 3))
        return (q, k, v) if self.norm_q is None else (self.norm_q(q), self.norm_k(k), v)

    def __call__(
        self, x_BLD: Array, bias: Array | None = None, mask: Array | None = None, causal: bool = False
    ) -> Array:
        attended = attend(*self.project(x_BLD), bias=bias, mask=mask, causal=causal)
        return self.out(merge_heads(attended))


class CrossAttention(nnx.Module):
    """Tokens attend to a context (B, S, context_width), where mask (B, S), if given, is true."""

    def __init__(
        self, width: int, context_width: int, heads: int, bias: bool = True, qk_norm: bool = False, inner: int = 0,
        init: Init = XAVIER, init_out: Init = XAVIER, dtype: Any = None, *, rngs: nnx.Rngs,
    ):  # fmt: skip
        inner = inner or width
        self.heads = heads
        self.q = Linear(width, inner, bias=bias, init=init, dtype=dtype, split="columns", rngs=rngs)
        self.kv = Linear(context_width, 2 * inner, bias=bias, init=init, dtype=dtype, split="columns", rngs=rngs)
        self.norm_q = RMSNorm(inner // heads, rngs=rngs) if qk_norm else None
        self.norm_k = RMSNorm(inner // heads, rngs=rngs) if qk_norm else None
        self.out = Linear(inner, width, init=init_out, dtype=dtype, split="rows", rngs=rngs)

    def __call__(self, x_BLD: Array, context_BSD: Array, mask_BS: Array | None = None) -> Array:
        return self.look(x_BLD, *self.keys_values(context_BSD), mask_BS)

    def keys_values(self, context_BSD: Array) -> tuple[Array, Array]:
        """(B, S, N, C) each."""
        k, v = (split_heads(part, self.heads) for part in self.kv.parts(context_BSD, 2))
        return (k, v) if self.norm_k is None else (self.norm_k(k), v)

    def look(self, x_BLD: Array, k_BSNC: Array, v_BSNC: Array, mask_BS: Array | None = None) -> Array:
        """What tokens get that attend to these keys and values: (B, L, D)."""
        q = split_heads(self.q(x_BLD), self.heads)
        q = q if self.norm_q is None else self.norm_q(q)
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        return self.out(merge_heads(attend(q, k_BSNC, v_BSNC, mask=mask)))


def split_heads(x_BLD: Array, heads: int) -> Array:
    """(B, L, N C) -> (B, L, N, C)."""
    return x_BLD.reshape(*x_BLD.shape[:2], heads, -1)


def merge_heads(x_BLNC: Array) -> Array:
    """(B, L, N, C) -> (B, L, N C)."""
    return x_BLNC.reshape(*x_BLNC.shape[:2], -1)
