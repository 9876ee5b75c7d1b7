"""Make clips of a picture or of a text with a published model, in as much memory as there is.

    python -m diffjax.cli.video --model=stable-video-diffusion-img2vid --image=fox.png --size=576x1024 --out=runs/fox
    python -m diffjax.cli.video --model=sd15 --motion=animatediff-motion-adapter-v1-5-2 --prompt="a red fox" \
        --size=512x512 --frames=16 --out=runs/fox_text
    python -m diffjax.cli.video --model=stable-video-diffusion-img2vid-xt --image=fox.png --size=576x1024 --frames=25 \
        --compute_dtype=bfloat16 --sequential_guidance --slices=15GiB --rehash=13 --out=runs/fox_xt

--model is a folder as diffusers saves it, on this machine: StableVideoDiffusionPipeline, AnimateDiffPipeline, or Stable
Diffusion 1 with --motion, a folder or file of motion modules. The picture is stretched to --size. Clip i depends on its
seed alone. Frames are the same however they are sliced.

--slices: a number of bytes (12GiB) that the U-Net and the decoder shall stay within, weights included, as predicted;
or a file with a plan, see diffjax.video.grouping. --offload=skips,weights: these wait in the host's memory until their
turn comes, where the backend has it. --rehash: a number of steps that are computed in full, the others reuse features
of them (--rehash_mode), evenly spread; or a file with a schedule, see diffjax.video.rehash. --find_rehash=13 runs all
steps once, looks which are alike, and writes that file with as many full steps to OUT/steps.json; it is used.

OUT gets clip_SEED.mp4 and .gif for each seed, and video.json, and must not hold them already. Without the package av
only .gif.
"""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.cli.sample import numbers

if TYPE_CHECKING:
    import numpy as np

    from diffjax.build.videos import Video
    from diffjax.video.grouping import Plan

