"""The command that makes clips, from flags to files, with a tiny model of image to video."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from diffjax.build import videos as models
from diffjax.cli import flags, video
from diffjax.runtime import videos
from diffjax.video import grouping, rehash, slicer
import tiny_folders


def call(*argv):
    return flags.run(video.__doc__, video.define, video.main, ["video", *map(str, argv)])


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """With model, and picture.png."""
    path = tmp_path_factory.mktemp("command")
    tiny_folders.stable_video_diffusion(transformers, path / "model", 3)
    waves = np.sin(np.arange(20 * 30 * 3).reshape(20, 30, 3) / 50)
    Image.fromarray(np.round(127.5 * (1 + waves)).astype(np.uint8)).save(path / "picture.png")
    return path


@pytest.fixture
def image(folder):
    """Flags of a clip."""
    return [f"--model={folder / 'model'}", f"--image={folder / 'picture.png'}", "--size=8x12", "--steps=3"]


def test_clips_of_a_picture(folder, image, tmp_path, capsys):
    plan = grouping.Plan(groups={"conv_out": 3})
    (tmp_path / "plan.json").write_text(plan.dumps())
    more = [f"--slices={tmp_path / 'plan.json'}", "--find_rehash=2", "--rehash_mode=output", "--sequential_guidance"]
    more.append("--offload=skips,weights")  # the same bits
    assert call(*image, *more, "--seeds=4", "--guidance=1-2.5", "--motion_bucket=90", f"--out={tmp_path / 'clips'}") == 0
    out = capsys.readouterr().out
    assert "3 frames, 8x12; 3 steps, 2 of them full" in out
    schedule = rehash.read(tmp_path / "clips" / "steps.json")
    assert schedule == rehash.Schedule(3, (0, 2), "output")  # the only one with two
    found = videos.read(tmp_path / "clips" / "clip_4.gif")
    run = slicer.Sliced(plan)
    with Image.open(folder / "picture.png") as picture:
        expected = models.from_picture(
            models.load_video(folder / "model"), np.asarray(picture), [4], size=(8, 12), num_steps=3,
            guidance_scale=(1.0, 2.5), motion_bucket=90, schedule=schedule, sequential=True, run=run,
        )  # fmt: skip
    # a frame has fewer pixels than a palette has colours: .gif keeps them
    np.testing.assert_array_equal(found, expected[0])
    assert (tmp_path / "clips" / "clip_4.mp4").exists() == bool(importlib.util.find_spec("av"))
    assert json.loads((tmp_path / "clips" / "video.json").read_text()).keys() == {"argv"}
    assert call(*image, f"--out={tmp_path / 'clips'}", "--seeds=4") == flags.USAGE_ERROR
    assert "are not overwritten" in capsys.readouterr().err


def test_half_precision_gives_nearly_the_same(folder, image, tmp_path):
    for dtype in ("float32", "bfloat16"):
        argv = [f"--compute_dtype={dtype}", "--guidance=1", "--frames=2", f"--out={tmp_path / dtype}"]
        assert call(*image, *argv) == 0
    whole, half = (videos.read(tmp_path / dtype / "clip_0.gif").astype(float) for dtype in ("float32", "bfloat16"))
    # 3 digits of each product; another clip is tens of levels away
    assert 0 < np.abs(half - whole).mean() < 6


def test_a_budget_makes_a_plan(image, tmp_path, capsys):
    assert call(*image, f"--out={tmp_path / 'clips'}", "--slices=40MB", "--rehash=2", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "2 of them full" in out and "nothing was written" in out and not (tmp_path / "clips").exists()
    assert call(*image, f"--out={tmp_path / 'clips'}", "--slices=1MB", "--dry_run") == flags.USAGE_ERROR
    assert "finest slices need" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.parametrize("argv, match", [
    (["--image=a.png", "--prompt=a fox"], "and not both"),
    ([], "and not both"),
    (["--image=a.png", "--negative_prompt=a car"], "takes no --negative_prompt"),
    (["--prompt=a fox", "--motion_bucket=3"], "takes no --motion_bucket"),
    (["--image=a.png", "--size=576"], "height x width"),
    (["--image=a.png", "--rehash=26"], "2 to 25"),
    (["--image=a.png", "--rehash=13", "--rehash_mode=temporel"], "did you mean 'temporal'"),
    (["--image=a.png", "--rehash=13", "--find_rehash=13"], "give one of them"),
    (["--image=a.png", "--guidance=one"], "2.5, or 1-3"),
    (["--prompt=a fox", "--guidance=1-3"], "expected 7.5"),
    (["--image=a.png"], "a.png"),
    (["--prompt=a fox"], "model_index.json is absent"),
])  # fmt: skip
def test_bad_flags(argv, match, tmp_path, capsys):
    base = [] if any(arg.startswith("--size") for arg in argv) else ["--size=8x8"]
    assert call("--model=nowhere", *base, f"--out={tmp_path / 'clips'}", *argv) == flags.USAGE_ERROR
    assert match in capsys.readouterr().err


def test_plans_of_unknown_groups(image, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"groups": {"up_blocks/7/*": 2}}))
    assert call(*image, f"--out={tmp_path / 'clips'}", f"--slices={tmp_path / 'plan.json'}") == flags.USAGE_ERROR
    assert "which the network does not have" in capsys.readouterr().err
    assert call(*image, f"--out={tmp_path / 'clips'}", "--slices=plan.jsn") == flags.USAGE_ERROR
    assert "bytes like 12GiB" in capsys.readouterr().err
