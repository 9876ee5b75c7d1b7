"""Whole pipelines against diffusers': tokeniser, text encoders, network, guidance, 28 Euler steps, autoencoder."""

import sys
import warnings

import numpy as np
import pytest

from diffjax.build import companions, published, runs
from diffjax.core import solvers
from diffjax.sampling import generate
import tiny_folders

PROMPTS = ["a photo of a red fox", "the blue car on a hill."]
NEGATIVE = "a car"
STEPS, SCALE = 28, 4.0


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, about its own defaults
        yield


def starting_noise(run, sigma, flow=False):
    """What `runs.draw` starts from for seeds 3 and 5, in the scale and layout of diffusers."""
    import torch

    noise = np.asarray(generate.initial_noise(0, np.array([3, 5]), run.data.shape)).transpose(0, 3, 1, 2)
    # its Euler steps of DDPM multiply with sigma too; a flow starts from a mixture with this much noise
    return torch.tensor(noise * (sigma / (1 + sigma) if flow else 1.0))


def ours(folder, plan=None, **options):
    run = published.load_model(folder)
    plan = runs.run_plan(run, solver="euler", order=0, num_steps=STEPS) if plan is None else plan
    return run, runs.draw(
        run, plan, 0, [3, 5], batch_size=2, prompts=PROMPTS, negative_prompt=NEGATIVE, guidance_scale=SCALE, **options
    )


def assert_same_pictures(found, expected, tolerance):
    """Images in [0, 1], NHWC."""
    assert expected.std() > 0.05
    np.testing.assert_allclose(np.clip(found / 2 + 0.5, 0, 1), expected, atol=tolerance)


@pytest.mark.parametrize("kind", ["stable_diffusion", "stable_diffusion_xl", "pixart"])
def test_ddpm_pipelines(kind, transformers, tmp_path):
    pipeline = getattr(tiny_folders, kind)(transformers, tmp_path / "model")
    run, found = ours(tmp_path / "model")
    options = {"pixart": {"use_resolution_binning": False, "clean_caption": False}}.get(kind, {})
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2 if kind != "pixart" else NEGATIVE, num_inference_steps=STEPS,
        guidance_scale=SCALE, latents=starting_noise(run, run.config.sample.sigma_max), output_type="np",
        height=16, width=16, **options,
    ).images  # fmt: skip
    assert_same_pictures(found, expected, 2e-4)  # 28 guided steps add up rounding to a few 1e-5


def test_flow_pipeline(transformers, tmp_path):
    pipeline = tiny_folders.stable_diffusion_3(transformers, tmp_path / "model")
    times = np.linspace(0.999, 0.001, STEPS)
    shifted = 3 * times / (1 + 2 * times)
    levels = shifted / (1 - shifted)
    run, found = ours(tmp_path / "model", solvers.make_plan("euler", np.append(levels, 0.0)))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, sigmas=times.tolist(), guidance_scale=SCALE, output_type="np", height=16,
        width=16, latents=starting_noise(run, levels[0], flow=True), max_sequence_length=77,
    ).images  # fmt: skip
    assert_same_pictures(found, expected, 1e-3)  # labels are rounded to 1e-4, see tiny_folders


def test_unconditional_pipeline(transformers, tmp_path, monkeypatch):
    pipeline = tiny_folders.ldm(transformers, tmp_path / "model")
    run = published.load_model(tmp_path / "model")
    plan = runs.run_plan(run, solver="euler", order=0, num_steps=STEPS)
    found = runs.draw(run, plan, 0, [3, 5], batch_size=2)
    # theirs takes no latents: ours are put in the place of those it draws
    noise = starting_noise(run, 1.0)
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda shape, **options: noise)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, num_inference_steps=STEPS, output_type="np").images
    assert_same_pictures(found, expected, 2e-4)  # 28 steps add up rounding to a few 1e-5
    with pytest.raises(ValueError, match="this run takes no texts"):
        runs.draw(run, plan, 0, [3], batch_size=1, prompts=["a fox"])
