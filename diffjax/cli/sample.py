"""Draw images from a trained run: a PNG grid and the arrays.

    python -m diffjax.cli.sample --workdir=runs/digits_teacher --seeds=0-63 --out=runs/digits_samples
    python -m diffjax.cli.sample --workdir=runs/digits_teacher --seeds=0,5,7 --labels=3 --solver=dpmpp --num_steps=8 \
        --out=runs/digits_threes
    python -m diffjax.cli.sample --model=sd15 --prompt="a red fox in the snow" --guidance_scale=7.5 --seeds=0-3 --out=runs/fox
    python -m diffjax.cli.sample --mode=correct --workdir=runs/emd_digits/seed_0/emd_16 --seeds=0-15 --out=runs/corrected

Image i depends on its seed alone, not on the others. Without --solver and the flags behind it, a run samples with the
section `sample` of its config, an SFD student as it was trained. --model takes a published model in the place of a run:
a folder as diffusers saves it, on this machine. Published samples of DiT, MDT and PixArt guide three of their four
channels, --guidance_channels=3, those of MDT with --guidance_power=4. --prompt is one text for all images, --prompts a file with one a line,
seeds[i] with line i. OUT gets samples.png, samples.npz (images, uint8
(n, H, W, C); seeds; labels where given) and sample.json, and must not hold them already.

--mode=correct shows what the Langevin chain of a run of EMD does to its generator's samples: its arrays are before and
after, float32 in about [-1, 1], its picture the first 16 of both. Generator and student score are as they were trained,
not averaged. --sigma is the noise level of the chain: lower and images hardly move, higher and they may become others.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from diffjax.cli import flags

if TYPE_CHECKING:
    import jax
    import numpy as np

_FILES = ("samples.png", "samples.npz", "sample.json")
_PLAN = ("solver", "num_steps", "order", "grid", "sigma_min", "sigma_max", "rho", "afs")
_CHAIN = ("langevin_steps", "sigma", "noise_step", "latent_step")
_COLUMNS = 16  # of the picture of --mode=correct
_MOST = 2**32  # seeds and sample ids


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    common = {"flag_values": values}
    flags.define_workdir(values, "folder of a trained run")
    absl_flags.DEFINE_string("model", None, "folder of a published model, in place of --workdir", **common)
    absl_flags.DEFINE_string("prompt", None, "text that the images show", **common)
    absl_flags.DEFINE_string("prompts", None, "file of texts, one a line and an image", **common)
    absl_flags.DEFINE_string("negative_prompt", "", "text that guidance leads away from", **common)
    absl_flags.DEFINE_string("compute_dtype", None, "--model: type of the network's products, bfloat16 or float32", **common)
    absl_flags.DEFINE_string("out", None, "folder for the images", **common)
    absl_flags.DEFINE_string("seeds", "0-63", "seeds, one an image: 0-63, or 0,5,7, or both", **common)
    absl_flags.DEFINE_integer("seed", 0, "seed of the whole set; image i is made of it and of seeds[i]", **common)
    absl_flags.DEFINE_string("labels", None, "classes: one for all, or one for each seed: 3 or 0-9", **common)
    absl_flags.DEFINE_string("solver", None, "euler, heun, dpm2s, ipndm, ipndm_v, dpmpp, unipc, deis, ...", **common)
    absl_flags.DEFINE_integer("num_steps", None, "noise levels N of the grid, N-1 steps", **common)
    absl_flags.DEFINE_integer("order", None, "order of a multistep solver", **common)
    absl_flags.DEFINE_string("grid", None, "polynomial, logsnr, time_uniform, or gits: searched for this network", **common)
    absl_flags.DEFINE_float("sigma_min", None, "last noise level, before the run's resolution_scale", **common)
    absl_flags.DEFINE_float("sigma_max", None, "first noise level, before the run's resolution_scale", **common)
    absl_flags.DEFINE_float("rho", None, "exponent of the grid", **common)
    absl_flags.DEFINE_bool("afs", None, "analytical first step, which needs no network call", **common)
    absl_flags.DEFINE_float("guidance_scale", None, "classifier-free guidance, 1 = none; twice the calls", **common)
    absl_flags.DEFINE_integer("guidance_channels", 0, "guided channels from the first on, 0 = all", **common)
    absl_flags.DEFINE_float("guidance_power", None, "guidance rises from 1 at the first level, as MDT's with 4", **common)
    absl_flags.DEFINE_float("control_strength", None, "share of guidance that is away from the text or class alone", **common)
    absl_flags.DEFINE_string("metadata", "", "what the network is told of a picture: height=64,width=64,flip=1", **common)
    absl_flags.DEFINE_integer("batch_size", 64, "images at once", **common)
    absl_flags.DEFINE_integer("devices", 0, "devices that a batch is split over, 0 = all there are", **common)
    absl_flags.DEFINE_string("mesh", "", "axes of the devices, as data:2,fsdp:4; where empty all along data", **common)
    absl_flags.DEFINE_enum("mode", "draw", ["draw", "correct"], "draw images, or run EMD's chain from them", **common)
    absl_flags.DEFINE_integer("langevin_steps", None, "correct: steps of the chain, 300 where not given", **common)
    absl_flags.DEFINE_float("sigma", None, "correct: noise level of the chain, 1 where not given", **common)
    absl_flags.DEFINE_float("noise_step", None, "correct: step size of the noise, the run's where not given", **common)
    absl_flags.DEFINE_float("latent_step", None, "correct: step size of the latent, the run's where not given", **common)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", **common)


def main(values: absl_flags.FlagValues) -> None:
    """Sample, and write the files."""
    if values.model and values.workdir:
        raise ValueError("found --model and --workdir: give one of them")
    if values.model and values.mode != "draw":
        raise ValueError(f"--mode={values.mode} takes a run of EMD: give --workdir in place of --model")
    workdir = Path(values.model) if values.model else flags.run_folder(values)
    out = Path(flags.needed(values, "out", "runs/samples"))
    taken = [str(out / name) for name in _FILES if (out / name).exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)} exist and are not overwritten: choose another --out")
    seeds = numbers("seeds", values.seeds)
    labels = None if values.labels is None else spread(numbers("labels", values.labels), len(seeds))
    correct = values.mode == "correct"
    other = [f"--{name}" for name in ((*_PLAN, "guidance_scale") if correct else _CHAIN) if values[name].value is not None]
    if other:
        raise ValueError(f"--mode={values.mode} takes no {', '.join(other)}: leave it out, or give the other --mode")
    (_correct if correct else _sample)(values, workdir, out, seeds, labels)


def numbers(flag: str, text: str) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises ValueError for anything else, an empty list or values of 2^32 and more."""
    found = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last or last >= _MOST:
            raise ValueError(f"--{flag}={text}: found {part!r}, expected numbers and ranges like 0-63 or 0,5,7")
        found += range(first, last + 1)
    return found


