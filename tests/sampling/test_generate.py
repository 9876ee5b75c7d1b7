"""Pictures from seeds: the same whatever the batches, chunks and devices, from two programs, with early errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffjax.core import grids, guidance, solvers
from diffjax.runtime.mesh import make_mesh
from diffjax.sampling import generate as lib
from diffjax.sampling.generate import draw_labels, generate, generate_chunks, initial_noise, to_uint8

# One small shape, so that all tests share the compiled draws (1.5 s each); rows of 10 are no whole number of vectors.
SHAPE = (5, 1, 2)
CLASSES = 10
SEED = 3
IDS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 1000, 2**31, 2**32 - 1])  # 8 and 5 do not divide 11; both ends of uint32
NULL = functools.partial(guidance.null_label, num_classes=CLASSES)
GRID = grids.append_zero(grids.polynomial(5, 0.02, 10.0))
LAST = solvers.make_plan("dpmpp", [4.0, 0.0])  # one call, whose D is the sample: 0 y + 1 D; times 4 is exact
HEUN = solvers.make_plan("heun", GRID)
CHURN = solvers.make_plan("edm_stochastic", GRID, s_churn=2.0)

# (batch size, devices or None for no mesh): chunks of 5, the last one padded; devices that hold 1, 4 and 8 of a chunk
LAYOUTS = [pytest.param(5, None, marks=pytest.mark.fast), (8, 8), (8, 2), (8, 1)]


def told(params, x, sigma, cond=None, key=None):
    """D is x itself, with the label in channel 0: after `LAST`, what the sampler was started with."""
    return x.at[..., 0].set(cond["label"].astype(x.dtype)[:, None, None])


def two_labels(params, x, sigma, cond=None, key=None):
    """The label in channels 0 and 1."""
    return told(params, x, sigma, cond).at[..., 1].set(cond["label"].astype(x.dtype)[:, None, None])


def network(params, x, sigma, cond=None, key=None):
    """Two matrix products, whose sums XLA orders by their shape, under EDM's scalings."""
    h = x.reshape(len(x), -1) / jnp.sqrt(1 + sigma**2)
    h = jnp.tanh(h @ params["enter"] + params["label"][cond["label"]] + jnp.log(sigma))
    return x / (1 + sigma**2) + sigma / jnp.sqrt(1 + sigma**2) * (h @ params["leave"]).reshape(x.shape)


def weights(seed=0, width=32):
    random, size = np.random.RandomState(seed), int(np.prod(SHAPE))
    shapes = {"enter": (size, width), "label": (CLASSES + 1, width), "leave": (width, size)}
    return {name: jnp.asarray(random.randn(*s) / np.sqrt(s[0]), jnp.float32) for name, s in shapes.items()}


def make(denoise, plan, ids=IDS, batch_size=8, devices=None, seed=SEED, num_classes=CLASSES, params=None, **options):
    mesh = None if devices is None else make_mesh(devices)
    return generate(
        denoise, weights() if params is None else params, plan, ids, SHAPE,
        batch_size=batch_size, seed=seed, num_classes=num_classes, mesh=mesh, **options,
    )  # fmt: skip


# The same samples ------------------------------------------------------------------------------------------------


@functools.cache
def start_one_by_one():
    """Labels and noise from calls with a single id: no batch there could matter."""
    one = [np.uint32([i]) for i in IDS]
    labels = np.concatenate([draw_labels(SEED, i, CLASSES) for i in one])
    return labels, np.concatenate([initial_noise(SEED, i, SHAPE) for i in one])


@pytest.mark.parametrize("batch_size, devices", [(8, None), *LAYOUTS])
def test_start_noise_and_labels_to_the_bit(batch_size, devices):
    labels, noise = start_one_by_one()
    for places in (slice(None), [9, 2, 10, 4], [6]):
        found = make(told, LAST, IDS[places], batch_size, devices)
        np.testing.assert_array_equal(found[..., 0], np.broadcast_to(labels[places, None, None], found.shape[:-1]))
        np.testing.assert_array_equal(found[..., 1], 4 * noise[places][..., 1])
    assert len(np.unique(noise)) > 0.99 * noise.size  # every id has its own noise; float32 repeats a few by chance


