"""Networks of video trained here for two steps, and the report on their clips."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.build import networks, video_networks
from diffjax.cli import flags, video_demo
from diffjax.cli.train import train_and_evaluate
from diffjax.core.grids import append_zero, polynomial
from diffjax.core.solvers import make_plan
from diffjax.data.sources import DataShape
from diffjax.runtime import videos
from diffjax.video import pipelines

SMALL = {
    "digits": {"channel_mult": (1,), "transformer_depth": (0,)},
    "clips": {"channel_mult": (1,), "transformer_depth": (0,), "heads": (2,)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Runs of two steps; the clips are those of a file made here."""
    if importlib.util.find_spec("av") is None:
        pytest.skip("av is not installed: pip install av")
    folder = tmp_path_factory.mktemp("video")
    random = np.random.default_rng(0)
    videos.save(folder / "film.mp4", random.integers(0, 256, (6, 16, 16, 3), np.uint8), fps=6)
    for name, model in SMALL.items():
        config = flags.load_config(f"configs/quick/video_{name}.py")
        config.model.update(model)
        config.data.update({"image_size": 8, "num_frames": 3})
        if name == "clips":
            config.data.update({"path": str(folder / "film.mp4"), "every": 1})
        config.train.update({"batch_size": 2, "total_images": 4, "sample_every_steps": 0, "num_devices": 1})
        config.sample.num_steps = 2
        train_and_evaluate(config, folder / name)
    return folder


@pytest.fixture(scope="module")
def config(base):
    config = flags.load_config("configs/quick/compare_video.py")
    config.update({"base": str(base), "num_clips": 2, "num_steps": 5, "full_steps": 3, "rounds": 1})
    config.plans = {"tight": {"frames": 64, "rows": 64, "tokens": 4}}
    config.measured.update({"frames": 4, "size": 16})
    return config


def test_a_training_says_what_it_learns_and_shows_clips(base):
    for name in SMALL:
        lines = [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
        assert list((base / name / "samples").glob("*.png"))


def test_the_report(base, config, tmp_path):
    """Of the network told a class; its exactness is checked on fresh weights and drawn ones in tests/video."""
    config.models = ("digits",)
    assert [entry.method for entry in video_demo.entries(config)] == ["digits"]
    path = video_demo.compare(config, tmp_path, "the command")
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    exact = {(row["plan"], row["of"]): row["relative_l2"] for row in tables["exactness"]}
    assert set(exact) == {("tight", "clips"), ("tight", "one call")}
    assert max(exact.values()) < 1e-5  # float32, sums in another order
    calls = {row["variant"]: row["calls"] for row in tables["rehash"]}
    assert calls == {"rehash, temporal": 3, "rehash, output": 3, "fewer": 3}
    peaks = {row["plan"]: row["peak_bytes"] for row in tables["memory"]}
    assert set(peaks) == {"unsliced", "tight"} and peaks["tight"] < peaks["unsliced"]
    row = {"model": "digits", "frames": 4, "size": "16x16", "target": "cpu", "stage": "unet"}
    assert tables["memory"][0].items() >= row.items()
    ratios = {(row["of"], row["variant"]): row["ratio"] for row in tables["times"]}
    assert ratios["clips", "unsliced"] == ratios["one call", "unsliced"] == 1 and ratios["clips", "rehash, output"] > 0
    for name in ("digits.gif", "digits.mp4"):
        assert videos.read(tmp_path / name).shape[0] == 3
    assert "digits.png" in path.read_text() and (tmp_path / "digits.png").exists()
    assert (tmp_path / "digits_schedule.json").exists()


def test_a_clip_goes_on_from_its_picture(config):
    """Of a network all of whose weights count: another first frame, another clip."""
    model = video_demo.load(config, "clips")
    np.testing.assert_allclose(model.cond["first_frame"], model.real[:, 0])
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), model.run.params)
    plan = make_plan("euler", append_zero(polynomial(2, 0.1, 10.0)))

    def clip(frame):
        cond = {"first_frame": jnp.asarray(frame)}
        return pipelines.denoise(model.network, model.precondition, params, jnp.array(model.x), plan, cond, {}, None)

    frames = np.asarray(model.cond["first_frame"])
    assert np.abs(np.asarray(clip(frames)) - np.asarray(clip(-frames))).max() > 1e-3


@pytest.mark.fast
def test_what_networks_are_told():
    data = DataShape(8, 1, num_classes=3, num_frames=2)
    x = jnp.zeros((2, 2, 8, 8, 1))
    told = video_networks.teller("motion_unet", data)({"label": jnp.array([1, 3])}, x)
    np.testing.assert_array_equal(told["text"][:, 0], [[0, 1, 0], [0, 0, 0]])  # 3 is the null class
    picture = jnp.broadcast_to(jnp.arange(8.0).reshape(1, 1, 8, 1), (2, 8, 8, 1))
    told = video_networks.teller("svd", data)({"first_frame": picture}, x)
    row = [1.25 / 1.75, 2.5, 4.5, 7 - 1.25 / 1.75]  # under triangles two pixels wide, cut off at the edge
    np.testing.assert_allclose(told["image"].reshape(2, 4, 4)[0, 0], row, rtol=1e-6)
    np.testing.assert_array_equal(told["control"], [video_networks.CONTROL] * 2)
    for name, wanted in (("motion_unet", "give labels"), ("svd", "give cond\\['first_frame'\\]")):
        with pytest.raises(ValueError, match=wanted):
            video_networks.teller(name, data)({}, x)


@pytest.mark.parametrize(
    ("name", "frames", "wanted"),
    [("svd", 0, "of videos: set data.num_frames"), ("dit", 2, "is of images, found data.num_frames=2")],
)
def test_networks_of_another_kind_of_data_are_refused(name, frames, wanted):
    with pytest.raises(ValueError, match=wanted):
        networks.denoiser({"name": name}, DataShape(8, 3, num_frames=frames))


def test_a_video_network_is_a_run_like_another(base):
    """Sampled from seeds by the command for images, on which a row is a video."""
    run = build.load_run(base / "digits")
    drawn = build.draw(run, build.run_plan(run), 0, [0, 1], batch_size=2, labels=np.array([1, 2]))
    assert drawn.shape == (2, 3, 8, 8, 1)