def spread(labels: list[int], count: int) -> list[int]:
    """One label for all of `count` images, or one each. Raises ValueError for another number of them."""
    if len(labels) not in (1, count):
        raise ValueError(f"found {len(labels)} labels for {count} seeds: give one for all, or one for each")
    return labels * count if len(labels) == 1 else labels


def _sample(
    values: absl_flags.FlagValues, workdir: Path, out: Path, seeds: list[int], labels: list[int] | None
) -> None:
    import numpy as np

    from diffjax import build
    from diffjax.core import guidance
    from diffjax.runtime import images
    from diffjax.sampling import generate

    prompts = _prompts(values, len(seeds))
    mesh = _mesh(values.devices, values.mesh)
    if values.model:
        changes = {} if values.compute_dtype is None else {"compute_dtype": values.compute_dtype}
        run = build.load_model(workdir, mesh=mesh, **changes)
    else:
        run = build.load_run(workdir)
    _check_labels(labels, run.data.num_classes)
    plan = build.run_plan(run, **{name: values[name].value for name in _PLAN if values[name].value is not None})
    if warning := build.assignment_warning(run.config, plan):
        print(warning, file=sys.stderr)
    guided = values.guidance_scale not in (None, 1.0)
    calls = "adaptively many" if plan.nfe is None else plan.nfe * (1 + guided + (values.control_strength is not None))
    print(f"{workdir}, step {run.step:,}: {len(seeds)} images of {run.data.shape}, {calls} network calls each")
    if guided and (scale := run.config.model.get("resolution_scale", 1.0)) != 1:
        higher = guidance.rescaled(values.guidance_scale, scale)
        print(f"resolution_scale {scale:g}: guidance_scale {values.guidance_scale:g} of pre-training is about {higher:g} here")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to sample")
        return
    drawn = build.draw(
        run,
        plan,
        values.seed,
        seeds,
        batch_size=_batch(min(values.batch_size, len(seeds)), mesh),
        labels=None if labels is None else np.asarray(labels, np.int32),
        prompts=prompts,
        negative_prompt=values.negative_prompt,
        guidance_scale=values.guidance_scale,
        guidance_channels=values.guidance_channels,
        guidance_power=values.guidance_power,
        control_strength=values.control_strength,
        metadata=_metadata(values.metadata),
        mesh=mesh,
    )
    pictures = np.asarray(generate.to_uint8(drawn))
    facts = {"workdir": str(workdir), "step": run.step, "seed": values.seed, "calls": calls}
    if prompts is not None:
        facts |= {"prompts": prompts, "negative_prompt": values.negative_prompt}
    if guided:
        facts |= {name: values[name].value for name in ("guidance_scale", "guidance_channels", "guidance_power", "control_strength")}
    if values.metadata:
        facts |= {"metadata": _metadata(values.metadata)}
    _write(out, images.grid(pictures), {"images": pictures}, seeds, labels, facts)