@pytest.mark.parametrize("plan", [HEUN, CHURN], ids=["heun", "stochastic"])
def test_order_and_subsets_do_not_move_a_bit(plan):
    """On one device with one chunk size all run the same program, whose rows do not see each other."""
    whole = make(network, plan)
    assert np.ptp(whole) > 1  # a collapsed sample would agree with anything
    for places in (np.random.RandomState(0).permutation(len(IDS)), [9, 2, 10, 4], [6], [6, 6]):
        np.testing.assert_array_equal(make(network, plan, IDS[places]), whole[places])


@pytest.mark.parametrize("batch_size, devices", LAYOUTS)
def test_samples_of_other_chunks_and_devices(batch_size, devices):
    whole, found = make(network, HEUN), make(network, HEUN, IDS, batch_size, devices)
    # 2e-5: a state of 40 (4 sigma at level 10) is rounded to 2e-6, at each of 9 calls
    np.testing.assert_allclose(found, whole, rtol=0, atol=2e-5)
    if devices == 1:
        np.testing.assert_array_equal(found, whole)  # same chunk, one device: same program


def test_stochastic_samples_of_other_chunks_and_devices():
    """Both change at once (chunks of 4 on 2 devices, the last one padded): one compilation less."""
    whole = make(network, CHURN)
    # 4e-5: as above, and added noise is rounded as the state is
    np.testing.assert_allclose(make(network, CHURN, batch_size=4, devices=2), whole, rtol=0, atol=4e-5)
    assert len(np.unique(whole.round(4), axis=0)) == len(IDS)
    other = make(network, CHURN, seed=SEED + 1)
    assert np.abs(other - whole).reshape(len(IDS), -1).max(axis=1).min() > 0.1  # no id keeps its sample


def test_chunks_come_in_order_and_without_their_padding():
    """Given labels travel with their ids: those that would be drawn make the same samples."""
    cond = {"label": start_one_by_one()[0]}
    chunks = list(generate_chunks(network, weights(), HEUN, IDS, SHAPE, batch_size=8, seed=SEED, cond=cond))
    assert [len(chunk) for chunk in chunks] == [8, 3]
    np.testing.assert_array_equal(np.concatenate(chunks), make(network, HEUN))


# Compilations ----------------------------------------------------------------------------------------------------


def test_values_do_not_recompile_and_a_new_plan_shape_does_once():
    traces = []

    def traced(params, x, sigma, cond=None, key=None):
        traces.append(1)
        return network(params, x, sigma, cond)

    def run(value, steps=4, **options):  # everything that is a value differs, and so does the number of samples
        ids = np.arange(7 + value) * (value + 1)
        cond = {"label": (ids + value) % CLASSES}
        options = {"guidance_scale": 1.0 + value, "uncond": NULL, "guidance_interval": (0.1, 2.0 + value), **options}
        plan = solvers.make_plan("dpmpp", grids.polynomial(steps + 1, 0.02 * (value + 1), 10.0 + value))
        return make(traced, plan, ids, seed=value, params=weights(value), cond=cond, **options)

    def programs():
        return lib._start._cache_size(), lib._chunk._cache_size(), len(traces)

    first = run(0)
    before = programs()
    assert before[2] == 2  # one conditional, one unconditional call in the program
    ends = [run(value) for value in (1, 2, 3)]
    assert programs() == before
    assert not np.allclose(ends[0][:7], first)
    run(0, steps=6)
    run(2, steps=6)
    start, chunk, calls = before
    assert programs() == (start, chunk + 1, calls + 2)  # the draws serve plans of all shapes