_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*([GMgm]i?[Bb])?")
_UNITS = {"": 1, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_OF_PICTURES, _OF_TEXTS = ("fps", "motion_bucket", "augmentation"), ("negative_prompt",)


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    common = {"flag_values": values}
    absl_flags.DEFINE_string("model", None, "folder of a published model", **common)
    absl_flags.DEFINE_string("motion", "", "motion modules for Stable Diffusion 1", **common)
    absl_flags.DEFINE_string("image", None, "file of the picture that the clip begins with", **common)
    absl_flags.DEFINE_string("prompt", None, "text that the clip shows", **common)
    absl_flags.DEFINE_string("negative_prompt", None, "text that guidance leads away from", **common)
    absl_flags.DEFINE_string("out", None, "folder for the clips", **common)
    absl_flags.DEFINE_string("seeds", "0", "seeds, one a clip: 0-3, or 0,5,7", **common)
    absl_flags.DEFINE_integer("frames", 0, "of a clip, 0 = those of its training", **common)
    absl_flags.DEFINE_string("size", None, "height x width in pixels: 576x1024", **common)
    absl_flags.DEFINE_integer("steps", 25, "network calls, guidance not counted", **common)
    absl_flags.DEFINE_string("guidance", None, "scale, or of the first and last frame: 7.5, or 1-3; 1 = none", **common)
    absl_flags.DEFINE_integer("fps", None, "frames a second, 7 where not given", **common)
    absl_flags.DEFINE_integer("motion_bucket", None, "--image: 0..255, more for more motion", **common)
    absl_flags.DEFINE_float("augmentation", None, "--image: noise on the picture, more for more motion", **common)
    absl_flags.DEFINE_string("compute_dtype", "", "type of the network's products, bfloat16 or float32", **common)
    absl_flags.DEFINE_string("slices", "", "bytes to stay within (12GiB), or a file with a plan", **common)
    absl_flags.DEFINE_list("offload", [], "what waits in the host's memory: skips, weights", **common)
    absl_flags.DEFINE_string("rehash", "", "number of full steps, or a file with a schedule", **common)
    absl_flags.DEFINE_integer("find_rehash", 0, "number of full steps, found by what is alike", **common)
    absl_flags.DEFINE_string("rehash_mode", "temporal", "what the other steps reuse: temporal, output, ...", **common)
    absl_flags.DEFINE_bool("sequential_guidance", False, "the halves of guidance one after the other", **common)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", **common)


def main(values: absl_flags.FlagValues) -> None:
    """Make the clips, and write the files."""
    from diffjax.build import videos
    from diffjax.nn.groups import PLAIN
    from diffjax.video import pipelines
    from diffjax.video.grouping import Plan
    from diffjax.video.slicer import Sliced

    folder = flags.needed(values, "model", "stable-video-diffusion-img2vid")
    if (values.image is None) == (values.prompt is None):
        raise ValueError("give --image=FILE for a clip of a picture, or --prompt=TEXT for one of a text, and not both")
    _refuse(values, _OF_TEXTS if values.image is not None else _OF_PICTURES[1:])
    out, seeds = Path(flags.needed(values, "out", "runs/clips")), numbers("seeds", values.seeds)
    kinds = ["mp4", "gif"] if importlib.util.find_spec("av") else ["gif"]
    paths = {seed: [out / f"clip_{seed}.{kind}" for kind in kinds] for seed in seeds}
    others = [out / name for name in ("video.json", *(["steps.json"] if values.find_rehash else []))]
    taken = [str(path) for path in (*sum(paths.values(), []), *others) if path.exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)} exist and are not overwritten: choose another --out")
    size = _size(flags.needed(values, "size", "576x1024"))
    schedule = _schedule(values)
    guidance = _guidance(values.guidance, (1.0, 3.0) if values.image is not None else (7.5,))
    if values.image is not None:
        _picture(values.image)  # before a model is loaded
    plan = _plan_given(values)
    video = videos.load_video(folder, values.motion, values.compute_dtype, plan.offload)
    frames = videos.check(video, size, values.frames)
    options = dict(size=size, count=len(seeds), num_frames=frames, is_guided=guidance is not None)
    options |= dict(sequential=values.sequential_guidance, mode="" if schedule is None else schedule.mode)
    plan = _plan(video, plan, values, options)
    full = values.steps if schedule is None else len(schedule.full)
    print(f"{folder}: {len(seeds)} clips of {frames} frames, {values.size}; {values.steps} steps, {full} of them full")
    if plan != Plan():
        print(f"groups in slices: {plan.dumps()}")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to make the clips")
        return
    how = dict(sequential=values.sequential_guidance, run=PLAIN if plan == Plan() else Sliced(plan))
    told = _tell(values, video, seeds, dict(size=size, num_frames=frames, guidance_scale=guidance))
    steps = video.plan(values.steps)
    if values.find_rehash:
        schedule = _found(values, video, told, steps, how, out / "steps.json")
    clips = pipelines.make(video.parts, video.weights, told, steps, schedule=schedule, **how)
    _write(values, clips, paths, out)


def _found(
    values: absl_flags.FlagValues, video: "Video", told: Any, steps: Any, how: dict[str, Any], file: Path
) -> Any:
    """The rehash.Schedule of --find_rehash, written to a file."""
    from diffjax.video import pipelines, rehash

    anchor = "literal" if values.rehash_mode == "output" else values.rehash_mode
    similar = pipelines.similarities(video.parts, video.weights, told, steps, anchor, **how)
    schedule = rehash.of_count(similar, values.find_rehash, values.rehash_mode)
    file.parent.mkdir(parents=True, exist_ok=True)
    rehash.write(file, schedule)
    print(f"wrote {file}: full steps {', '.join(map(str, schedule.full))}")
    return schedule


