"""EDM's losses against the original PyTorch code and theory, its step by hand, conditions, and training that falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.core import gaussian, noise_levels, prediction, weighting
from diffjax.methods import edm

CASES = {
    "edm": ("lognormal", {}, "edm", {}),
    "edm_alt": ("lognormal", {"p_mean": -0.4, "p_std": 1.0}, "edm", {"sigma_data": 0.3}),
    "vp": ("vp", {}, "eps", {}),
    "ve": ("ve", {}, "eps", {}),
}


def _mixture(arrays):
    """The file's mixture on NHWC images, as parameters of `gaussian.mixture_denoiser`."""
    num = arrays["images"].shape[1:]
    mean = arrays["gmm_mu"].reshape(-1, *num).transpose(0, 2, 3, 1)
    return {"mean": jnp.asarray(mean), "std": jnp.asarray(arrays["gmm_sd"]), "weight": jnp.asarray(arrays["gmm_w"])}


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES)
def test_losses_equal_the_original(case, golden, x64):
    arrays, _ = golden("edm_loss")
    distribution, distribution_options, weight_name, weighting_options = CASES[case]
    settings = edm.Settings(distribution, distribution_options, weight_name, weighting_options)
    image, noise = (jnp.asarray(arrays[name].transpose(0, 2, 3, 1)) for name in ("images", "noise"))
    draws = arrays["rnd_normal" if distribution == "lognormal" else "rnd_uniform"].reshape(-1)
    levels, _ = noise_levels.DISTRIBUTIONS[distribution]
    sigma = levels(jnp.asarray(draws), **distribution_options)
    loss = edm.loss(settings, gaussian.mixture_denoiser, _mixture(arrays), image, sigma, noise)
    # float64 on both sides, the same formulas: rounding only
    np.testing.assert_allclose(sigma, arrays[f"{case}|sigma"].reshape(-1), rtol=1e-11)
    weight = weighting.weigh(weight_name, sigma, **weighting_options)
    np.testing.assert_allclose(weight, arrays[f"{case}|weight"].reshape(-1), rtol=1e-11)
    noisy = image + sigma.reshape(-1, 1, 1, 1) * noise
    denoised = gaussian.mixture_denoiser(_mixture(arrays), noisy, sigma)
    original = arrays[f"{case}|D"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(denoised, original, rtol=1e-11, atol=1e-11 * np.abs(original).max())
    expected = arrays[f"{case}|loss"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())
    np.testing.assert_allclose(jnp.sum(loss) / len(image), arrays[f"{case}|loss_sum_over_batch"], rtol=1e-11)


SHAPE = (4, 4, 2)


def _scale(params, x, sigma, cond=None, key=None):
    """The least denoiser: one number."""
    return params["a"] * x


def _batch(num, seed=0):
    return {"image": 0.5 * jax.random.normal(jax.random.key(seed), (num, *SHAPE))}


def _step(settings, denoise, params, batch, key=0, iteration=0, **options):
    method = edm.make(settings, denoise, optax.sgd(1.0), lambda i: jnp.float32(0.1) / (1 + i), **options)
    return jax.jit(method.step)(method.init(params), {}, batch, jax.random.key(key), jnp.int32(iteration))


def test_a_step_by_hand(x64):
    """Loss and gradient of D = a x, from the noise and levels that the step itself drew."""
    seen = {}

    def spy(params, x, sigma, cond=None, key=None):
        jax.debug.callback(lambda x, sigma: seen.update(x=x, sigma=sigma), x, sigma, ordered=True)
        return _scale(params, x, sigma)

    image = jnp.asarray(_batch(6)["image"], jnp.float64)
    method = edm.make(edm.Settings(), spy, optax.scale_by_adam(), lambda i: jnp.float32(0.1) / (1 + i))
    params = {"a": jnp.float64(0.7)}
    state, metrics = method.step(method.init(params), {}, {"image": image}, jax.random.key(2), jnp.int32(3))
    x, sigma = np.asarray(seen["x"]), np.asarray(seen["sigma"]).reshape(-1, 1, 1, 1)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    loss = np.sum(weight * (0.7 * x - image) ** 2, axis=(1, 2, 3))
    grad = np.sum(2 * weight * (0.7 * x - image) * x) / 6
    # metrics are float32
    np.testing.assert_allclose(metrics["loss"], loss.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], abs(grad), rtol=1e-6)
    # Adam's first update is the sign (eps 1e-8 against a gradient of order 100); learning rate 0.1 / 4
    np.testing.assert_allclose(state.params["a"], 0.7 - 0.025 * np.sign(grad), rtol=1e-7)
    np.testing.assert_allclose(metrics["learning_rate"], 0.025, rtol=1e-6)
    ordered = loss[np.argsort(sigma.reshape(-1))]
    quarters = [ordered[:1], ordered[1:3], ordered[3:4], ordered[4:]]
    for part, values in enumerate(quarters):
        np.testing.assert_allclose(metrics[f"loss_sigma_{part}"], values.mean(), rtol=1e-6)


