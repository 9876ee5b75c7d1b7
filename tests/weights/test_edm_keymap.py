"""Weights by name: every difference is named."""

import jax
import numpy as np
import pytest

from diffjax.weights import edm

EXPECTED = {
    "enc": {"8x8_conv": {"kernel": np.zeros((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)}},
    "out_norm": {"scale": np.zeros(4, np.float32)},
}
WEIGHTS = {
    "model.enc.8x8_conv.weight": np.arange(36, dtype=np.float32).reshape(4, 1, 3, 3),
    "model.enc.8x8_conv.bias": np.ones(4, np.float32),
    "model.out_norm.weight": np.ones(4, np.float32),
}


@pytest.mark.fast
def test_names_and_layout():
    params = edm.to_params(WEIGHTS, EXPECTED)
    assert jax.tree.structure(params) == jax.tree.structure(EXPECTED)
    assert params["enc"]["8x8_conv"]["kernel"][2, 1, 0, 3] == WEIGHTS["model.enc.8x8_conv.weight"][3, 0, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.out_norm.weight": None}, "missing: out_norm/scale"),
        ({"model.out_norm.bias": np.zeros(4, np.float32)}, "extra: out_norm/bias"),
        ({"model.enc.8x8_conv.bias": np.zeros(5, np.float32)}, r"different: enc/8x8_conv/bias, expected float32\[4\]"),
        ({"model.enc.8x8_conv.bias": np.zeros(4)}, r"found float64\[4\]"),
        ({"model.strange": np.zeros((2, 2, 2), np.float32)}, "not a weight of these networks"),
    ],
)
def test_differences_are_named(change, message):
    weights = {name: value for name, value in {**WEIGHTS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        edm.to_params(weights, EXPECTED)