# Guidance, transform, finish -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval, guided", [(None, True), ((1, 4), True), ((0, 1), False), ((4, 9), False)])
def test_guidance_of_labels_is_exact(interval, guided):
    """With D = label the guided estimate is null + w (label - null): whole numbers, exact in float32. Level 4 is in
    (low, 4] and not in (4, high]."""
    label = start_one_by_one()[0]
    found = make(told, LAST, guidance_scale=3.0, uncond=NULL, guidance_interval=interval)[:, 0, 0, 0]
    np.testing.assert_array_equal(found, CLASSES + 3.0 * (label - CLASSES) if guided else label)


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"guidance_scale": 7.0, "guidance_interval": (20, 30)}])
def test_scale_one_and_levels_outside_the_interval_are_conditional(options):
    conditional = make(network, HEUN)
    # 2e-5: null + (cond - null) rounds values of 10 by 1e-6, at each of 9 calls
    np.testing.assert_allclose(make(network, HEUN, uncond=NULL, **options), conditional, rtol=0, atol=2e-5)
    assert np.abs(make(network, HEUN, uncond=NULL, guidance_scale=2.0) - conditional).max() > 0.1


def test_guided_channels_and_a_curve():
    """Channel 0 is guided, by a scale that is 3 / 4 at level 4: null + 0.75 (label - null); the others stay."""
    options = dict(guidance_scale=3.0, uncond=NULL, guidance_curve=lambda scale, sigma: scale / sigma)
    label = start_one_by_one()[0]
    found = make(two_labels, LAST, guidance_channels=1, **options)
    np.testing.assert_array_equal(found[:, 0, 0, 0], CLASSES + 0.75 * (label - CLASSES))
    np.testing.assert_array_equal(found[:, 0, 0, 1], label)
    np.testing.assert_array_equal(make(two_labels, LAST, **options)[:, 0, 0, 1], CLASSES + 0.75 * (label - CLASSES))


@pytest.mark.fast
def test_to_uint8():
    images = jnp.array([-1.0, 0.0, 1.0, -1.5, 7.0, 0.5, -0.999])
    # 127.5 x + 128 truncated: 0.5, 128, 255.5 and 191.75, 0.6275
    np.testing.assert_array_equal(to_uint8(images), np.array([0, 128, 255, 0, 255, 191, 0], np.uint8))


