"""Dot-product attention with float32 softmax."""

import math

import jax
import jax.numpy as jnp

from diffjax.core.types import Array


def attend(q_BLNC: Array, k_BLNC: Array, v_BLNC: Array) -> Array:
    """softmax(q k^T / sqrt(C)) v for each of N heads: (B, L, N, C) each, the same shape back. Vaswani 2017, eq. 1."""
    scores = jnp.einsum("bqnc,bknc->bnqk", q_BLNC, k_BLNC / math.sqrt(k_BLNC.shape[-1]))
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
    return jnp.einsum("bnqk,bknc->bqnc", weights.astype(v_BLNC.dtype), v_BLNC)
