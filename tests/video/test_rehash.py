"""Step rehash: its identities on a small network, the search for full steps, schedules in files, stale caches."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import grids, guidance, prediction, respaced, schedules, solvers
from diffjax.sampling.sample import sample
from diffjax.video import guided, rehash
import toy_video

B, T = 2, 3
STEPS = 10
HALF = (0, 2, 3, 6, 9)
TABLE = schedules.named("animatediff")
EPS = functools.partial(prediction.eps_denoiser, schedule=TABLE)
KARRAS = grids.append_zero(grids.polynomial(STEPS, 0.002, 700.0))


@pytest.fixture(scope="module")
def params():
    return toy_video.init()


@pytest.fixture(scope="module")
def inputs():
    """(noise, cond)."""
    keys = jax.random.split(jax.random.key(1))
    cond = {"text": jax.random.normal(keys[1], (B, toy_video.CONTEXT))}
    return jax.random.normal(keys[0], (B, T, 4, 2, toy_video.CHANNELS)), cond


def started(noise, plan):
    return noise * np.float32(np.sqrt(1 + plan.sigmas[0] ** 2))


def rehashed(precondition, network, params, inputs, plan, schedule):
    run = jax.jit(lambda params, x, cond: rehash.sample(precondition, network, params, x, plan, schedule, cond))
    return np.asarray(run(params, started(inputs[0], plan), inputs[1]))


def plain(precondition, params, inputs, plan):
    denoise = precondition(toy_video.NETWORK.full)
    return np.asarray(jax.jit(functools.partial(sample, denoise))(params, started(inputs[0], plan), plan, inputs[1]))


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.fast
@pytest.mark.parametrize("mode", rehash.MODES)
@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_all_steps_full_is_the_usual_loop(mode, solver, params, inputs):
    plan = solvers.make_plan(solver, KARRAS, order=1 if solver == "euler" else 2)
    schedule = rehash.Schedule(STEPS, tuple(range(STEPS)), mode)
    found = rehashed(prediction.edm_v_denoiser, toy_video.NETWORK, params, inputs, plan, schedule)
    assert relative(found, plain(prediction.edm_v_denoiser, params, inputs, plan)) < 1e-5  # order of sums


@pytest.mark.parametrize("precondition", [prediction.edm_v_denoiser, EPS])
def test_the_papers_feature_is_the_output(precondition, params, inputs):
    plan = solvers.make_plan("euler", KARRAS) if precondition is not EPS else respaced.ddim(TABLE, STEPS, "leading", 1)
    found = {
        mode: rehashed(precondition, toy_video.NETWORK, params, inputs, plan, rehash.Schedule(STEPS, HALF, mode))
        for mode in rehash.MODES
    }
    assert np.max(np.abs(found["literal"] - found["output"])) <= 1e-6
    for mode in ("temporal", "deepcache"):  # x enters again
        assert relative(found[mode], found["output"]) > 1e-3


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_zero", [False, True])
def test_reused_noise_is_ddim_with_fewer_steps(spacing, to_zero, params, inputs):
    plan = respaced.ddim(TABLE, STEPS, spacing, to_zero=to_zero)
    schedule = rehash.Schedule(STEPS, HALF, "output")
    found = rehashed(EPS, toy_video.NETWORK, params, inputs, plan, schedule)
    levels = plan.sigmas[[*HALF, -1]]
    # the last step of diffusers' DDIM leaves sigma space
    alpha = 1 / np.sqrt(1 + levels[-1] ** 2)
    if spacing == "leading" and not to_zero:  # index 0 is a level of its own, and the last step stands still
        levels, steps = levels[:-1], solvers.make_plan("euler", levels[:-1])
    else:
        steps = solvers.make_plan("euler", levels)
    assert relative(found, alpha * plain(EPS, params, inputs, steps)) < 1e-4
    assert relative(found, plain(EPS, params, inputs, rehash.fewer(plan, schedule))) < 1e-4


def test_a_reused_velocity_is_not_fewer_steps(params, inputs):
    plan, schedule = solvers.make_plan("euler", KARRAS), rehash.Schedule(STEPS, HALF, "output")
    found = rehashed(prediction.edm_v_denoiser, toy_video.NETWORK, params, inputs, plan, schedule)
    few = rehash.fewer(plan, schedule)
    np.testing.assert_allclose(few.advance, solvers.make_plan("euler", KARRAS[[*HALF, -1]]).advance, rtol=1e-12)
    assert relative(found, plain(prediction.edm_v_denoiser, params, inputs, few)) > 1e-3


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("mode", rehash.MODES)
def test_guidance_keeps_both_halves(sequential, mode, params, inputs):
    noise, cond = inputs
    scale = np.linspace(1, 3, T).astype(np.float32)
    both = guided.halves({"text": jnp.zeros_like(cond["text"])}, cond)
    network = guided.guided(toy_video.NETWORK, scale, sequential)
    plan = solvers.make_plan("euler", KARRAS)
    schedule = rehash.Schedule(STEPS, HALF, mode)
    found = rehashed(prediction.edm_v_denoiser, network, params, (noise, both), plan, schedule)

    def by_hand(params, x, noise_label, cond, key=None):
        one = lambda cond: toy_video.full(params, x, noise_label, cond)  # noqa: E731
        without, given = one({"text": jnp.zeros_like(cond["text"])}), one(cond)
        return without + scale.reshape(1, T, 1, 1, 1) * (given - without)

    if mode == "output":
        unguided = guided.VideoNetwork(by_hand, None, None)
        expected = rehashed(prediction.edm_v_denoiser, unguided, params, inputs, plan, schedule)
    else:
        batched = guided.guided(toy_video.NETWORK, scale)
        expected = rehashed(prediction.edm_v_denoiser, batched, params, (noise, both), plan, schedule)
    assert relative(found, expected) < 1e-6


def test_guidance_of_one_scale_is_classifier_free_guidance(params, inputs):
    noise, cond = inputs
    null = {"text": jnp.zeros_like(cond["text"])}
    plan = solvers.make_plan("euler", KARRAS)
    denoise = guidance.cfg(prediction.edm_v_denoiser(toy_video.full), 2.5, lambda cond: null)
    expected = sample(denoise, params, started(noise, plan), plan, cond)
    network = guided.guided(toy_video.NETWORK, 2.5)
    denoise = prediction.edm_v_denoiser(network.full)
    found = sample(denoise, params, started(noise, plan), plan, guided.halves(null, cond))
    assert relative(np.asarray(found), np.asarray(expected)) < 1e-5  # x - D of two halves, rounded apart
    with pytest.raises(ValueError, match="guidance scale of shape"):
        guided.guided(toy_video.NETWORK, jnp.ones(T + 1)).full(params, noise, jnp.ones(B), guided.halves(null, cond))
    with pytest.raises(ValueError, match="one form"):
        guided.halves({}, cond)


@pytest.mark.parametrize("sequential", [None, False, True])
def test_recorded_similarities_are_cosines(sequential, params, inputs):
    noise, cond = inputs
    network = toy_video.NETWORK
    if sequential is not None:
        cond = guided.halves({"text": jnp.zeros_like(cond["text"])}, cond)
        network = guided.guided(network, 2.0, sequential)
    plan = solvers.make_plan("euler", KARRAS)
    found = rehash.record(prediction.edm_v_denoiser, network, params, started(noise, plan), plan, cond, "temporal")
    y, features = started(noise, plan), []
    for level, following in zip(KARRAS[:-1], KARRAS[1:], strict=True):
        root = np.float32(np.sqrt(level**2 + 1))
        out, feature = network.keep(params, y / root, jnp.full(B, np.log(level) / 4, jnp.float32), cond, "temporal")
        per_half = np.asarray(feature).reshape(1 if sequential is None else 2, B, -1)
        features.append(np.concatenate(list(per_half), axis=1))
        slope = (y - (y / root**2 - np.float32(level) / root * out)) / np.float32(level)
        y = y + np.float32(following - level) * slope
    expected = np.zeros((STEPS, STEPS))
    for i, a in enumerate(features):
        for j, b in enumerate(features):
            expected[i, j] = np.mean([u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(a, b, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # ten steps of float32 in two orders of sums
    assert found.min() < 0.99


# Which steps are full -------------------------------------------------------------------------------------------


def decaying(num, rate):
    return np.exp(-rate * np.abs(np.subtract.outer(np.arange(num), np.arange(num))))


def test_search():
    num = 25
    assert rehash.search(decaying(num, 0.1), 1.0) == tuple(range(num))
    assert rehash.search(np.ones((num, num)), 1.0) == (0, num - 1)
    assert rehash.search(np.eye(2), 1.0) == (0, 1)  # the last is the last of the search as well, once
    counts = [len(rehash.search(decaying(num, 0.1), gamma)) for gamma in np.linspace(0, 1, 41)]
    assert counts == sorted(counts) and counts[0] == 2 and counts[-1] == num
    random = np.random.default_rng(0).uniform(size=(num, num))
    for gamma in (0.2, 0.5, 0.9):
        full = rehash.search(random, gamma)
        assert list(full) == sorted(set(full)) and full[0] == 0 and full[-1] == num - 1
        assert full == as_printed(random, gamma)
    # the steps quoted of Zhan 2024, figure 5: alike from 0 to 12, unlike from 13 on
    quoted = np.where(np.maximum.outer(np.arange(num), np.arange(num)) < 13, 0.98, 0.5)
    np.fill_diagonal(quoted, 1.0)
    assert rehash.search(quoted, 0.97) == (0, *range(13, num))


def as_printed(similarity, gamma):
    """Zhan 2024, algorithm 1, with its two counters."""
    full, i, j = [0], 0, 0
    while i < len(similarity):
        if i == j or similarity[i, j] >= gamma:
            i += 1
        else:
            full.append(i)
            j = i
    full.append(len(similarity) - 1)
    return tuple(sorted(set(full)))


@pytest.mark.parametrize("count", [2, 5, 13, 24, 25])
def test_gamma_for_a_number_of_steps(count):
    wavy = decaying(25, 0.05) * (1 + 1e-3 * np.random.default_rng(0).uniform(size=(25, 25)))
    found = rehash.of_count(wavy, count)
    assert found.num_steps == 25 and len(found.full) <= count
    counts = {len(rehash.search(wavy, gamma)) for gamma in np.unique(np.minimum(wavy, 1))} | {25}
    assert len(found.full) == max(n for n in counts if n <= count)


def test_uniform():
    assert rehash.uniform(25, 13).full == tuple(range(0, 25, 2))
    assert rehash.uniform(25, 9, "deepcache").full == tuple(range(0, 25, 3))
    assert rehash.uniform(10, 2).lengths == (8, 0)
    with pytest.raises(ValueError, match="2 to 10"):
        rehash.uniform(10, 11)
    nan = np.full((3, 3), np.nan)
    for wrong, gamma, match in ((np.ones((3, 2)), 0.9, r"\(K, K\)"), (nan, 0.9, "finite"), (np.eye(3), 1.1, "gamma")):
        with pytest.raises(ValueError, match=match):
            rehash.search(wrong, gamma)


def test_files(tmp_path):
    schedule = rehash.uniform(25, 13, "literal")
    rehash.write(tmp_path / "steps.json", schedule)
    assert rehash.read(tmp_path / "steps.json") == schedule
    good = json.loads((tmp_path / "steps.json").read_text())
    wrong = [
        ({"full": [1, 24]}, "first step"), ({"full": [0, 23]}, "from 0 to 24"), ({"full": [0, 25]}, "from 0 to 24"),
        ({"full": [0, 5, 3, 24]}, "increasing"), ({"full": [0, 3, 3, 24]}, "increasing"), ({"full": []}, "expected"),
        ({"full": [0, 2.5, 24]}, "expected"), ({"mode": "temporel"}, "did you mean 'temporal'"),
        ({"full": 7}, "no schedule"), ({"num_steps": 20}, "from 0 to 19"), ({"other": 1}, "no schedule"),
    ]  # fmt: skip
    for change, match in wrong:
        (tmp_path / "wrong.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=match):
            rehash.read(tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text("full: 0")
    with pytest.raises(ValueError, match="no JSON"):
        rehash.read(tmp_path / "wrong.json")


# Stale caches ---------------------------------------------------------------------------------------------------


def test_stale_caches_are_refused(params, inputs):
    noise, cond = inputs
    label = jnp.ones(B)
    guided_network = guided.guided(toy_video.NETWORK, 2.0)
    both = guided.halves({"text": jnp.zeros_like(cond["text"])}, cond)
    for mode in rehash.MODES:
        out, cache = rehash.keep(toy_video.NETWORK, mode, params, noise, label, cond)
        again = rehash.reuse(toy_video.NETWORK, cache, params, noise, label, cond)
        np.testing.assert_allclose(again, out, atol=1e-6)  # the same x: nothing is stale
        for x in (noise[:, :2], noise[:, :, :3], noise[:1]):
            with pytest.raises(ValueError, match="stale cache of step rehash: made for latents"):
                rehash.reuse(toy_video.NETWORK, cache, params, x, label[: len(x)], cond)
        with pytest.raises(ValueError, match="stale cache"):  # guidance was turned on
            rehash.reuse(guided_network, cache, params, noise, label, both)


def test_plans_that_do_not_fit(params, inputs):
    euler = solvers.make_plan("euler", KARRAS)
    schedule = rehash.uniform(STEPS + 1, 5)
    with pytest.raises(ValueError, match="schedule of 11 steps for a plan of 10"):
        rehash.sample(prediction.edm_v_denoiser, toy_video.NETWORK, params, inputs[0], euler, schedule, inputs[1])
    heun, schedule = solvers.make_plan("heun", KARRAS), rehash.uniform(STEPS, 5)
    with pytest.raises(ValueError, match="one network call a step"):
        rehash.sample(prediction.edm_v_denoiser, toy_video.NETWORK, params, inputs[0], heun, schedule, inputs[1])
    with pytest.raises(ValueError, match="euler or ddim"):
        rehash.fewer(solvers.make_plan("dpmpp", KARRAS), rehash.uniform(STEPS, 5))
