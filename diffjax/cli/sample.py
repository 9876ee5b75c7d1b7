"""Draw images from a trained run: a PNG grid and the arrays.

    python -m diffjax.cli.sample --workdir=runs/digits_teacher --seeds=0-63 --out=runs/digits_samples
    python -m diffjax.cli.sample --workdir=runs/digits_teacher --seeds=0,5,7 --labels=3 --solver=dpmpp --num_steps=8 \
        --out=runs/digits_threes

Image i depends on its seed alone, not on the others. Without --solver and the flags behind it, a run samples with the
section `sample` of its config, an SFD student as it was trained. OUT gets samples.png, samples.npz (images, uint8
(n, H, W, C); seeds; labels where given) and sample.json, and must not hold them already.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags

_FILES = ("samples.png", "samples.npz", "sample.json")
_PLAN = ("solver", "num_steps", "order", "grid", "sigma_min", "sigma_max", "rho", "afs")
_MOST = 2**32  # seeds and sample ids


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    common = {"flag_values": values}
    flags.define_workdir(values, "folder of a trained run")
    absl_flags.DEFINE_string("out", None, "folder for the images", **common)
    absl_flags.DEFINE_string("seeds", "0-63", "seeds, one an image: 0-63, or 0,5,7, or both", **common)
    absl_flags.DEFINE_integer("seed", 0, "seed of the whole set; image i is made of it and of seeds[i]", **common)
    absl_flags.DEFINE_string("labels", None, "classes: one for all, or one for each seed: 3 or 0-9", **common)
    absl_flags.DEFINE_string("solver", None, "euler, heun, dpm2s, ipndm, ipndm_v, dpmpp, unipc, deis, ...", **common)
    absl_flags.DEFINE_integer("num_steps", None, "noise levels N of the grid, N-1 steps", **common)
    absl_flags.DEFINE_integer("order", None, "order of a multistep solver", **common)
    absl_flags.DEFINE_string("grid", None, "polynomial, logsnr, time_uniform, or gits: searched for this network", **common)
    absl_flags.DEFINE_float("sigma_min", None, "last noise level", **common)
    absl_flags.DEFINE_float("sigma_max", None, "first noise level", **common)
    absl_flags.DEFINE_float("rho", None, "exponent of the grid", **common)
    absl_flags.DEFINE_bool("afs", None, "analytical first step, which needs no network call", **common)
    absl_flags.DEFINE_float("guidance_scale", None, "classifier-free guidance, 1 = none; twice the calls", **common)
    absl_flags.DEFINE_integer("batch_size", 64, "images at once", **common)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", **common)


def main(values: absl_flags.FlagValues) -> None:
    """Sample, and write the files."""
    workdir = flags.run_folder(values)
    out = Path(flags.needed(values, "out", "runs/samples"))
    taken = [str(out / name) for name in _FILES if (out / name).exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)} exist and are not overwritten: choose another --out")
    seeds = numbers("seeds", values.seeds)
    labels = None if values.labels is None else spread(numbers("labels", values.labels), len(seeds))
    _sample(values, workdir, out, seeds, labels)


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
    from diffjax.runtime import images
    from diffjax.sampling import generate

    run = build.load_run(workdir)
    _check_labels(labels, run.data.num_classes)
    plan = build.run_plan(run, **{name: values[name].value for name in _PLAN if values[name].value is not None})
    calls = plan.nfe * (1 if values.guidance_scale in (None, 1.0) else 2)
    print(f"{workdir}, step {run.step:,}: {len(seeds)} images of {run.data.shape}, {calls} network calls each")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to sample")
        return
    drawn = build.draw(
        run,
        plan,
        values.seed,
        seeds,
        batch_size=min(values.batch_size, len(seeds)),
        labels=None if labels is None else np.asarray(labels, np.int32),
        guidance_scale=values.guidance_scale,
    )
    pictures = np.asarray(generate.to_uint8(drawn))
    out.mkdir(parents=True, exist_ok=True)
    images.save_png(out / "samples.png", images.grid(pictures))
    arrays = {"images": pictures, "seeds": np.asarray(seeds, np.uint32)}
    np.savez(out / "samples.npz", **arrays, **({} if labels is None else {"labels": np.asarray(labels, np.int32)}))
    facts = {"workdir": str(workdir), "step": run.step, "seed": values.seed, "calls": calls, "argv": sys.argv[1:]}
    (out / "sample.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
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