@pytest.mark.fast
def test_the_exact_denoiser_has_unit_loss_per_pixel_at_every_level():
    """N(0, s^2) data: E|D - x0|^2 = s^2 sigma^2 / (s^2 + sigma^2) per pixel, which is 1 / weight for sigma_data = s."""
    params = {"mean": jnp.float32(0), "std": jnp.float32(0.5)}
    batch = _batch(2048)
    _, metrics = _step(edm.Settings(), gaussian.gaussian_denoiser, params, batch)
    num = 2048 * np.prod(SHAPE)
    # the mean of `num` squared unit normals has standard deviation sqrt(2 / num); 5 of them
    assert abs(metrics["loss"] / np.prod(SHAPE) - 1) < 5 * np.sqrt(2 / num)
    for part in range(4):
        assert abs(metrics[f"loss_sigma_{part}"] / np.prod(SHAPE) - 1) < 5 * np.sqrt(8 / num)


def test_a_video_is_a_sample():
    """The same for videos, whose loss is summed over frames too."""
    params, shape = {"mean": jnp.float32(0), "std": jnp.float32(0.5)}, (3, *SHAPE)
    batch = {"image": 0.5 * jax.random.normal(jax.random.key(0), (512, *shape))}
    _, metrics = _step(edm.Settings(), gaussian.gaussian_denoiser, params, batch)
    num = 512 * np.prod(shape)
    assert abs(metrics["loss"] / np.prod(shape) - 1) < 5 * np.sqrt(2 / num)


def test_metrics_are_float32_scalars_and_an_index():
    _, metrics = _step(edm.Settings(), _scale, {"a": jnp.float32(0.5)}, _batch(5))
    assert metrics.pop("nonfinite_leaf").dtype == jnp.int32
    assert sorted(metrics) == sorted(["loss", "grad_norm", "learning_rate", *(f"loss_sigma_{i}" for i in range(4))])
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())
    _, metrics = _step(edm.Settings(), _scale, {"a": jnp.float32(0.5)}, _batch(2))
    assert "loss_sigma_1" in metrics and "loss_sigma_2" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_first_bad_gradient_is_named():
    def denoise(params, x, sigma, cond=None, key=None):
        # below 0 the value is 0, and the derivative 0 times that of a root of a negative number: NaN, for b alone
        return params["a"] * x + jnp.where(params["b"] > 0, jnp.sqrt(params["b"]), 0.0) + params["c"]

    params = {name: jnp.float32(-1) for name in "abc"}
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    method = edm.make(edm.Settings(), denoise, clipped, lambda i: 1e-3)
    state, metrics = method.step(method.init(params), {}, _batch(2), jax.random.key(0), jnp.int32(0))
    assert int(metrics["nonfinite_leaf"]) == 1 and np.isfinite(metrics["loss"])
    assert not np.isfinite(state.params["a"])  # clipping spreads it: the weights would name the wrong one
    _, metrics = _step(edm.Settings(), denoise, {**params, "b": jnp.float32(1)}, _batch(2))
    assert int(metrics["nonfinite_leaf"]) == -1


