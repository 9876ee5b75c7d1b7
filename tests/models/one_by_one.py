"""A Runner that runs the parts of every group one at a time, in Python, and what tests of networks of video share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.nn.functional import ParamKeys
from diffjax.nn.groups import PLAIN
from diffjax.nn.norms import GroupNorm, LayerNorm, merge


class OneByOne:
    """Up to `parts` parts of every axis, the last one about half as long as the others. `seen`: name of group -> (axis,
    its length, operators)."""

    def __init__(self, parts, prefix="", seen=None):
        self.parts, self.prefix, self.seen = parts, prefix, {} if seen is None else seen

    def __call__(self, name, axis, operators, x, *others):
        self.seen[self.prefix + name] = axis, x.shape[axis.index], tuple(operators)
        parts = zip(*(self._cut(array, axis) for array in (x, *others)), strict=True)
        return jnp.concatenate([PLAIN(name, axis, operators, *part) for part in parts], axis=axis.index)

    def moments(self, name, axis, norm, x):
        first, *rest = map(norm.moments, self._cut(x, axis))
        for part in rest:
            first = merge(first, part)
        return first

    def stow(self, x):
        return x, x

    def within(self, name):
        return OneByOne(self.parts, f"{self.prefix}{name}/", self.seen)

    def _cut(self, x, axis):
        length = x.shape[axis.index]
        size = -(-2 * length // (2 * self.parts - 1))
        return jnp.split(x, list(range(size, length, size)), axis=axis.index)


def distance(found, expected):
    """Relative in L2."""
    found, expected = (np.asarray(jax.device_get(array), np.float64) for array in (found, expected))
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def draw(module, golden_weights):
    """Every weight of a torch module drawn by its name, blends far from one half; their names to arrays."""
    import torch

    weights = {}
    for name, tensor in module.state_dict().items():
        values = golden_weights(name, tuple(tensor.shape))
        weights[name] = 15 * values if name.endswith("mix_factor") else values
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    module.eval().requires_grad_(False)
    return weights


def epsilons(constructor, table, part=""):
    """Of our normalisations, or of those of a part, by their names in `table`: drawn activations are too large for them
    to show. Stacked blocks are one each."""
    module = nnx.eval_shape(lambda: constructor(ParamKeys(jax.random.key(0))))
    module = getattr(module, part) if part else module
    norms = {path: norm for path, norm in nnx.iter_modules(module) if isinstance(norm, (GroupNorm, LayerNorm))}
    names = {path: table.theirs("/".join(map(str, (*path, "scale"))))[0].replace("{}", "0") for path in norms}
    return {names[path].removesuffix(".weight"): norm.eps for path, norm in norms.items()}


def their_epsilons(module):
    import torch

    norms = torch.nn.GroupNorm, torch.nn.LayerNorm
    return {name: part.eps for name, part in module.named_modules() if isinstance(part, norms)}


def to_torch(x_BTHWC):
    import torch

    return torch.from_numpy(np.moveaxis(np.array(x_BTHWC), -1, -3))


def from_torch(x):
    return np.moveaxis(x.numpy(), -3, -1)
