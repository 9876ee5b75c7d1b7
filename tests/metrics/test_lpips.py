"""LPIPS: equal to the `lpips` package under random weights, and the properties of a distance.

The weights of the classifiers are not at hand, so they are drawn; w is that of the package.
"""

import copy
import functools
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.metrics import lpips
from diffjax.weights import torch_file

NETS = ("vgg", "alex", "squeeze")
# (out, in, size) of AlexNet's convolutions, by index in torchvision's `features`
ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
ALEX_LINEAR = (64, 192, 384, 256, 256)


@pytest.fixture(scope="module")
def reference():
    """net -> (the package's module with drawn weights, SimpleNamespace of torch modules)."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    for name in ("lpips", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'diffjax[test]'")
    _import_torchvision(torch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips as package
    made = {}

    def make(net):
        if net not in made:
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                warnings.simplefilter("ignore")  # it uses old arguments of torchvision
                for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):  # seconds, for VGG
                    patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
                module = package.LPIPS(net=net, pnet_rand=True, verbose=False)
            made[net] = _draw(torch, module)
        return made[net], torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on images this small a second thread costs five times what it saves
    yield make
    torch.set_num_threads(threads)


def _import_torchvision(torch):
    """The published torchvision is built for CUDA: beside the CPU build of torch its operators do not load, and the
    registration of two of them ends the import. The networks need neither, so they are declared and left empty."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_torchvision.library = library  # undone where it is collected
    import torchvision  # noqa: F401


def _draw(torch, module):
    """He's deviation, so that no layer's features die out, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.net.parameters():
            deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
    return module


def torchvision_names(module) -> dict:
    """The package's backbone, "slice3.10.weight", by its names in torchvision, "features.10.weight"."""
    return {"features." + name.split(".", 1)[1]: value for name, value in module.net.state_dict().items()}


def images(height=64, width=70, seed=0, dtype=np.float32):
    """Two batches of 2 in [-1, 1], the second one near the first."""
    random = np.random.default_rng(seed)
    a = random.uniform(-1, 1, (2, height, width, 3))
    return a.astype(dtype), np.clip(a + 0.3 * random.standard_normal(a.shape), -1, 1).astype(dtype)


def torch_distance(torch, module, a, b, resize=None):
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (a, b))
    if resize:
        a, b = (torch.nn.functional.interpolate(x, size=(resize, resize), mode="bilinear") for x in (a, b))
    with torch.no_grad():
        return module(a, b).numpy().reshape(-1)


