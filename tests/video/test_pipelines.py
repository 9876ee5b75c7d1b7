"""Image to video and text to video against the pipelines of diffusers, whole, on tiny networks with drawn weights."""

import dataclasses
import functools
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax.build import videos
from diffjax.core import grids, prediction, solvers, trees
from diffjax.models import svd as svd_models
from diffjax.nn import functional
from diffjax.sampling import generate
from diffjax.video import guided, pipelines, rehash
import tiny_folders

SEEDS = [3, 5]
FRAMES, STEPS = 4, 5
SIZE = (16, 24)  # pixels; latents have half of it
GUIDANCE = (1.0, 3.0)
PROMPT, NEGATIVE = "a photo of a red fox", "a car"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers, about its own defaults
        yield


@pytest.fixture(scope="module")
def svd(transformers, tmp_path_factory):
    """(their pipeline, its folder)."""
    folder = tmp_path_factory.mktemp("svd") / "model"
    pipeline = tiny_folders.stable_video_diffusion(transformers, folder, FRAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


@pytest.fixture(scope="module")
def animatediff(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("animatediff") / "model"
    pipeline = tiny_folders.animatediff(transformers, folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


@functools.cache
def picture(height=40, width=50):
    """Waves of three colours."""
    y, x = np.mgrid[:height, :width] / 8
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x) * np.cos(y)], axis=-1)
    return np.round(127.5 * (1 + waves)).astype(np.uint8)


@pytest.fixture
def latents(monkeypatch):
    """What the last call of a pipeline decoded."""
    kept, decode = [], pipelines.decode
    monkeypatch.setattr(pipelines, "decode", lambda *args: kept.append(np.array(args[2])) or decode(*args))
    return kept


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def noise(channels_at):
    """Our initial noise of SEEDS in the layout of diffusers."""
    import torch

    ours = np.asarray(generate.initial_noise(0, np.array(SEEDS), (FRAMES, SIZE[0] // 2, SIZE[1] // 2, 4)))
    return torch.tensor(np.moveaxis(ours, -1, channels_at))


def check(found, z, expected, decoded):
    """Ours against theirs: latents (B, T, h, w, c), and frames before they are rounded."""
    assert relative(z, expected) < 1e-4  # 3e-6 was measured
    assert decoded.std() > 0.05
    rounded = np.round(255 * np.clip(decoded / 2 + 0.5, 0, 1))
    assert found.shape == (len(SEEDS), FRAMES, *SIZE, 3) and found.dtype == np.uint8
    # half a level either way where the sum is near the middle of two
    assert np.max(np.abs(found - rounded)) <= 1 and np.mean(found != rounded) < 0.01


def test_image_to_video(svd, latents, monkeypatch):
    import torch

    pipeline, folder = svd
    video = videos.load_video(folder)
    found = videos.from_picture(
        video, picture(), SEEDS, size=SIZE, num_steps=STEPS, guidance_scale=GUIDANCE, fps=9, motion_bucket=60,
        augmentation=0.1,
    )  # fmt: skip
    # theirs draws the noise on the picture: ours is put in its place
    ours = torch.tensor(np.moveaxis(np.asarray(pipelines.picture_noise(0, SEEDS, (*SIZE, 3))), -1, 1))
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda shape, **options: ours)
    expected = pipeline(
        [Image.fromarray(picture())] * 2, *SIZE, num_frames=FRAMES, num_inference_steps=STEPS, latents=noise(2), fps=9,
        motion_bucket_id=60, noise_aug_strength=0.1, min_guidance_scale=GUIDANCE[0], max_guidance_scale=GUIDANCE[1],
        output_type="latent",
    ).frames  # fmt: skip
    with torch.no_grad():
        decoded = np.moveaxis(pipeline.decode_latents(expected, FRAMES, FRAMES).numpy(), 1, -1)
    check(found, latents[0], np.moveaxis(expected.numpy(), 2, -1), decoded)


def test_text_to_video(animatediff, latents):
    import torch

    pipeline, folder = animatediff
    found = videos.from_text(
        videos.load_video(folder), PROMPT, SEEDS, size=SIZE, negative_prompt=NEGATIVE, num_frames=FRAMES,
        num_steps=STEPS, guidance_scale=4.0,
    )  # fmt: skip
    expected = pipeline(
        [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, num_frames=FRAMES, height=SIZE[0], width=SIZE[1],
        num_inference_steps=STEPS, guidance_scale=4.0, latents=noise(1), output_type="latent",
    ).frames  # fmt: skip
    with torch.no_grad():
        decoded = np.moveaxis(pipeline.decode_latents(expected).numpy(), 1, -1)
    check(found, latents[0], np.moveaxis(expected.numpy(), 1, -1), decoded)


def test_stable_diffusion_with_an_adapter(animatediff, tmp_path):
    """The same weights, steps and words as of the pipeline in one folder: the authors' sampler is the one that it has."""
    pipeline, folder = animatediff
    package = tiny_folders.diffusers()
    image = package.StableDiffusionPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, safety_checker=None,
        unet=tiny_folders.unet(package), scheduler=package.PNDMScheduler(), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    image.save_pretrained(tmp_path / "image")
    found = videos.load_video(tmp_path / "image", motion=folder / "motion_adapter")
    expected = videos.load_video(folder)
    for part in ("text_encoder", "unet", "vae"):
        jax.tree.map(np.testing.assert_array_equal, found.weights(part), expected.weights(part))
    jax.tree.map(np.testing.assert_array_equal, found.plan(STEPS), expected.plan(STEPS))
    tables = (video.parts.precondition.keywords["schedule"] for video in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, *map(dataclasses.asdict, tables))
    words, others = (video.tokenise([PROMPT, NEGATIVE]) for video in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, words, others)
    same = ("num_frames", "max_frames", "factor", "channels", "context")
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]


# Ways to the same ------------------------------------------------------------------------------------------------


@functools.cache
def small():
    """(network, parameters, noise, cond, uncond) of one level, with drawn weights and conditions."""
    make = lambda rngs: svd_models.SVDUNet(  # noqa: E731
        width=32, channel_mult=(1,), num_blocks=1, transformer_depth=(1,), heads=(2,), context_width=8, rngs=rngs
    )
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    shapes = trees.flatten(functional.abstract(make))
    drawn = [draw(*leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])).astype(np.float32) for leaf in shapes.values()]
    drawn = [1 + value / 10 if path.endswith("scale") else value for path, value in zip(shapes, drawn, strict=True)]
    params = jax.tree.unflatten(jax.tree.structure(functional.abstract(make)), drawn)
    cond = {"image": draw(1, 1, 8), "image_latents": draw(1, 4, 6, 4), "control": np.float32([[6.0, 127.0, 0.02]])}
    uncond = {**cond, "image": np.zeros((1, 1, 8), np.float32), "image_latents": np.zeros((1, 4, 6, 4), np.float32)}
    return guided.functions(make), params, draw(1, FRAMES, 4, 6, 4), cond, uncond