def _tell(values: absl_flags.FlagValues, video: "Video", seeds: list[int], options: dict[str, Any]) -> Any:
    """What the network is told, a pipelines.Told."""
    from diffjax.build import videos

    if values.image is None:
        return videos.tell_text(video, values.prompt, seeds, negative_prompt=values.negative_prompt or "", **options)
    own = {name: values[name].value for name in _OF_PICTURES if values[name].value is not None}
    return videos.tell_picture(video, _picture(values.image), seeds, **own, **options)


def _write(values: absl_flags.FlagValues, clips: "np.ndarray", paths: dict[int, list[Path]], out: Path) -> None:
    from diffjax.runtime import videos

    fps = 7 if values.fps is None else values.fps
    for (seed, files), clip in zip(paths.items(), clips, strict=True):
        for file in files:
            videos.save(file, clip, fps)
        print(f"seed {seed}: wrote {', '.join(map(str, files))}")
    (out / "video.json").write_text(json.dumps({"argv": sys.argv[1:]}, indent=1) + "\n", encoding="utf-8")


def _refuse(values: absl_flags.FlagValues, names: Sequence[str]) -> None:
    given = [f"--{name}" for name in names if values[name].value is not None]
    if given:
        kind = "--image" if values.image is not None else "--prompt"
        raise ValueError(f"a clip of {kind} takes no {', '.join(given)}: leave it out")


def _size(text: str) -> tuple[int, int]:
    """'576x1024' -> (576, 1024)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(f"--size={text}: expected height x width in pixels, for example 576x1024")
    return int(found[1]), int(found[2])


def _guidance(text: str | None, default: tuple[float, ...]) -> Any:
    """'7.5' -> 7.5, '1-3' -> (1.0, 3.0), as long as the default; None where no scale is above 1: no guidance."""
    scales = default
    if text is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", text)
        if not found or (found[2] and len(default) == 1):
            example = "7.5" if len(default) == 1 else "2.5, or 1-3 for the first and last frame"
            raise ValueError(f"--guidance={text}: expected {example}")
        scales = (float(found[1]), float(found[2] or found[1]))[: len(default)]
    if max(scales) <= 1:
        return None
    return scales if len(default) > 1 else scales[0]


def _schedule(values: absl_flags.FlagValues) -> Any:
    """A rehash.Schedule of --rehash, or in the place of the one that --find_rehash will find; None without them."""
    from diffjax.video import rehash

    if values.rehash and values.find_rehash:
        raise ValueError("found --rehash and --find_rehash: give one of them")
    text = values.rehash or str(values.find_rehash or "")
    if not text:
        return None
    if text.isdecimal():
        return rehash.uniform(values.steps, int(text), values.rehash_mode)
    schedule = rehash.read(text)
    if schedule.num_steps != values.steps:
        wanted = schedule.num_steps
        raise ValueError(f"--rehash={text} is for {wanted} steps, found --steps={values.steps}: make them equal")
    return schedule


def _plan_given(values: absl_flags.FlagValues) -> "Plan":
    """A plan of the file of --slices, whole groups without it, with --offload if that is given."""
    from diffjax.video import grouping

    plan = grouping.Plan()
    if values.slices and not _BUDGET.fullmatch(values.slices):
        file = Path(values.slices)
        if not file.is_file():
            raise FileNotFoundError(f"--slices={file} is no file; expected one with a plan, or bytes like 12GiB")
        plan = grouping.loads(file.read_text(encoding="utf-8"))
    return dataclasses.replace(plan, offload=values.offload or plan.offload)


def _plan(video: "Video", plan: "Plan", values: absl_flags.FlagValues, options: dict[str, Any]) -> "Plan":
    """The plan for the budget of --slices, or the given one where it fits the model."""
    from diffjax.build import videos

    budget = _BUDGET.fullmatch(values.slices)
    if not budget:
        videos.check_plan(video, plan, **options)
        return plan
    most = float(budget[1]) * _UNITS[(budget[2] or "").upper()]
    return videos.fit(video, most, plan.offload, **options)


def _picture(path: str) -> "np.ndarray":
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"--image={path} is no picture that Pillow can read: give a .png or .jpg") from error


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
