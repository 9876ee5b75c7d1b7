"""Guidance: the formula, the calls it makes, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import guidance

CLASSES = 3
TABLE = jnp.array([0.5, -1.0, 2.0, 0.25])  # the last row is the null class
NULL = functools.partial(guidance.null_label, num_classes=CLASSES)
X = jax.random.normal(jax.random.key(0), (4, 2, 2, 1))
COND = {"label": jnp.array([0, 1, 2, 1])}


def denoise(params, x, sigma, cond=None, key=None):
    return x * TABLE[cond["label"]].reshape(-1, 1, 1, 1) / (1 + sigma)


@pytest.mark.fast
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_cfg_is_the_extrapolation(scale):
    found = guidance.cfg(denoise, scale, NULL)({}, X, 1.0, COND)
    conditional, unconditional = TABLE[COND["label"]], TABLE[CLASSES]
    expected = X * (unconditional + scale * (conditional - unconditional)).reshape(-1, 1, 1, 1) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)  # rounding of float32


def test_scale_one_is_the_conditional_denoiser():
    guided = guidance.cfg(denoise, 1.0, NULL)({}, X, 1.0, COND)
    np.testing.assert_allclose(guided, denoise({}, X, 1.0, COND), rtol=1e-6)  # u + (c - u) rounds once


def test_one_scale_per_sample():
    found = guidance.cfg(denoise, jnp.array([0.0, 1.0, 2.0, 1.0]), NULL)({}, X, 1.0, COND)
    for i, scale in enumerate([0.0, 1.0, 2.0, 1.0]):
        expected = guidance.cfg(denoise, scale, NULL)({}, X, 1.0, COND)[i]
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)  # the same operations


def test_some_channels():
    x = jax.random.normal(jax.random.key(1), (4, 2, 2, 4))
    guided = guidance.cfg(denoise, 2.5, NULL)({}, x, 1.0, COND)
    found = guidance.cfg(denoise, 2.5, NULL, channels=3)({}, x, 1.0, COND)
    np.testing.assert_array_equal(found[..., :3], guided[..., :3])
    np.testing.assert_array_equal(found[..., 3:], denoise({}, x, 1.0, COND)[..., 3:])
    np.testing.assert_array_equal(guidance.cfg(denoise, 2.5, NULL, channels=4)({}, x, 1.0, COND), guided)
    with pytest.raises(ValueError, match="found channels=5, expected 0"):
        guidance.cfg(denoise, 2.5, NULL, channels=5)({}, x, 1.0, COND)


def sized(params, x, sigma, cond=None, key=None):
    """`denoise`, and the height of a sample, 0 where it is dropped."""
    height = jnp.where(cond.get("drop_control", jnp.zeros(len(x), bool)), 0.0, cond["height"])
    return denoise(params, x, sigma, cond) + height.reshape(-1, 1, 1, 1)


def test_two_strengths():
    cond = {**COND, "height": jnp.array([3.0, 1.0, -2.0, 5.0])}
    neither = lambda cond: guidance.null_control(NULL(cond))  # noqa: E731
    d = [sized({}, X, 1.0, given) for given in (cond, NULL(cond), neither(cond))]
    found = guidance.two_strengths(sized, 4.0, 0.75, NULL, neither)({}, X, 1.0, cond)
    np.testing.assert_allclose(found, 4 * (0.75 * d[0] + 0.25 * d[1]) - 3 * d[2], rtol=1e-5, atol=1e-5)  # float32
    one = guidance.two_strengths(sized, 1.0, 1.0, NULL, neither)({}, X, 1.0, cond)
    np.testing.assert_allclose(one, d[0], rtol=1e-5, atol=1e-5)
    plain = guidance.cfg(sized, 4.0, neither)({}, X, 1.0, cond)
    np.testing.assert_allclose(guidance.two_strengths(sized, 4.0, 1.0, NULL, neither)({}, X, 1.0, cond), plain, rtol=1e-5, atol=1e-5)
    by_level = guidance.two_strengths(sized, lambda sigma: 4.0 * sigma, jnp.float32(0.75), NULL, neither)({}, X, 1.0, cond)
    np.testing.assert_allclose(by_level, found, rtol=1e-6)
    with pytest.raises(ValueError, match="control metadata needs conditions, found none"):
        guidance.null_control({})


def test_power_cosine():
    index = jnp.array([0.0, 100.0, 250.0, 500.0, 999.0])
    found = guidance.power_cosine(index / 1000, 3.8)
    # printed to 8 digits, computed in float32
    np.testing.assert_allclose(found, [3.8, 3.05937352, 1.63654502, 1.02690061, 1.0], rtol=1e-6)
    assert guidance.power_cosine(1.0, 3.8) == 1 and guidance.power_cosine(0.3, 1.0) == 1


def test_a_scale_by_noise_level():
    scale = lambda sigma: guidance.power_cosine(sigma, 3.8)  # noqa: E731
    found = guidance.cfg(denoise, scale, NULL)({}, X, 0.25, COND)
    np.testing.assert_array_equal(found, guidance.cfg(denoise, scale(0.25), NULL)({}, X, 0.25, COND))


@pytest.mark.parametrize("sigma, inside", [(0.5, False), (0.51, True), (2.0, True), (2.1, False)])
def test_interval_guides_inside_only_and_saves_the_call_outside(sigma, inside):
    calls = []

    def counting(params, x, sigma, cond=None, key=None):
        jax.debug.callback(lambda _: calls.append(1), sigma)
        return denoise(params, x, sigma, cond)

    guided = jax.jit(guidance.interval(counting, 3.0, NULL, 0.5, 2.0))
    found = guided({}, X, jnp.float32(sigma), COND)
    jax.effects_barrier()
    expected = guidance.cfg(denoise, 3.0, NULL) if inside else denoise
    np.testing.assert_allclose(found, expected({}, X, sigma, COND), rtol=1e-6)  # rounding of float32
    assert len(calls) == (2 if inside else 1)


def test_interval_with_one_level_per_sample():
    sigma = jnp.array([0.1, 1.0, 2.0, 9.0])

    def per_level(params, x, sigma, cond=None, key=None):
        return denoise(params, x, jnp.reshape(sigma, (-1, 1, 1, 1)), cond)

    found = guidance.interval(per_level, 3.0, NULL, 0.5, 2.0)({}, X, sigma, COND)
    guided = guidance.cfg(per_level, 3.0, NULL)({}, X, sigma, COND)
    plain = per_level({}, X, sigma, COND)
    for i, inside in enumerate([False, True, True, False]):
        np.testing.assert_array_equal(found[i], (guided if inside else plain)[i])


def test_guided_denoisers_compose():
    scaled = guidance.cfg(denoise, 1.0, NULL)
    twice = guidance.interval(scaled, 2.0, NULL, 0.0, 10.0)({}, X, 1.0, COND)
    np.testing.assert_allclose(twice, guidance.cfg(denoise, 2.0, NULL)({}, X, 1.0, COND), rtol=1e-5)  # one more rounding


def test_scale_and_interval_are_traced():
    @jax.jit
    def run(scale, low, high, sigma):
        return guidance.interval(denoise, scale, NULL, low, high)({}, X, sigma, COND)

    for values in [(1.0, 0.1, 2.0, 1.0), (3.0, 0.2, 1.5, 0.1)]:
        run(*(jnp.float32(v) for v in values))
    assert run._cache_size() == 1


def test_a_scale_for_larger_images():
    """No guidance stays none, the distance from it grows with the size, and scales multiply."""
    assert guidance.rescaled(1.0, 2.0) == 1 and guidance.rescaled(4.0, 2.0) == 7 and guidance.rescaled(4.0, 1.0) == 4
    assert guidance.rescaled(guidance.rescaled(4.0, 2.0), 1.5) == guidance.rescaled(4.0, 3.0)


def test_null_label_keeps_the_rest():
    cond = {"label": jnp.array([0, 2]), "augment": jnp.zeros((2, 9))}
    found = guidance.null_label(cond, CLASSES)
    np.testing.assert_array_equal(found["label"], [CLASSES, CLASSES])
    assert found["label"].dtype == cond["label"].dtype and found["augment"] is cond["augment"]
    np.testing.assert_array_equal(cond["label"], [0, 2])


@pytest.mark.parametrize("cond", [None, {}, {"label": None}, {"text": jnp.zeros(2)}])
def test_guidance_without_a_label(cond):
    with pytest.raises(ValueError, match="guidance needs cond"):
        guidance.null_label(cond, CLASSES)


def test_guidance_without_a_null_class():
    with pytest.raises(ValueError, match="trained without one"):
        guidance.null_label(COND, None)
    with pytest.raises(ValueError, match="null class"):
        guidance.cfg(denoise, 2.0, None)
    with pytest.raises(ValueError, match="null class"):
        guidance.interval(denoise, 2.0, None, 0.0, 1.0)


@pytest.mark.parametrize("low, high", [(2.0, 1.0), (-1.0, 1.0), (1.0, 1.0)])
def test_bad_interval(low, high):
    with pytest.raises(ValueError, match="0 <= low < high"):
        guidance.interval(denoise, 2.0, NULL, low, high)


def test_dynamic_threshold():
    data = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
    data *= np.array([0.2, 1.0, 5.0], np.float32).reshape(-1, 1, 1, 1)
    found = np.asarray(guidance.dynamic_threshold(jnp.asarray(data)))
    for sample, one in zip(data, found, strict=True):
        limit = max(1.0, np.quantile(np.abs(sample), 0.995))
        np.testing.assert_allclose(one, np.clip(sample, -limit, limit) / limit, rtol=1e-5)  # float32 quantile
    np.testing.assert_array_equal(found[0], data[0])  # inside [-1, 1] nothing changes
    with pytest.raises(ValueError, match="quantile"):
        guidance.dynamic_threshold(jnp.asarray(data), 0.0)