def test_conditions_and_the_dropout_key_reach_the_network():
    seen = []

    def spy(params, x, sigma, cond=None, key=None):
        seen.append(({name: value.shape for name, value in cond.items()}, key is not None))
        return _scale(params, x, sigma)

    batch = {**_batch(3), "label": jnp.zeros(3, jnp.int32), "augment": jnp.zeros((3, 9))}
    _step(edm.Settings(), spy, {"a": jnp.float32(1)}, batch)
    assert seen[0] == ({"label": (3,), "augment": (3, 9)}, True)


def test_every_iteration_draws_anew_and_equal_keys_repeat():
    params, batch = {"a": jnp.float32(0.5)}, _batch(8)
    losses = [float(_step(edm.Settings(), _scale, params, batch, key=key)[1]["loss"]) for key in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_prepare_makes_the_batch():
    images = jnp.arange(2 * np.prod(SHAPE), dtype=jnp.uint8).reshape(2, *SHAPE)
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32)}

    def prepare(batch, key):
        return {**batch, "image": batch["image"].astype(jnp.float32) / 127.5 - 1}

    params = {"a": jnp.float32(0.5)}
    _, found = _step(edm.Settings(), _scale, params, batch, prepare=prepare)
    _, expected = _step(edm.Settings(), _scale, params, prepare(batch, None))
    assert found["loss"] == expected["loss"]
    with pytest.raises(ValueError, match=r"image must be float32 .* found uint8 \(2, 4, 4, 2\): give `prepare`"):
        _step(edm.Settings(), _scale, params, batch)
    with pytest.raises(ValueError, match=r"must hold 'image', found \['x'\]"):
        _step(edm.Settings(), _scale, params, {"x": images})


def test_labels_are_dropped_with_the_given_probability():
    label = jnp.arange(20000, dtype=jnp.int32) % 10
    cond = {"label": label, "augment": jnp.ones((20000, 9))}
    found = edm.drop_labels(jax.random.key(0), cond, 0.2, 10)
    dropped = np.asarray(found["label"] == 10)
    assert abs(dropped.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 20000)  # 5 standard deviations
    np.testing.assert_array_equal(found["label"][~dropped], label[~dropped])
    assert found["label"].dtype == jnp.int32 and found["augment"] is cond["augment"]
    assert edm.drop_labels(jax.random.key(0), cond, 0.0, 10) is cond
    assert np.all(edm.drop_labels(jax.random.key(0), cond, 1.0, 10)["label"] == 10)


def test_texts_are_dropped_with_the_given_probability():
    """All conditions of a sample or none; what they were replaced with does not reach the network."""
    text, mask = jnp.ones((20000, 2, 3)), jnp.ones((20000, 2), bool)
    cond = {"text": text, "text_mask": mask, "negative_text": 0 * text, "negative_text_mask": ~mask}
    found = edm.drop_labels(jax.random.key(0), cond, 0.2, 0)
    assert set(found) == {"text", "text_mask"} and found["text_mask"].dtype == bool
    dropped = np.asarray(found["text"][:, 0, 0] == 0)
    assert abs(dropped.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 20000)  # 5 standard deviations
    np.testing.assert_array_equal(found["text"], np.where(dropped[:, None, None], 0, text))
    np.testing.assert_array_equal(found["text_mask"], np.where(dropped[:, None], False, mask))
    assert set(edm.drop_labels(jax.random.key(0), cond, 0.0, 0)) == {"text", "text_mask"}


