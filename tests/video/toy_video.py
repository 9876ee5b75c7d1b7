"""A network of video of a few matrices, with a feature at each anchor of step rehash."""

import jax
import jax.numpy as jnp

from diffjax.video import guided

CHANNELS, WIDTH, CONTEXT = 3, 8, 5
_SHAPES = {
    "first": (CHANNELS, WIDTH), "label": (1, WIDTH), "context": (CONTEXT, WIDTH), "deep": (WIDTH, WIDTH),
    "a": (WIDTH, WIDTH), "skip_a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH), "skip_b": (WIDTH, WIDTH), "last": (WIDTH, CHANNELS),
}  # fmt: skip


def init(seed=0):
    keys = zip(jax.random.split(jax.random.key(seed), len(_SHAPES)), _SHAPES.items(), strict=True)
    return {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, shape) in keys}


def _first(params, x, noise_label):
    level = noise_label.reshape(-1, 1, 1, 1, 1) * params["label"].reshape(1, 1, 1, 1, -1)
    return x @ params["first"] + jnp.tanh(level / 10)


def _deepcache(params, h, cond):
    context = (cond["text"] @ params["context"]).reshape(len(h), 1, 1, 1, -1)
    return jnp.tanh(jnp.mean(h, axis=1, keepdims=True) + h + context) @ params["deep"]


def _temporal(params, deep, h):
    return jnp.tanh(deep @ params["a"] + h @ params["skip_a"])


def _literal(params, middle, h):
    return jnp.tanh(middle @ params["b"] + h @ params["skip_b"])


def keep(params, x, noise_label, cond, anchor):
    h = _first(params, x, noise_label)
    seen = {"deepcache": _deepcache(params, h, cond)}
    seen["temporal"] = _temporal(params, seen["deepcache"], h)
    seen["literal"] = _literal(params, seen["temporal"], h)
    return seen["literal"] @ params["last"], seen[anchor]


def reuse(params, feature, x, noise_label, cond, anchor):
    h = _first(params, x, noise_label)
    if anchor == "deepcache":
        feature = _temporal(params, feature, h)
    if anchor in ("deepcache", "temporal"):
        feature = _literal(params, feature, h)
    return feature @ params["last"]


def full(params, x, noise_label, cond, key=None):
    return keep(params, x, noise_label, cond, "literal")[0]


NETWORK = guided.VideoNetwork(full, keep, reuse)
