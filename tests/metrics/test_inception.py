"""InceptionV3 and FID: equal to pytorch-fid and clean-fid under random weights; what its file must hold.

The weights are not at hand, so they are drawn, running statistics too, and go through a file as torch.save writes it.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from diffjax.build import evaluation, feature_spaces, image_sets, streams
from diffjax.metrics import fid, inception, stats
from diffjax.metrics.resize import resize
from diffjax.nn.functional import functionalize
from diffjax.weights import inception as file

BATCH = 4  # one for all, so that it is compiled once


@pytest.fixture(scope="module")
def published(pytorch_fid):
    """pytorch-fid's class with drawn weights: the classifier, and the wrapper that gives features."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # other work shares the cores; a second thread would wait for them
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "uniform_"):  # seconds; all is drawn below
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(torch.nn.Module, "load_state_dict", lambda module, _: _draw(torch, module))
        network = pytorch_fid.inception.fid_inception_v3().eval()
        patch.setattr(pytorch_fid.inception, "fid_inception_v3", lambda: network)
        wrapper = pytorch_fid.inception.InceptionV3().eval()
    yield network, wrapper, torch
    torch.set_num_threads(threads)


def _draw(torch, module):
    """He's deviation, so that features do not die out."""
    generator = torch.Generator().manual_seed(0)
    for name, values in module.state_dict().items():
        if values.ndim > 1:
            values.normal_(0, (2 / values[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            values.uniform_(0.5, 1.5, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            values.normal_(float(name.endswith("bn.weight")), 0.1, generator=generator)


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(functionalize(lambda rngs: inception.InceptionV3(rngs=rngs))[1], jax.random.key(0))


@pytest.fixture(scope="module")
def extract(published, shapes, tmp_path_factory):
    """x (B, 299, 299, 3) in [0, 255], resizing -> Features as NumPy arrays, with the published network's weights."""
    network, _, torch = published
    folder = tmp_path_factory.mktemp("weights")
    torch.save(network.state_dict(), folder / file.FILE)
    params = jax.device_put(file.load(folder, shapes))
    run = jax.jit(functionalize(lambda rngs: inception.InceptionV3(rngs=rngs))[0])

    def features(x, how):
        parts = [run(params, inception.normalise(x[i : i + BATCH], how)) for i in range(0, len(x), BATCH)]
        return inception.Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    features.folder = folder
    return features


def drawn(number, height, width, seed=0):
    """Pictures of smooth colours, uint8."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (number, 4, 5, 3), np.uint8)
    bicubic = PIL.Image.Resampling.BICUBIC
    pictures = [PIL.Image.fromarray(picture).resize((width, height), bicubic) for picture in coarse]
    noisy = np.stack(pictures) + random.normal(0, 5 + 10 * seed, (number, height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


# Equal to the published tools -----------------------------------------------------------------------------------------


def test_features_equal_pytorch_fids_network(published, extract):
    """Largest difference over the deviation of all features of an output; float32 through up to 48 convolutions. The
    spatial ones, no means over places, are each 8e-6 from pytorch-fid's network in float64, pooled ones 2e-6 to 4e-6."""
    network, wrapper, torch = published
    images, tapped = drawn(BATCH, 40, 56), []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: tapped.append(output))
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        pool = wrapper(x)[0].flatten(1).numpy()
        whole = network(2 * torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear") - 1)
        logits = (whole - network.fc.bias).numpy()
    hook.remove()
    spatial = tapped[0].permute(0, 2, 3, 1)[..., :7].flatten(1).numpy()
    found = extract(resize(images, 299, "torch"), "torch")
    for ours, theirs, tolerance in zip(found, (pool, spatial, logits), (1e-5, 2e-5, 1e-5), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32 and theirs.std() > 0.3
        difference = np.abs(ours - theirs) / theirs.std()
        assert difference.max() < tolerance and np.sqrt(np.mean(difference**2)) < 3e-6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sets of pictures, and the folders that hold them as PNG."""
    sets = [drawn(4, 48, 40, seed) for seed in (1, 2)]
    paths = [tmp_path_factory.mktemp(f"set{i}") for i in range(2)]
    for images, path in zip(sets, paths, strict=True):
        for i, image in enumerate(images):
            PIL.Image.fromarray(image).save(path / f"{i:03}.png")
    return sets, paths


def distance(extract, sets, how):
    """FID of two sets of images by our own code alone."""
    totals = [stats.moments(extract(resize(images, 299, how), how).pool) for images in sets]
    return fid.frechet_distance(totals[0].mean, totals[0].covariance, totals[1].mean, totals[1].covariance)


def in_their_span(frechet, features):
    """Their distance of two sets of features, in an orthonormal basis of what both sets span, which moves no distance:
    their root of a matrix takes 22 s at 2048 dimensions."""
    basis = np.linalg.qr(np.concatenate(features).T.astype(np.float64))[0]
    projected = [one @ basis for one in features]
    (mean_1, cov_1), (mean_2, cov_2) = ((one.mean(0), np.cov(one, rowvar=False)) for one in projected)
    return frechet(mean_1, cov_1, mean_2, cov_2)


@pytest.fixture(scope="module")
def pytorch_fids(published, pytorch_fid, folders):
    """Its FID of both folders."""
    score = pytorch_fid.fid_score
    files = [sorted(path.glob("*.png")) for path in folders[1]]
    features = [score.get_activations(names, published[1], BATCH, 2048, "cpu", num_workers=0) for names in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of sqrtm that SciPy will remove
        return in_their_span(score.calculate_frechet_distance, features)


def test_fid_of_two_folders_equals_pytorch_fids(extract, folders, pytorch_fids):
    """With 4 pictures in 2048 dimensions both covariances are singular; their root of such a product is off by some
    1e-6, the features by as much, and 1e-3 is far below what FIDs are compared to."""
    assert pytorch_fids > 1
    np.testing.assert_allclose(distance(extract, folders[0], "torch"), pytorch_fids, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_of_two_folders_equals_clean_fids(published, clean_fid, extract, folders):
    """In its own mode: its resizing, and its wrapper's range of pixels about the same network."""
    network, wrapper, torch = published
    (sets, paths), tool = folders, clean_fid.fid
    from cleanfid.inception_torchscript import InceptionV3W

    class Wrapper(InceptionV3W):  # it loads a TorchScript file of the same network
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layers, self.resize_inside = torch.nn.Sequential(*wrapper.blocks), False

    options = dict(num_workers=0, batch_size=BATCH, device=torch.device("cpu"), mode="clean", verbose=False)
    features = [tool.get_folder_features(str(path), Wrapper(), **options) for path in paths]
    expected = in_their_span(tool.frechet_distance, features)
    found = distance(extract, sets, "clean")
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_evaluation_of_two_folders_equals_pytorch_fids(extract, folders, pytorch_fids):
    """The same by the tool that reports use: folders, weights' file, resizing, statistics, value."""
    space = feature_spaces.load("inception", str(extract.folder), "torch")
    how = streams.How(streams.local_mesh(1), BATCH)
    samples, real = (image_sets.of_folder(str(path)) for path in folders[1])
    request = evaluation.Request(space, ("fid",), evaluation.make_reference(real, space, ("fid",), how, None))
    (result,) = evaluation.evaluate(samples, evaluation.seed_ranges(samples, (0,), 0), [request], how)
    np.testing.assert_allclose(result.value, pytorch_fids, rtol=1e-3)
    assert result.protocol.resize == "torch 299" and len(result.protocol.weights_sha256) == 64


# Without PyTorch ------------------------------------------------------------------------------------------------------


def weights(shapes):
    """Arrays by PyTorch name, of the right shapes."""
    random, found = np.random.default_rng(0), {"fc.bias": np.zeros(1008, np.float32)}
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    ours = {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}
    for path, shape in ours.items():
        *_, name = file.TABLE.theirs(path)
        layer = name.removesuffix(".weight")
        if path == "logits/kernel":
            found[name] = np.zeros(shape[::-1], np.float32)
        elif path.endswith("kernel"):
            found[f"{layer}.conv.weight"] = np.zeros((shape[3], shape[2], *shape[:2]), np.float32)
            for part in ("weight", "bias", "running_mean", "running_var"):
                found[f"{layer}.bn.{part}"] = random.uniform(0.5, 1.5, shape[3]).astype(np.float32)
            found[f"{layer}.bn.num_batches_tracked"] = np.array(0)
    return found


@pytest.mark.fast
def test_a_normalisation_is_folded_into_its_convolution(shapes):
    """Eq. 1: what the convolution and its normalisation give, one after the other."""
    given = weights(shapes)
    name, random = "Mixed_6b.branch7x7_2", np.random.default_rng(1)
    kernel = given[f"{name}.conv.weight"] = random.standard_normal((128, 128, 1, 7)).astype(np.float32)
    conv = file.to_params(given, shapes)["mixed"]["6b"]["convs"]["branch7x7_2"]
    patch = random.standard_normal((1, 7, 128))
    parts = ("weight", "bias", "running_mean", "running_var")
    gamma, beta, mean, variance = (given[f"{name}.bn.{part}"] for part in parts)
    expected = (np.einsum("hwi,oihw->o", patch, kernel) - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    found = np.einsum("hwi,hwio->o", patch, conv["kernel"]) + conv["bias"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # weights rounded to float32, of sums near 30


def test_means_leave_out_the_padding():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    found = inception._mean_3x3(x)[0, :, :, 0]
    np.testing.assert_allclose(found[0, 0], (0 + 1 + 4 + 5) / 4, rtol=1e-6)
    np.testing.assert_allclose(found[1, 3], (2 + 3 + 6 + 7 + 10 + 11) / 6, rtol=1e-6)
    np.testing.assert_allclose(found[1, 1], x[0, :, :3].mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_5b.branch1x1.bn.running_var": None}, r"missing: Mixed_5b.branch1x1.bn.running_var \[64\]"),
        ({"Mixed_7c.branch_pool.conv.weight": None}, "missing: Mixed_7c.branch_pool.weight"),
        ({"Conv2d_1a_3x3.bn.bias": np.zeros(7)}, r"different: Conv2d_1a_3x3.bn.bias, expected \[32\], found \[7\]"),
        ({"fc.weight": np.zeros((1000, 2048))}, r"different: fc.weight, expected \[1008, 2048\] .* \[1000, 2048\]"),
        ({"AuxLogits.fc.weight": np.zeros((1000, 768))}, "extra: AuxLogits.fc.weight"),
    ],
)
def test_every_difference_of_a_file_is_named(shapes, change, message):
    given = {name: array for name, array in (weights(shapes) | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        file.to_params(given, shapes)


def test_absent_weights_are_said_with_name_and_place(shapes, tmp_path):
    for path in (tmp_path, tmp_path / file.FILE):
        with pytest.raises(FileNotFoundError, match=rf"put {file.FILE}, the file that .* at {tmp_path / file.FILE} \("):
            file.load(path, shapes)


def test_wrong_images_are_refused(shapes):
    network = functionalize(lambda rngs: inception.InceptionV3(rngs=rngs))[0]
    for shape in ((1, 32, 32, 3), (1, 299, 299, 1), (299, 299, 3)):
        with pytest.raises(ValueError, match=r"expected \(B, 299, 299, 3\): resize them"):
            jax.eval_shape(network, shapes, jnp.zeros(shape))
    with pytest.raises(ValueError, match="unknown range of Inception's pixels 'clip'"):
        inception.normalise(jnp.zeros((1, 299, 299, 3)), "clip")