@pytest.fixture(scope="module")
def loaded(reference, tmp_path_factory):
    """net, options -> (distance, params) read from a file of torch.save, w from the package."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def read(net):
        module, torch = reference(net)
        torch.save(torchvision_names(module), folder / f"{net}.pth")
        return lpips.load(net, folder / f"{net}.pth", read=torch_file.load)

    def make(net, **options):
        distance, params = read(net)
        return lpips.make(net, **options) if options else distance, params

    return make


# Equal to the originals -----------------------------------------------------------------------------------------------

# float32 sums of up to 4608 products in another order: 1e-7 of values near 1, over up to 13 layers
TOLERANCE = 1e-5


@pytest.mark.parametrize("net", NETS)
def test_equals_the_lpips_package(reference, loaded, net):
    module, torch = reference(net)
    distance, params = loaded(net)
    # 64 x 70 is where SqueezeNet's pooling has a last window that is cut off
    a, b = images(33, 38) if net == "vgg" else images(64, 70)
    expected = torch_distance(torch, module, a, b)
    found = jax.jit(distance)(params, a, b)
    assert found.shape == (2,) and found.dtype == jnp.float32 and expected.min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_images_are_those_of_the_package(reference, loaded, net):
    module, torch = reference(net)
    (distance, params), least = loaded(net), lpips._NETS[net].least
    a, b = images(least, least + 1)
    assert np.all(np.isfinite(torch_distance(torch, module, a, b)))
    assert jax.eval_shape(distance, params, a, b).shape == (2,)
    with pytest.raises(ValueError, match=f"needs {least}x{least}: pass resize=224"):
        distance({}, a[:, 1:], b[:, 1:])
    with pytest.raises(RuntimeError, match="[Ss]ize"):
        torch_distance(torch, module, a[:, 1:], b[:, 1:])


def test_gradient_equals_torch_autograd(reference, loaded, x64):
    """In float64, where only the order of sums differs: 1e-16 times the number of products."""
    module, torch = reference("alex")
    module = copy.deepcopy(module).double()
    for name, values in (("shift", lpips._SHIFT), ("scale", lpips._SCALE)):  # they were rounded to float32
        setattr(module.scaling_layer, name, torch.tensor(values, dtype=torch.float64)[None, :, None, None])
    distance, params = loaded("alex")
    a, b = images(48, 40, dtype=np.float64)
    x = torch.from_numpy(a).permute(0, 3, 1, 2).requires_grad_()
    value = module(x, torch.from_numpy(b).permute(0, 3, 1, 2)).sum()
    value.backward()
    found, gradient = jax.jit(jax.value_and_grad(lambda params, a: distance(params, a, b).sum(), 1))(params, a)
    expected = x.grad.permute(0, 2, 3, 1).numpy()
    assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(found, value.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_average_pooling_and_resize_equal_torch(reference, loaded):
    """What `piq` does to VGG: 2x2 means in place of every max pooling, on resized images."""
    module, torch = reference("vgg")
    module = copy.deepcopy(module)
    for part in module.net.children():
        for name, child in part.named_children():
            if isinstance(child, torch.nn.MaxPool2d):
                setattr(part, name, torch.nn.AvgPool2d(2, 2))
    a, b = images(16, 20)
    expected = torch_distance(torch, module, a, b, resize=26)  # 26 -> 13 -> 6 -> 3 -> 1: odd sizes lose a row
    distance, params = loaded("vgg", pooling="average", resize=26)
    np.testing.assert_allclose(jax.jit(distance)(params, a, b), expected, rtol=TOLERANCE, atol=0)
    other = torch_distance(torch, reference("vgg")[0], a, b, resize=26)
    assert np.all(np.abs(other - expected) > 1e-2 * expected)  # the pooling matters here


@pytest.mark.parametrize("shape", [(32, 32), (50, 300), (224, 224), (449, 7)])
def test_resize_equals_interpolate(reference, shape):
    """Up, down, neither; float32 weights of two pixels: a few roundings of values up to 1."""
    torch = reference("alex")[1]
    a, _ = images(*shape)
    x = torch.from_numpy(a).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(lpips._resize(jnp.asarray(a), 224), expected.permute(0, 2, 3, 1), rtol=0, atol=2e-5)


def test_reads_a_torchvision_file_with_its_classifier(reference, loaded, tmp_path):
    """The whole network's state dict: classifier.* is left out, and what remains is the same as the backbone's."""
    module, torch = reference("squeeze")
    from torchvision import models

    whole = models.squeezenet1_1(weights=None)
    whole.load_state_dict(torchvision_names(module), strict=False)
    torch.save(whole.state_dict(), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    _, found = lpips.load("squeeze", tmp_path / "whole.pth", read=torch_file.load)
    assert any(name.startswith("classifier.") for name in whole.state_dict())
    jax.tree.map(np.testing.assert_array_equal, found, loaded("squeeze")[1])


# Without PyTorch ------------------------------------------------------------------------------------------------------


def weights():
    """(backbone, linear) of AlexNet, by PyTorch name."""
    random = np.random.default_rng(0)
    backbone = {"classifier.1.weight": np.zeros((4, 4), np.float32)}
    for index, (outputs, inputs, size) in ALEX.items():
        kernel = random.standard_normal((outputs, inputs, size, size)) * np.sqrt(2 / (inputs * size**2))
        backbone[f"features.{index}.weight"] = kernel.astype(np.float32)
        backbone[f"features.{index}.bias"] = np.full(outputs, 0.1, np.float32)
    linear = {
        f"lin{i}.model.1.weight": random.random((1, channels, 1, 1)).astype(np.float32)
        for i, channels in enumerate(ALEX_LINEAR)
    }
    return backbone, linear


@pytest.fixture(scope="module")
def alex():
    return jax.jit(lpips.make("alex")), lpips.to_params("alex", *weights())


@pytest.mark.fast
def test_a_distance_is_symmetric_and_zero_only_at_equality(alex):
    distance, params = alex
    a, b = images()
    forth, back = distance(params, a, b), distance(params, b, a)
    # a and b are computed apart, each with its own rounding: 1e-7 of a feature, squared where the images are equal
    np.testing.assert_allclose(forth, back, rtol=1e-5)
    equal, differs = np.asarray(distance(params, a, np.stack([a[0], b[1]])))  # samples are apart
    assert 0 <= equal < 1e-12
    np.testing.assert_allclose(differs, forth[1], rtol=1e-5)


def test_weights_land_where_they_belong():
    backbone, linear = weights()
    params = lpips.to_params("alex", backbone, linear)
    assert params["features"]["3"]["kernel"][4, 1, 7, 9] == backbone["features.3.weight"][9, 7, 4, 1]
    np.testing.assert_array_equal(params["linear"]["lin2"]["kernel"], linear["lin2.model.1.weight"].reshape(-1))
    half = lpips.to_params("alex", {name: array.astype(np.float16) for name, array in backbone.items()}, linear)
    assert half["features"]["0"]["bias"].dtype == np.float32


def test_gradients_are_finite_where_features_vanish(alex):
    distance, params = alex
    black = jnp.full((2, 64, 64, 3), -1.0)
    gradient = jax.jit(jax.grad(lambda params, x: distance(params, x, black).sum(), 1))
    far = gradient(params, images(64, 64)[0])
    assert np.all(np.isfinite(far))
    # 0 up to the roundings of two equal images, 1e-7 of the gradient of unlike ones
    assert np.abs(gradient(params, black)).max() < 1e-4 * np.abs(far).max()
    # all channels 0, or so small that their squares are
    for value in (0.0, 1e-30):
        assert np.all(np.isfinite(jax.grad(lambda f: lpips._unit(f)[..., 0].sum())(jnp.full((1, 2), value))))


def test_pixels_in_0_1_take_imagenets_mean_and_deviation():
    """Eq. 1 of 2 x - 1 is (x - mean) / deviation: what `piq` applies, whatever the range it is given."""
    np.testing.assert_allclose(lpips._SHIFT, 2 * np.array([0.485, 0.456, 0.406]) - 1, rtol=0, atol=1e-15)
    np.testing.assert_allclose(lpips._SCALE, 2 * np.array([0.229, 0.224, 0.225]), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.3.bias": None}, r"missing: features/3/bias float32\[192\]"),
        ({"features.12.weight": np.zeros((3, 3, 1, 1), np.float32)}, r"extra: features/12/kernel float32\[1,1,3,3\]"),
        ({"features.0.weight": np.zeros((64, 3, 7, 7), np.float32)}, "different: features/0/kernel, expected float32"),
        ({"lin1.model.1.weight": None}, "missing: linear/lin1/kernel"),
        ({"lin1.model.1.weight": np.zeros((2, 192, 1, 1), np.float32)}, "different: linear/lin1/kernel"),
        ({"lin5.model.1.weight": np.zeros((1, 8, 1, 1), np.float32)}, "extra: linear/lin5/kernel"),
        ({"state_dict": {}}, "'state_dict' is dict, expected floating-point numbers: give the state dict"),
        ({"features.0.bias": np.zeros(64, np.int64)}, "'features.0.bias' is int64"),
    ],
)
def test_every_difference_is_named(change, message):
    backbone, linear = weights()
    for name, value in change.items():
        (linear if name.startswith("lin") else backbone)[name] = value
    backbone, linear = ({k: v for k, v in group.items() if v is not None} for group in (backbone, linear))
    with pytest.raises(ValueError, match=message):
        lpips.to_params("alex", backbone, linear)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lpips.make("vgg19"), "'vgg19'.*did you mean 'vgg'"),
        (lambda: lpips.make("vgg", pooling="mean"), "expected 'max' or 'average'"),
        (lambda: lpips.make("alex", pooling="average"), "defined for 'vgg' only"),
        (lambda: lpips.make("alex", resize=30), "'alex' needs at least 31: use 224"),
        (lambda: lpips.make("alex")({}, jnp.zeros((1, 64, 64, 3)), jnp.zeros((2, 64, 64, 3))), "expected two"),
        (lambda: lpips.make("alex")({}, jnp.zeros((1, 64, 64, 1)), jnp.zeros((1, 64, 64, 1))), "expected two"),
    ],
)
def test_wrong_arguments_say_what_to_pass(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_linear_weights_come_from_the_package_or_a_path(monkeypatch, tmp_path):
    backbone, linear = weights()
    read = {Path("backbone"): backbone, Path("linear"): linear}
    _, params = lpips.load("alex", Path("backbone"), Path("linear"), read=read.__getitem__)
    assert params["linear"]["lin0"]["kernel"][5] == linear["lin0.model.1.weight"][0, 5, 0, 0]
    for found, state in ((None, "absent"), (SimpleNamespace(submodule_search_locations=[str(tmp_path)]), "incomplete")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(FileNotFoundError, match=f"{state}: type pip install --no-deps lpips.*v0.1/alex.pth"):
            lpips.load("alex", Path("backbone"), read=read.__getitem__)


def test_the_package_is_read_without_importing_it():
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("lpips is not installed: pip install --no-deps lpips")
    code = (
        "import sys\nfrom diffjax.metrics import lpips\nfrom diffjax.weights import torch_file\n"
        f"print([len(torch_file.load(lpips.package_linear_path(net))) for net in {NETS}])\n"
        "print([name for name in ('lpips', 'torch', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[5, 5, 7]", "[]"], done.stderr
