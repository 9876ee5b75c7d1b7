"""Fréchet distance: closed forms between Gaussians, SciPy's matrix root, singular covariances, bad input."""

import numpy as np
import pytest
import scipy.linalg

from diffjax.metrics import fid


def random_covariance(width: int, rank: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((width, rank))
    return x @ x.T / rank


@pytest.mark.fast
def test_distance_of_gaussians_in_closed_form():
    # commuting covariances: |mu_1 - mu_2|^2 + sum (s_1 - s_2)^2
    first, second = np.array([0.5, 1.0, 3.0]), np.array([2.0, 1.0, 0.0])
    distance = fid.frechet_distance([0, 0, 1], np.diag(first**2), [1, 0, -1], np.diag(second**2))
    assert distance == pytest.approx(5 + 1.5**2 + 3**2, rel=1e-12)


def rotation(seed: int, width: int = 20) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


def spectra() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Eigenvalues (20,) of two covariances with the same eigenvectors."""
    random = np.random.default_rng(0)
    a, b = random.uniform(0.1, 3, (2, 20))
    low, graded = np.where(np.arange(20) < 6, a, 0), 10.0 ** -np.linspace(0, 12, 20)
    return {
        "full rank": (a, b),
        "both singular": (low, np.where(np.arange(20) % 2, b, 0)),
        "one singular": (low, b),
        "one direction": (np.eye(20)[3], b),
        "one is a point": (0 * a, low),
        "of 12 orders of magnitude": (graded, graded[::-1].copy()),
        "as small as features": (1e-4 * a, 1e-4 * low),
    }


@pytest.mark.parametrize("case", spectra())
def test_commuting_gaussians_are_exact_singular_or_not(case):
    """|mu_1 - mu_2|^2 + sum (sqrt(l_1) - sqrt(l_2))^2, in any basis."""
    first, second = spectra()[case]
    expected = 20 * 0.5**2 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    for basis in (np.eye(20), rotation(1)):
        a, b = ((basis * values) @ basis.T for values in (first, second))
        found = fid.frechet_distance(np.full(20, 0.5), (a + a.T) / 2, np.zeros(20), (b + b.T) / 2)
        assert found == pytest.approx(expected, abs=1e-8)


def test_distance_on_a_line():
    found = fid.frechet_distance([1.5], [[4.0]], [-1.0], [[0.25]])
    assert found == pytest.approx(2.5**2 + (2 - 0.5) ** 2, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_gaussians_that_do_not_commute_and_the_map_between_them(rank):
    """y = T x with T symmetric and positive is the optimal map (Knott & Smith 1984), so that the distance of N(0, C) and
    N(0, T C T) is E|x - T x|^2 = tr((I - T) C (I - T)), of any rank of C."""
    basis, map_ = rotation(2)[:, :rank], random_covariance(20, 40, 3) + 0.1 * np.eye(20)
    first = (basis * np.linspace(0.5, 2, rank)) @ basis.T
    second = map_ @ first @ map_
    rest = np.eye(20) - map_
    found = fid.frechet_distance(np.zeros(20), (first + first.T) / 2, np.zeros(20), (second + second.T) / 2)
    assert found == pytest.approx(np.trace(rest @ first @ rest), abs=1e-8)
    assert found > 0.1 and not np.allclose(first @ second, second @ first)


def test_distance_is_invariant_under_rotation_and_order_of_the_sets():
    a, b = random_covariance(6, 9, 0), random_covariance(6, 9, 1)
    mean = np.arange(6.0)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    distance = fid.frechet_distance(mean, a, 0 * mean, b)
    assert fid.frechet_distance(0 * mean, b, mean, a) == pytest.approx(distance, rel=1e-12)
    turned = fid.frechet_distance(turn @ mean, turn @ a @ turn.T, 0 * mean, turn @ b @ turn.T)
    assert turned == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("rank", [40, 100])
def test_distance_equals_the_matrix_root_of_scipy(rank):
    a, b = random_covariance(30, rank, 0), random_covariance(30, 100, 1)
    mean_a, mean_b = np.zeros(30), np.full(30, 0.1)
    root = scipy.linalg.sqrtm(a @ b)
    expected = 0.3 + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
    # sqrtm loses half of the digits of the smallest eigenvalues
    assert fid.frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_need_no_offset():
    thin = random_covariance(50, 5, 0)
    # rounding of 50 singular values of size up to 1
    assert fid.frechet_distance(np.zeros(50), thin, np.zeros(50), thin) == pytest.approx(0, abs=1e-12)
    assert fid.frechet_distance(np.zeros(50), thin, np.zeros(50), 4 * thin) == pytest.approx(np.trace(thin), rel=1e-12)
    # subspaces at right angles share nothing
    a, b = np.zeros((50, 50)), np.zeros((50, 50))
    a[:5, :5], b[5:10, 5:10] = random_covariance(5, 9, 1), random_covariance(5, 9, 2)
    expected = np.trace(a) + np.trace(b)
    assert fid.frechet_distance(np.zeros(50), a, np.zeros(50), b) == pytest.approx(expected, rel=1e-12)
    # a point against a Gaussian
    assert fid.frechet_distance(np.zeros(50), 0 * a, np.zeros(50), a) == pytest.approx(np.trace(a), rel=1e-12)


def test_pixel_distance_of_images():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 4, 4, 3)).astype(np.uint8)
    assert fid.pixel_frechet(images, images) == pytest.approx(0, abs=1e-10)  # of a trace of 16
    assert fid.pixel_frechet(images, images[random.permutation(300)]) == pytest.approx(0, abs=1e-10)
    floats = (images / 127.5 - 1).astype(np.float32)
    assert fid.pixel_frechet(images, floats) == pytest.approx(0, abs=1e-6)  # pixels in float32
    # 25.5 levels brighter is 0.2 in [-1, 1], at 48 pixels
    assert fid.pixel_frechet(floats, floats + 0.2) == pytest.approx(48 * 0.2**2, rel=1e-5)


def test_pixel_statistics_do_not_depend_on_chunks(monkeypatch):
    images = np.random.default_rng(0).uniform(-1, 1, (50, 2, 2, 1))
    whole = fid.pixel_statistics(images)
    monkeypatch.setattr(fid, "_CHUNK_VALUES", 28)  # seven images at a time
    for found, expected in zip(fid.pixel_statistics(images), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-15)
    np.testing.assert_allclose(whole[1], np.cov(images.reshape(50, 4), rowvar=False), atol=1e-15)


def test_bad_input_is_refused():
    eye, zero = np.eye(3), np.zeros(3)
    with pytest.raises(ValueError, match=r"one width D, found \(3,\), \(3, 3\) and \(2,\)"):
        fid.frechet_distance(zero, eye, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="first covariance has the eigenvalue -1"):
        fid.frechet_distance(zero, np.diag([1.0, 1.0, -1.0]), zero, eye)
    with pytest.raises(ValueError, match="second covariance is not symmetric"):
        fid.frechet_distance(zero, eye, zero, np.triu(np.ones((3, 3))))
    with pytest.raises(ValueError, match="second covariance is not symmetric and finite"):
        fid.frechet_distance(zero, eye, zero, np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="mean holds a NaN"):
        fid.frechet_distance(zero * np.nan, eye, zero, eye)
    with pytest.raises(ValueError, match="at least 2 samples, found 1"):
        fid.pixel_frechet(np.zeros((1, 2, 2, 1)), np.zeros((9, 2, 2, 1)))
    with pytest.raises(ValueError, match="N at least 1"):
        fid.pixel_statistics(np.zeros((0, 2, 2, 1)))
    with pytest.raises(ValueError, match="uint8 or float, found .* int64"):
        fid.pixel_statistics(np.zeros((5, 2, 2, 1), np.int64))