def test_transform_and_finish():
    flipped = make(told, LAST, transform=jnp.negative)
    np.testing.assert_array_equal(flipped, -make(told, LAST))
    pixels = make(told, LAST, transform=jnp.negative, finish=to_uint8)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, to_uint8(flipped))


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 2.0}, r"guidance_scale=2.0 needs a null class: give uncond \(see guidance.null_label"),
        ({"guidance_interval": (0.1, 1.0)}, "_channels, _curve and control_strength need a guidance_scale"),
        ({"guidance_channels": 3}, "_channels, _curve and control_strength need a guidance_scale"),
        ({"guidance_scale": 2.0, "uncond": NULL, "guidance_interval": (1.0, 2.0), "guidance_channels": 1}, "of one scale"),
        ({"guidance_scale": 2.0, "uncond": NULL, "guidance_interval": (2.0, 1.0)}, "needs 0 <= low < high"),
        ({"cond": {"label": [0, 1, 11]}}, r"labels must be 0..10 \(the null class\), found 0..11"),
        ({"cond": {"label": [0, -1, 2]}}, "labels must be 0..10 .* found -1..2"),
        ({"cond": {"label": [0.0, 1.0, 2.0]}}, r"integers of shape \(3,\), found float64"),
        ({"cond": {"label": 1}}, r"integers of shape \(3,\), found int64 \(\)"),
        ({"cond": {"label": [0, 1]}}, r"cond\['label'\] must have one entry for each of 3 samples, found \(2,\)"),
        ({"cond": {"augment": np.ones((4, 9))}}, r"cond\['augment'\] .* each of 3 samples, found \(4, 9\)"),
        ({"sample_ids": [0, -1]}, "sample_ids must be in 0..2.32-1, found -1..0"),
        ({"sample_ids": [5, 2**32]}, "sample_ids must be in 0..2.32-1, found 5..4294967296"),
        ({"sample_ids": []}, "non-empty list of integers"),
        ({"cond": {"label": [0, -1, 2]}, "num_classes": None}, "found -1..2"),
        ({"num_classes": 0}, "num_classes must be positive, or None"),
        ({"seed": 1.5}, "seed must be an integer in 0..2.32-1, found 1.5"),
        ({"seed": -1}, "seed must be an integer in 0..2.32-1, found -1"),
        ({"seed": 2**32}, "seed must be an integer in 0..2.32-1, found 4294967296"),
        ({"batch_size": 0}, "batch_size must be a positive integer, found 0"),
        ({"mesh": "data", "batch_size": 3}, "batch_size 3 does not divide over the 2 devices that share it: take a"),
        ({"mesh": "model"}, r"mesh must have an axis 'data', found \('model',\)"),
    ],
)
def test_errors_come_before_any_sampling(options, message):
    """Already from the call, not from the first chunk; (2,) is a shape of this test alone, so a draw would compile."""
    calls, drawn = [], lib._start._cache_size()
    options = {"sample_ids": range(3), "batch_size": 2, "num_classes": CLASSES, **options}
    if "mesh" in options:
        options["mesh"] = jax.sharding.Mesh(jax.devices()[:2], (options["mesh"],))
    with pytest.raises(ValueError, match=message):
        generate_chunks(lambda *inputs: calls.append(inputs), {}, LAST, options.pop("sample_ids"), (2,), **options)
    assert not calls and lib._start._cache_size() == drawn


# Distributions: bounds of 5 standard deviations on draws that the seed fixes ---------------------------------------


def test_labels_are_uniform_and_independent():
    labels = make(told, LAST, np.arange(3000))[:, 0, 0, 0].astype(int)
    pairs = labels[::2] * CLASSES + labels[1::2]  # of neighbours
    assert labels.min() == 0 and labels.max() == CLASSES - 1
    for values, num in [(labels, CLASSES), (pairs, CLASSES**2)]:
        # chi-square within 99.8 %, both tails: ids modulo 10 would be uniform, and far too even
        assert 1e-3 < scipy.stats.chisquare(np.bincount(values, minlength=num)).pvalue < 1 - 1e-3


def test_noise_is_unit_and_independent_between_ids_and_seeds():
    num, size = 128, 1024
    ids = np.arange(num, dtype=np.uint32)
    rows, other = (np.asarray(initial_noise(seed, ids, (size,)), np.float64) for seed in (SEED, SEED + 1))
    assert abs(rows.mean()) < 5 / np.sqrt(rows.size)
    assert abs(rows.var() - 1) < 5 * np.sqrt(2 / rows.size)  # the variance of a squared normal is 2
    both = np.concatenate([rows, other])
    products = both @ both.T / size
    # 6: the largest of 33,000 pairs, each 1 / sqrt(size), passes 5 in one draw of 50
    assert np.abs(products - np.diag(np.diag(products))).max() < 6 / np.sqrt(size)


def test_noise_of_the_solver_is_unit_and_not_the_start_noise():
    """Level 1 is raised to sqrt 2 (gamma is capped there). Where D = x the slope is zero: the sample is start + eps."""
    plans = [solvers.make_plan("edm_stochastic", [1.0, 0.0], s_churn=churn) for churn in (1.0, 0.0)]
    end, start = (make(told, plan, np.arange(400))[..., 1] for plan in plans)
    eps = end - start
    assert abs(eps.mean()) < 5 / np.sqrt(eps.size) and abs(eps.var() - 1) < 5 * np.sqrt(2 / eps.size)
    assert abs((eps * start).mean()) < 5 / np.sqrt(eps.size)
