"""Tables of names: every weight has one place, in both directions, and what does not fit is said by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.weights.keymap import KeyMap, to_params, to_weights

TABLE = KeyMap(
    {
        "blocks": "layers.{}",
        "blocks/qkv": ("layers.{}.to_q", "layers.{}.to_k", "layers.{}.to_v"),
        "down/*/conv": "input.*.0",
        "mid/project": "middle.proj",
    },
    pointwise=("mid/project",),
    ignored=(r"position_ids", r".*\.num_batches"),
)
SHAPES = {
    "blocks": {"qkv": {"kernel": (3, 4, 6), "bias": (3, 6)}, "norm": {"scale": (3, 4)}},
    "down": {0: {"conv": {"kernel": (3, 3, 2, 5), "bias": (5,)}}, 11: {"conv": {"kernel": (3, 3, 5, 2), "bias": (2,)}}},
    "mid": {"project": {"kernel": (4, 7)}},
    "table": {"embedding": (10, 4)},
    "gain": (),
}


def params(dtype=np.float32):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: random.standard_normal(shape).astype(dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def expected(dtype=jnp.float32):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), params())


@pytest.mark.fast
def test_names_and_layouts():
    ours = params()
    theirs = to_weights(TABLE, ours)
    shapes = {name: array.shape for name, array in theirs.items()}
    assert shapes == {
        **{f"layers.{i}.to_{part}.weight": (2, 4) for i in range(3) for part in "qkv"},
        **{f"layers.{i}.to_{part}.bias": (2,) for i in range(3) for part in "qkv"},
        **{f"layers.{i}.norm.weight": (4,) for i in range(3)},
        "input.0.0.weight": (5, 2, 3, 3), "input.0.0.bias": (5,), "input.11.0.weight": (2, 5, 3, 3), "input.11.0.bias": (2,),
        "middle.proj.weight": (7, 4, 1, 1), "table.weight": (10, 4), "gain": (),
    }  # fmt: skip
    np.testing.assert_array_equal(theirs["layers.2.to_k.weight"], ours["blocks"]["qkv"]["kernel"][2, :, 2:4].T)
    np.testing.assert_array_equal(theirs["layers.1.to_v.bias"], ours["blocks"]["qkv"]["bias"][1, 4:])
    np.testing.assert_array_equal(theirs["input.11.0.weight"][1, 3], ours["down"][11]["conv"]["kernel"][:, :, 3, 1])


@pytest.mark.parametrize("heads", [(2, 0), (8, 1)], ids=["two", "one_wide"])
def test_heads_side_by_side(heads):
    """[q | k | v] of two heads becomes q, k, v of the first and q, k, v of the second; kernels have a third axis."""
    table = KeyMap({"qkv": "to_all"}, sequential=("qkv", "out"), headwise={"qkv": heads})
    ours = {
        "qkv": {"kernel": np.arange(5 * 12.0).reshape(5, 12), "bias": np.arange(12.0)},
        "out": {"kernel": np.arange(20.0).reshape(4, 5), "bias": np.arange(5.0)},
    }
    theirs = to_weights(table, ours)
    order = [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11] if heads == (2, 0) else [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    np.testing.assert_array_equal(theirs["to_all.bias"], order)
    np.testing.assert_array_equal(theirs["to_all.weight"], ours["qkv"]["kernel"].T[order, :, None])
    np.testing.assert_array_equal(theirs["out.weight"], ours["out"]["kernel"].T[:, :, None])
    assert trees.compare(ours, to_params(table, theirs, ours)) == []
    jax.tree.map(np.testing.assert_array_equal, to_params(table, theirs, ours), ours)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_round_trip_is_bit_exact(dtype):
    ours = params(dtype)
    back = to_params(TABLE, {**to_weights(TABLE, ours), "position_ids": np.arange(3)}, expected(dtype))
    assert trees.compare(ours, back) == []
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, array in to_weights(TABLE, back).items():
        np.testing.assert_array_equal(array, to_weights(TABLE, ours)[name])


def test_what_does_not_fit_is_named_and_nothing_is_read_before():
    theirs = to_weights(TABLE, params())
    del theirs["layers.1.to_k.weight"]
    theirs["input.0.0.bias"] = np.zeros(6, np.float32)
    theirs["head.weight"] = np.zeros((2, 2), np.float32)
    read = []
    with pytest.raises(ValueError, match="the file does not fit, 3 differences") as error:
        to_params(TABLE, theirs, expected(), "the file", put=lambda path, array: read.append(path))
    assert "missing: layers.1.to_k.weight [2, 4], for blocks/qkv/kernel" in str(error.value)
    assert "different: input.0.0.bias, expected [5] for down/0/conv/bias, found [6]" in str(error.value)
    assert "extra: head.weight [2, 2]" in str(error.value)
    assert read == []


@pytest.mark.parametrize(("value", "dtype", "why"), [
    (1e5, jnp.float16, "its values are too large"), (np.nan, jnp.float32, "holds NaN or infinity"),
])  # fmt: skip
def test_weights_that_are_not_finite(value, dtype, why):
    theirs = to_weights(TABLE, params())
    theirs["table.weight"] = np.full((10, 4), value, np.float32)
    with pytest.raises(ValueError, match=f"table.weight is not finite as float.*{why}"):
        to_params(TABLE, theirs, expected(dtype))


def test_parts_that_are_not_equal():
    with pytest.raises(ValueError, match="qkv/bias has 7 outputs, which are no 3 equal parts"):
        to_weights(TABLE, {"blocks": {"qkv": {"bias": np.zeros((3, 7))}}})
