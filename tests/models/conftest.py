"""Classes of transformers with drawn weights, the yardstick of the text and image encoders."""

import warnings

import numpy as np
import pytest

from diffjax.weights import keymap


@pytest.fixture(scope="session")
def drawn(transformers):
    """(class, config) -> the torch module with every weight drawn, also those that start as zero or one."""
    import torch

    def make(cls, config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = cls(config).eval()
        random = np.random.default_rng(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                values = random.standard_normal(parameter.shape)
                if "norm" in name or "ln_" in name:
                    values = 0.1 * values + (1 if name.endswith("weight") else 0)
                elif "embed" in name or "shared" in name or parameter.ndim < 2:
                    values = 0.5 * values
                else:
                    values = values / np.sqrt(np.prod(parameter.shape[1:]))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
        return module

    return make


class NamesFit(Exception):
    """All names and shapes were compared, and the first array was asked for."""


@pytest.fixture(scope="session")
def fits():
    """(table, torch module, our shapes): whether names and shapes are the same, without any array."""

    class Shaped:
        def __init__(self, tensor):
            self.shape = tuple(tensor.shape)

        def __array__(self, dtype=None, copy=None):
            raise NamesFit

    def compare(table, module, expected):
        with pytest.raises(NamesFit):
            keymap.to_params(table, {name: Shaped(tensor) for name, tensor in module.state_dict().items()}, expected)

    return compare