SCALE = np.linspace(*GUIDANCE, FRAMES, dtype=np.float32)
KARRAS = solvers.make_plan("euler", grids.append_zero(grids.polynomial(STEPS, 0.002, 700.0)))


def denoised(**options):
    network, params, x, cond, uncond = small()
    x = jnp.array(x)
    found = pipelines.denoise(network, prediction.edm_v_denoiser, params, x, KARRAS, cond, uncond, SCALE, **options)
    assert x.is_deleted()  # donated
    return np.asarray(found)


def test_one_half_after_the_other(x64):
    """In float64: a batch of two is summed in another order than two of one, and in float32 guidance makes 1e-6 of it."""
    network, *arrays = small()
    params, x, cond, uncond = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arrays)
    both, label = guided.halves(uncond, cond), jnp.array([1.2])
    found, expected = (
        jax.jit(lambda params, x, way=way: guided.guided(network, SCALE, way).full(params, x, label, both))(params, x)
        for way in (True, False)
    )
    error = relative(np.asarray(found), np.asarray(expected))
    assert error < 1e-12  # 2e-15 was measured


def test_rehash_of_the_network():
    half = (0, 2, 4)
    found = {mode: denoised(schedule=rehash.Schedule(STEPS, half, mode)) for mode in ("output", "literal")}
    # 700 times unit noise at first
    assert np.max(np.abs(found["literal"] - found["output"])) <= 1e-6 * np.max(np.abs(found["output"]))
    # new x, old features, one half after the other: not the same
    temporal = denoised(schedule=rehash.Schedule(STEPS, half, "temporal"), sequential=True)
    assert relative(temporal, found["output"]) > 1e-4


# What goes in ----------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("height, width", [(576, 1024), (224, 224), (100, 300), (449, 225)])
def test_what_clip_sees(height, width):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    tiny_folders.diffusers()
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as theirs

    random = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = torch.tensor(np.moveaxis(random / np.float32(255) * 2 - 1, -1, 0)[None].astype(np.float32))
    expected = np.moveaxis(theirs._resize_with_antialiasing(image, (224, 224))[0].numpy(), 0, -1)
    # sums of up to 50 float32 products; places between pixels are rounded to 1e-5 there
    np.testing.assert_allclose(pipelines.for_clip(random), expected, atol=2e-4)
    assert relative(pipelines.for_clip(random), expected) < 2e-5


def test_bad_input(svd, animatediff):
    image, text = videos.load_video(svd[1]), videos.load_video(animatediff[1])
    with pytest.raises(ValueError, match="multiples of 2: take 16x24"):
        videos.from_picture(image, picture(), SEEDS, size=(16, 25))
    with pytest.raises(ValueError, match="1 to 24, the positions"):
        videos.from_text(text, PROMPT, SEEDS, size=SIZE, num_frames=25)
    with pytest.raises(ValueError, match="give --prompt"):
        videos.from_picture(text, picture(), SEEDS, size=SIZE)
    with pytest.raises(ValueError, match="give --image"):
        videos.from_text(image, PROMPT, SEEDS, size=SIZE)
    with pytest.raises(ValueError, match="has its own motion"):
        videos.load_video(svd[1], motion="adapter")
    with pytest.raises(ValueError, match="expected uint8"):
        pipelines.tell_picture(image.parts, image.weights, np.zeros((1, 4, 4, 3)), None, sample_ids=[0], num_frames=2)
    with pytest.raises(ValueError, match="schedule of 7 steps for a plan of 5"):
        videos.from_picture(image, picture(), SEEDS, size=SIZE, num_steps=5, schedule=rehash.uniform(7, 3))
