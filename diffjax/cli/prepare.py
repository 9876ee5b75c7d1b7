"""Compute once what training would compute again: latents of pictures, or the trajectories of a teacher.

    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/imagenet.py --out=imagenet256_latents \\
        --config.data.name=tfds --config.data.dataset=imagenet2012 --config.data.path= --crop=random --flips
    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/cc12m.py --out=cc12m256_latents \\
        --config.data.name=webdataset --config.data.path=cc12m_tars --config.data.captions=own --flips
    python -m diffjax.cli.train --config=configs/conditioning/cc12m.py --workdir=runs/cc12m256 \\
        --config.data.path=cc12m256_latents

    python -m diffjax.cli.prepare --config=configs/sfd/cifar10.py:2 --out=runs/trajectories_2
    python -m diffjax.cli.train --config=configs/sfd/cifar10.py:2 --workdir=runs/sfd_cifar10_2 \\
        --config.method.trajectories=runs/trajectories_2

latents: the config's data section names pictures of any size, the folder of the model that encodes them and their texts
(data.companions), and the size of the latents; of the others only the seed is looked at. data.captions: a file with a
text for each class, or "own", the texts that pictures bring. --crop is one of centre, random, native and
crop_then_resize, the last two with --high; --flips encodes the mirror image of each crop too, since latents cannot be
mirrored. With --num_processes=N --process=I, I = 0 .. N-1, one process for each accelerator fill one folder together.
--dry_run --num_images=1281167 prints the size for so many pictures without opening any.

trajectories: of a config of SFD; the student's losses are those without the cache.

The same command goes on after a stop.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.core import names

_OF_LATENTS = ("crop", "num_crops", "high", "flips", "process", "num_processes", "num_images")


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    absl_flags.DEFINE_string("kind", "trajectories", "what is computed: latents or trajectories", flag_values=values)
    absl_flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    absl_flags.DEFINE_string("crop", "centre", "latents: how windows are cut, see above", flag_values=values)
    absl_flags.DEFINE_integer("num_crops", 1, "latents: windows of a picture", flag_values=values)
    absl_flags.DEFINE_integer("high", 0, "latents: pixels of the high resolution, see above", flag_values=values)
    absl_flags.DEFINE_bool("flips", False, "latents: encode the mirror image of each window too", flag_values=values)
    absl_flags.DEFINE_integer("process", None, "latents: which of the processes this is", flag_values=values)
    absl_flags.DEFINE_integer("num_processes", None, "latents: how many there are", flag_values=values)
    absl_flags.DEFINE_integer("num_images", 0, "latents, --dry_run: pictures to print the size for", flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Write the cache, or say how large it would be."""
    names.lookup(KINDS, values.kind, "--kind")(values)


def _latents(values: absl_flags.FlagValues) -> None:
    from pathlib import Path

    import jax

    from diffjax.build import cached
    from diffjax.data import latents
    from diffjax.runtime import progress

    config = flags.needed(values, "config", "configs/conditioning/imagenet.py")
    out = flags.needed(values, "out", "imagenet256_latents")
    cut = cached.Crops(values.crop, values.num_crops, values.flips, values.high)
    if (values.process is None) != (values.num_processes is None):
        raise ValueError("--process and --num_processes go together: give both, or none")
    if values.dry_run:
        print(f"{cached.sizes(config, cut, values.num_images)}, into {out}")
        print("nothing was written: leave --dry_run out to write")
        return
    if values.num_images:
        raise ValueError("--num_images is of --dry_run: all pictures are written, leave it out")
    process = jax.process_index() if values.process is None else values.process
    num_processes = values.num_processes or jax.process_count()
    job = cached.job(config, cut)
    with progress.Progress(latents.own_images(job.num_images, process, num_processes)) as bar:
        for done in latents.write(out, *job, process=process, num_processes=num_processes):
            bar.update(done)
    if (Path(out) / latents.HEADER).exists():
        print(f"train with --config.data.name=latents --config.data.path={out}")
    else:
        print(f"process {process} of {num_processes} is done: {out} is whole once the others are")


def _trajectories(values: absl_flags.FlagValues) -> None:
    import math

    import numpy as np

    from diffjax import build
    from diffjax.data import trajectories
    from diffjax.runtime import progress
    from diffjax.train import loop

    if given := [f"--{name}" for name in _OF_LATENTS if values[name].value != values[name].default]:
        raise ValueError(f"found {given} with --kind=trajectories, they are of --kind=latents: leave them out")
    config = flags.needed(values, "config", "configs/sfd/cifar10.py:2")
    out = flags.needed(values, "out", "runs/trajectories_2")
    targets, made_for = build.teacher_targets(config)
    settings = loop.Settings.from_config(config.train.to_dict())
    numbers = (made_for["num_steps"][0] - 1) * math.prod(made_for["image_shape"])
    size = settings.total_steps * settings.batch_size * numbers * np.dtype(np.float32).itemsize
    print(f"{settings.total_steps:,} steps of {settings.batch_size} trajectories, {size / 2**30:.3g} GiB, into {out}")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to write")
        return
    with progress.Progress(settings.total_steps * settings.batch_size, 0) as bar:
        for step in trajectories.write(out, made_for, targets, settings.total_steps):
            bar.update(step * settings.batch_size)
    print(f"train with --config.method.trajectories={out}")


KINDS = {"latents": _latents, "trajectories": _trajectories}

if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
