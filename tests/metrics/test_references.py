"""Statistics files of every tool, as those write them; files that are wrong."""

import numpy as np
import pytest

from diffjax.metrics import fid, references, stats

WIDTH, SPATIAL = 6, 4


def features(seed=0, num=40, width=WIDTH):
    return np.random.default_rng(seed).standard_normal((num, width)).astype(np.float32)


def pair(seed=0, width=WIDTH):
    x = features(seed, width=width).astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture
def file(tmp_path):
    """Writes arrays as the tools do: np.savez."""

    def write(**arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        return tmp_path / "reference.npz"

    return write


@pytest.mark.fast
def test_pytorch_fid_clean_fid_and_edm_write_mean_and_covariance(file):
    mean, covariance = pair()
    found = references.read(file(mu=mean.astype(np.float32), sigma=covariance), width=WIDTH)
    np.testing.assert_array_equal(found.mean, mean.astype(np.float32))
    np.testing.assert_array_equal(found.covariance, covariance)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert (found.count, found.spatial, found.features, found.protocol) == (0, None, None, None)
    assert found.source == "reference.npz" and len(found.sha256) == 64


def test_a_reference_batch_of_adm_has_spatial_statistics_and_its_images_are_left(file):
    images = np.zeros((10, 4, 4, 3), np.uint8)
    (mean, covariance), spatial = pair(), pair(1, SPATIAL)
    found = references.read(file(arr_0=images, mu=mean, sigma=covariance, mu_s=spatial[0], sigma_s=spatial[1]))
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.spatial[1], spatial[1])
    assert found.count == 0 and found.features is None  # mu is of the data set, not of the images in the file
    with pytest.raises(ValueError, match=r"holds images \(arr_0\) and no statistics .*give it as a set of images"):
        references.read(file(arr_0=images))


def test_kernel_features_of_clean_fid_say_their_own_statistics(file):
    found = references.read(file(feats=features()), width=WIDTH)
    # the covariance of 40 float32 features, in float64
    np.testing.assert_allclose(found.covariance, pair()[1], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found.features, features())
    assert found.count == 40


def test_ours_come_back_whole_and_can_be_read_by_the_other_tools(tmp_path):
    path, protocol = tmp_path / "ours.npz", {"resize": "tf1 299", "weights_sha256": "00"}
    total = stats.moments(features())
    written = references.Reference(total.mean, total.covariance, 40, pair(1, SPATIAL), features(), protocol=protocol)
    digest = references.write(path, written)
    found = references.read(path, WIDTH)
    assert found.sha256 == digest == references.write(tmp_path / "again.npz", written)
    assert (found.count, found.protocol, found.source) == (40, protocol, "ours.npz")
    whole = (*written[:2], *pair(1, SPATIAL), features())
    for a, b in zip((*found[:2], *found.spatial, found.features), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    with np.load(path) as names:  # as EDM, pytorch-fid and ADM read them
        assert fid.frechet_distance(names["mu"], names["sigma"], *found[:2]) == pytest.approx(0, abs=1e-12)
        assert names["mu_s"].shape == (SPATIAL,)


def nan(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


MEAN, COVARIANCE = pair()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MEAN}, r"has no sigma, expected mu \(D,\) and sigma \(D, D\)"),
        ({"other": MEAN}, "has no mu and sigma"),
        ({"mu": MEAN, "sigma": COVARIANCE, "mu_s": MEAN}, "has no sigma_s"),
        ({"mu": MEAN[:-1], "sigma": COVARIANCE}, "found features of width 5 .*, expected 6: give the statistics of"),
        ({"mu": MEAN, "sigma": COVARIANCE[:-1]}, r"mu \(6,\) and sigma \(5, 6\)"),
        ({"feats": features(width=3)}, "mismatched reference size: found features of width 3"),
        ({"mu": MEAN, "sigma": COVARIANCE, "feats": features(width=3)}, "mismatched reference size"),
        ({"mu": nan(MEAN), "sigma": COVARIANCE}, "mu of .* holds a NaN or infinity"),
        ({"mu": MEAN, "sigma": nan(COVARIANCE)}, "sigma of .* holds a NaN or infinity"),
        ({"mu": MEAN.astype(object), "sigma": COVARIANCE}, "holds Python objects in mu"),
        ({"mu": MEAN > 0, "sigma": COVARIANCE}, "mu of bool .*, expected floats"),
        ({"mu": np.float64(1), "sigma": COVARIANCE}, "expected floats with 1 axes"),
        ({"mu": MEAN, "sigma": COVARIANCE, "count": 1.5}, "expected the number of samples"),
        ({"mu": MEAN, "sigma": COVARIANCE, "protocol": "{"}, "protocol of .* is no JSON"),
        ({"mu": MEAN, "sigma": COVARIANCE, "protocol": "[]"}, "is a list, expected a dict"),
    ],
)
def test_files_that_are_wrong_are_refused(file, arrays, message):
    with pytest.raises(ValueError, match=message):
        references.read(file(**arrays), width=WIDTH)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        references.read(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="is no .npz: give the statistics file of EDM, ADM"):
        references.read(tmp_path / "statistics.pt")
    reference = references.Reference(MEAN, COVARIANCE)
    with pytest.raises(ValueError, match="is no .npz: end its name so"):
        references.write(tmp_path / "ours.pkl", reference)
    with pytest.raises(ValueError, match="holds a NaN"):
        references.write(tmp_path / "ours.npz", reference._replace(mean=nan(MEAN)))
    assert not list(tmp_path.iterdir())
