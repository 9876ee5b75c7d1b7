"""Statistics of NVlabs/edm2: pickles of dicts of arrays, read by `build.references`, and pickles that are none."""

import os
import pickle

import numpy as np
import pytest

from diffjax.build import references
from diffjax.weights import edm_statistics

MEAN, COVARIANCE = np.linspace(0, 1, 3), np.diag([1.0, 2.0, 3.0])
STATISTICS = {
    "num_images": 50000,
    "fid": {"mu": MEAN, "sigma": COVARIANCE},
    "fd_dinov2": {"mu": MEAN[:2], "sigma": np.asfortranarray(np.arange(4.0).reshape(2, 2), np.float32)},
}


@pytest.mark.fast
@pytest.mark.parametrize("protocol", [3, 4])
def test_statistics_are_read_as_they_were_pickled(tmp_path, protocol):
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(STATISTICS, protocol=protocol))
    found = edm_statistics.read(path)
    assert found["num_images"] == 50000 and list(found) == list(STATISTICS)
    for metric in ("fid", "fd_dinov2"):
        for name in ("mu", "sigma"):
            np.testing.assert_array_equal(found[metric][name], STATISTICS[metric][name], strict=True)


def test_one_metric_becomes_a_reference(tmp_path):
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(STATISTICS, protocol=4))
    found = references.read(path, width=3)
    np.testing.assert_array_equal(found.covariance, COVARIANCE)
    assert (found.count, found.source, len(found.sha256)) == (50000, "img512.pkl", 64)
    assert references.read(path, metric="fd_dinov2").mean.shape == (2,)
    with pytest.raises(ValueError, match="mismatched reference size: found features of width 3"):
        references.read(path, width=2048)
    with pytest.raises(ValueError, match="no statistics for 'fvd', expected one of: fid, fd_dinov2"):
        references.read(path, metric="fvd")
    np.savez(tmp_path / "edm.npz", mu=MEAN, sigma=COVARIANCE)
    np.testing.assert_array_equal(references.read(tmp_path / "edm.npz", width=3).mean, MEAN)


class Harmful:
    def __reduce__(self):
        return (os.system, ("exit 1",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmful(), "refused: it names posix.system"),
        ({"fid": {"mu": MEAN}}, "found fid without the arrays mu and sigma"),
        ({"fid": {"mu": [0.0], "sigma": COVARIANCE}}, "found fid without the arrays"),
        ({"fid": {"mu": MEAN.astype(">f8"), "sigma": COVARIANCE}}, "byte order >"),
        ({"fid": {"mu": MEAN.astype(object), "sigma": COVARIANCE}}, "found a number of type O"),
        ([MEAN], "found a list, expected a dict"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, message):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=message):
        edm_statistics.read(path)


def test_damaged_files_are_refused(tmp_path):
    path, whole = tmp_path / "a.pkl", pickle.dumps(STATISTICS, protocol=4)
    at = whole.index(MEAN.tobytes())
    for broken in (b"", whole[:-20], whole[: at + 5]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged or no such file"):
            edm_statistics.read(path)
    # an array that says that it is larger than its bytes
    path.write_bytes(whole.replace(b"K\x03\x85", b"K\x7f\x85"))
    with pytest.raises(ValueError, match=r"array of shape \(127,\) in 24 bytes"):
        edm_statistics.read(path)