def test_the_step_drops_control_metadata():
    """Apart from labels, with its own probability; not at all by default."""
    seen = []

    def spy(params, x, sigma, cond=None, key=None):
        jax.debug.callback(lambda dropped, label: seen.append((dropped, label)), cond.get("drop_control", False), cond["label"])
        return params["a"] * x

    params, batch = {"a": jnp.float32(0.5)}, {**_batch(2000), "label": jnp.zeros(2000, jnp.int32)}
    _step(edm.Settings(label_dropout=0.5, control_dropout=0.3, num_classes=10), spy, params, batch)
    jax.effects_barrier()
    dropped, null = np.asarray(seen[0][0]), np.asarray(seen[0][1]) == 10
    assert abs(dropped.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 2000)  # 5 standard deviations
    assert abs((dropped & null).mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 2000)  # independent
    seen.clear()
    _step(edm.Settings(num_classes=10), spy, params, batch)
    jax.effects_barrier()
    assert not np.any(seen[0][0])


def test_the_step_drops_labels():
    def denoise(params, x, sigma, cond=None, key=None):
        return params["a"] * x + jnp.where(cond["label"] == 10, jnp.nan, 0.0).reshape(-1, 1, 1, 1)

    params, batch = {"a": jnp.float32(0.5)}, {**_batch(16), "label": jnp.zeros(16, jnp.int32)}
    _, metrics = _step(edm.Settings(label_dropout=0.5, num_classes=10), denoise, params, batch)
    assert np.isnan(metrics["loss"])  # 16 labels, none dropped: 2^-16
    _, metrics = _step(edm.Settings(label_dropout=0.0, num_classes=10), denoise, params, batch)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (edm.Settings(control_dropout=1.5), "control_dropout is a probability, found 1.5"),
        (edm.Settings(distribution="lognorml"), "unknown noise distribution 'lognorml'; did you mean 'lognormal'"),
        (edm.Settings(distribution_options={"p_men": 0}), "unknown option 'p_men' .* did you mean 'p_mean'"),
        (edm.Settings(weighting="emd"), "unknown weighting 'emd'; did you mean 'edm'"),
        (edm.Settings(weighting_options={"gamma": 5}), "unknown option 'gamma' of weighting 'edm'"),
        (edm.Settings(label_dropout=1.5, num_classes=10), "label_dropout is a probability, found 1.5"),
        (edm.Settings(label_dropout=0.1), "label_dropout needs labels"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        edm.make(settings, _scale, optax.scale_by_adam(), lambda i: 1e-3)


def test_dropping_labels_of_a_batch_without_any_is_refused():
    with pytest.raises(ValueError, match=r"label_dropout=0.1 needs labels or texts, found a batch with \['augment'\]"):
        batch = {**_batch(2), "augment": jnp.zeros((2, 9))}
        _step(edm.Settings(label_dropout=0.1, num_classes=10), _scale, {"a": jnp.float32(1)}, batch)


def test_training_finds_the_denoiser_of_gaussian_data():
    """F = w c_in x + b per level is exact for one level only; at sigma = 0.5 = s the least loss is 1 per pixel."""

    def network(params, x, noise_label, cond=None, key=None):
        return params["w"] * x + params["b"]

    settings = edm.Settings(distribution_options={"p_mean": float(np.log(0.5)), "p_std": 0.0})
    denoise = prediction.edm_denoiser(network, sigma_data=0.5)
    method = edm.make(settings, denoise, optax.scale_by_adam(), lambda i: jnp.float32(0.05))
    state = method.init({"w": jnp.float32(1.0), "b": jnp.float32(-1.0)})
    step = jax.jit(method.step)
    losses = []
    for i in range(150):
        state, metrics = step(state, {}, _batch(64, seed=i), jax.random.key(1000 + i), jnp.int32(i))
        losses.append(float(metrics["loss"]) / np.prod(SHAPE))
    # D = x/2 here: F = (D - c_skip x) / c_out = 0, c_skip being 1/2 at sigma = sigma_data
    assert abs(float(state.params["w"])) < 0.05 and abs(float(state.params["b"])) < 0.05  # Adam's last steps, rate 0.05
    assert losses[0] > 2.5 and abs(np.mean(losses[-20:]) - 1) < 0.05
