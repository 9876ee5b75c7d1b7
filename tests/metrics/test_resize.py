"""Resizing: equal to the tools whose rules they are."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffjax.metrics.resize import ON_HOST, RESIZES, resize

# (height, width), target: up, one axis each, down, neither
SHAPES = [(32, 48, 75), (64, 20, 41), (100, 131, 37), (33, 33, 33)]
# two float32 products of weights rounded to 6e-8, at positions of up to 131 rounded to 8e-6, of steps of up to 255
ROUNDINGS = 5e-3


def images(height, width, dtype=np.uint8, number=2):
    values = np.random.default_rng(0).uniform(0, 255, (number, height, width, 3))
    return values.astype(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_torch_is_that_of_interpolate(shape, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    height, width, size = shape
    x = images(height, width, dtype)
    given = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(given, size=(size, size), mode="bilinear", align_corners=False)
    found = resize(x, size, "torch")
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=0, atol=ROUNDINGS)


@pytest.mark.fast
@pytest.mark.parametrize("shape", SHAPES)
def test_tf1_reads_at_the_scaled_index(shape):
    """SciPy's linear interpolation at i n / m, the last pixel repeated beyond the edge."""
    height, width, size = shape
    x = images(height, width, np.float32, number=1)
    places = np.meshgrid(np.arange(size) * height / size, np.arange(size) * width / size, indexing="ij")
    planes = np.moveaxis(x[0].astype(np.float64), 2, 0)
    expected = [ndimage.map_coordinates(plane, places, order=1, mode="nearest") for plane in planes]
    np.testing.assert_allclose(resize(x, size, "tf1")[0], np.stack(expected, axis=-1), rtol=0, atol=ROUNDINGS)


def test_tf1_is_the_sampling_of_stylegans_copy_of_the_graph():
    """There PyTorch's sampler reads a grid that is shifted by (1/n - 1/m) of [-1, 1]: the same places another way."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    x, size = images(32, 40, np.float32), 299
    matrix = torch.eye(2, 3)
    matrix[0, 2], matrix[1, 2] = 1 / 40 - 1 / size, 1 / 32 - 1 / size
    given = torch.from_numpy(x).permute(0, 3, 1, 2)
    grid = torch.nn.functional.affine_grid(matrix[None].repeat(2, 1, 1), (2, 3, size, size), align_corners=False)
    expected = torch.nn.functional.grid_sample(given, grid, mode="bilinear", padding_mode="border", align_corners=False)
    np.testing.assert_allclose(resize(x, size, "tf1"), expected.permute(0, 2, 3, 1), rtol=0, atol=ROUNDINGS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_clean_is_that_of_clean_fid(clean_fid, shape, dtype):
    """Its own resizer, made for another size than 299; the same calls of Pillow, so equal to the bit."""
    from cleanfid.resize import make_resizer

    height, width, size = shape
    x = images(height, width, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of Pillow that will go
        expected = np.stack([make_resizer("PIL", False, "bicubic", (size, size))(image) for image in x])
    np.testing.assert_array_equal(resize(x, size, "clean"), expected)
    assert expected.max() <= 255 and expected.min() >= 0


@pytest.mark.parametrize("shape", [(300, 224), (250, 401), (224, 224), (100, 61), (513, 300)])
def test_clip_is_that_of_its_processor(transformers, shape):
    """Of the processor that uses Pillow; as uint8, so equal to the bit."""
    processor = transformers.CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    x = images(*shape)
    expected = np.stack(processor(list(x)).pixel_values).transpose(0, 2, 3, 1)
    found = resize(x, 224, "clip")
    assert found.dtype == np.float32 and found.shape == (2, 224, 224, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("how", sorted(set(RESIZES) - set(ON_HOST)))
def test_bilinear_rules_work_inside_jit(how):
    x = images(32, 40)
    found = jax.jit(lambda x: resize(x, 75, how))(x)
    np.testing.assert_allclose(found, resize(x, 75, how), rtol=0, atol=1e-3)  # a fused product rounds once


def test_the_rules_differ():
    """What the protocols are for: on noise each is far from each."""
    x = images(300, 300)
    found = {how: np.asarray(resize(x, 224, how)) for how in RESIZES}
    for how in RESIZES:
        for other in set(RESIZES) - {how}:
            assert np.abs(found[how] - found[other]).mean() > 0.1, (how, other)


@pytest.mark.parametrize(
    ("x", "how", "message"),
    [
        (images(8, 8), "bilinear", "unknown resizing 'bilinear'; did you mean"),
        (images(8, 8)[0], "torch", r"expected images \(B, H, W, C\), uint8 or float in .*, found \(8, 8, 3\) uint8"),
        (images(8, 8).astype(np.int32), "tf1", "found .* int32"),
        (images(8, 8, np.float32), "clip", "found float32 images for 'clip', expected uint8"),
    ],
)
def test_wrong_arguments_say_what_to_give(x, how, message):
    with pytest.raises(ValueError, match=message):
        resize(x, 16, how)