def _metadata(text: str) -> dict[str, float]:
    """'height=64,flip=1' -> {"height": 64.0, "flip": 1.0}. Raises ValueError for anything else."""
    parts = [re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+(?:\.\d+)?)\s*", part) for part in text.split(",") if part.strip()]
    if None in parts:
        raise ValueError(f"--metadata={text}: expected names and numbers, for example height=64,width=64,flip=1")
    return {match[1]: float(match[2]) for match in parts}


def _mesh(devices: int, layout: str) -> "jax.sharding.Mesh | None":
    """Of as many devices, 0 = all, with these axes; None for a single one. Raises ValueError where there are fewer."""
    import jax

    from diffjax.runtime import mesh

    if devices < 0:
        raise ValueError(f"--devices={devices}: expected 0 (all) to {jax.device_count()}")
    return None if (devices or jax.device_count()) == 1 else mesh.make_mesh(devices or None, layout=layout)


def _batch(size: int, mesh: "jax.sharding.Mesh | None") -> int:
    """The next multiple of the mesh's devices."""
    return size if mesh is None else -(-size // mesh.size) * mesh.size


def _prompts(values: absl_flags.FlagValues, count: int) -> list[str] | None:
    """A text for each of `count` images, None without flags. Raises ValueError for another number of them."""
    if values.prompt is not None and values.prompts is not None:
        raise ValueError("found --prompt and --prompts: give one of them")
    if values.prompts is None:
        return None if values.prompt is None else [values.prompt] * count
    lines = Path(values.prompts).read_text(encoding="utf-8").splitlines()
    if len(lines) != count:
        raise ValueError(f"--prompts={values.prompts} has {len(lines)} lines for {count} seeds: give one for each")
    return lines


def _correct(
    values: absl_flags.FlagValues, workdir: Path, out: Path, seeds: list[int], labels: list[int] | None
) -> None:
    import numpy as np

    from diffjax.build import correction, emd_parts
    from diffjax.runtime import images
    from diffjax.sampling import generate

    run = correction.load(workdir)
    _check_labels(labels, run.data.num_classes)
    steps = 300 if values.langevin_steps is None else values.langevin_steps
    sigma = 1.0 if values.sigma is None else values.sigma
    rates = emd_parts.step_sizes(run.config.method, values.noise_step, values.latent_step)
    facts = {"workdir": str(workdir), "step": run.step, "seed": values.seed, "scheme": correction.scheme(run)}
    facts |= {"langevin_steps": steps, "sigma": sigma, "noise_step": rates.noise, "latent_step": rates.latent}
    print(f"{workdir}, step {run.step:,}: {len(seeds)} images of {run.data.shape}, {steps} steps of {facts['scheme']} each")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to run the chains")
        return
    pair = correction.correct(
        run,
        values.seed,
        seeds,
        batch_size=min(values.batch_size, len(seeds)),
        langevin_steps=steps,
        sigma=sigma,
        rates=rates,
        labels=None if labels is None else np.asarray(labels, np.int32),
    )
    rows = {name: np.asarray(generate.to_uint8(part[:_COLUMNS])) for name, part in pair._asdict().items()}
    _write(out, images.labelled_rows(rows), pair._asdict(), seeds, labels, facts)


def _write(
    out: Path, picture: "np.ndarray", arrays: dict[str, "np.ndarray"], seeds: list[int], labels: list[int] | None,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    import numpy as np

    from diffjax.runtime import images

    out.mkdir(parents=True, exist_ok=True)
    images.save_png(out / "samples.png", picture)
    told = {} if labels is None else {"labels": np.asarray(labels, np.int32)}
    np.savez(out / "samples.npz", **arrays, seeds=np.asarray(seeds, np.uint32), **told)
    (out / "sample.json").write_text(json.dumps({**facts, "argv": sys.argv[1:]}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {', '.join(str(out / name) for name in _FILES)}")


def _check_labels(labels: list[int] | None, num_classes: int) -> None:
    if labels is None:
        return
    if not num_classes:
        raise ValueError("--labels: the run was trained without classes; leave the flag out")
    if max(labels) >= num_classes:
        raise ValueError(f"--labels: found {max(labels)}, expected 0..{num_classes - 1}")


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
