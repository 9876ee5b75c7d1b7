"""Compute once what would be computed again: latents of pictures, the trajectories of a teacher, or the statistics of a
data set that samples are compared with.

    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/imagenet.py --out=imagenet256_latents \\
        --config.data.name=tfds --config.data.dataset=imagenet2012 --config.data.path= --crop=random --flips
    python -m diffjax.cli.prepare --kind=latents --config=configs/conditioning/cc12m.py --out=cc12m256_latents \\
        --config.data.name=webdataset --config.data.path=cc12m_tars --config.data.captions=own --flips
    python -m diffjax.cli.train --config=configs/conditioning/cc12m.py --workdir=runs/cc12m256 \\
        --config.data.path=cc12m256_latents

    python -m diffjax.cli.prepare --config=configs/sfd/cifar10.py:2 --out=runs/trajectories_2
    python -m diffjax.cli.train --config=configs/sfd/cifar10.py:2 --workdir=runs/sfd_cifar10_2 \\
        --config.method.trajectories=runs/trajectories_2

    python -m diffjax.cli.prepare --stats --config=configs/quick/edm_digits.py --out=digits_pixels.npz
    python -m diffjax.cli.prepare --stats --config=configs/edm/cifar10_ddpmpp.py --features=inception --resize=tf1 \\
        --weights=pt_inception-2015-12-05-6726825d.pth --out=cifar10_inception.npz

latents: the config's data section names pictures of any size, the folder of the model that encodes them and their texts
(data.companions), and the size of the latents; of the others only the seed is looked at. data.captions: a file with a
text for each class, or "own", the texts that pictures bring. --crop is one of centre, random, native and
crop_then_resize, the last two with --high; --flips encodes the mirror image of each crop too, since latents cannot be
mirrored. With --num_processes=N --process=I, I = 0 .. N-1, one process for each accelerator fill one folder together.
--dry_run --num_images=1281167 prints the size for so many pictures without opening any.

trajectories: of a config of SFD; the student's losses are those without the cache.

stats (--stats is short for --kind=stats): mean and covariance of all images of the config's data section in the feature
space --features, with the protocol, their number and hash, in a file that pytorch-fid and clean-fid read too; spatial
statistics where the space has them. --weights: file or folder of its network; --keep_features: the features themselves
beside, for KID, PRDC and CMMD. --batch_size images are taken at once on each device.

The same command goes on after a stop.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.core import names

_OF = {
    "latents": ("crop", "num_crops", "high", "flips", "process", "num_processes", "num_images"),
    "stats": ("features", "weights", "resize", "keep_features", "batch_size"),
    "trajectories": (),
}


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    kinds = "what is computed: latents, stats or trajectories (the default)"
    absl_flags.DEFINE_string("kind", None, kinds, flag_values=values)
    absl_flags.DEFINE_bool("stats", False, "short for --kind=stats", flag_values=values)
    absl_flags.DEFINE_string("out", None, "folder to write, or the file of statistics", flag_values=values)
    absl_flags.DEFINE_string("crop", "centre", "latents: how windows are cut, see above", flag_values=values)
    absl_flags.DEFINE_integer("num_crops", 1, "latents: windows of a picture", flag_values=values)
    absl_flags.DEFINE_integer("high", 0, "latents: pixels of the high resolution, see above", flag_values=values)
    absl_flags.DEFINE_bool("flips", False, "latents: encode the mirror image of each window too", flag_values=values)
    absl_flags.DEFINE_integer("process", None, "latents: which of the processes this is", flag_values=values)
    absl_flags.DEFINE_integer("num_processes", None, "latents: how many there are", flag_values=values)
    absl_flags.DEFINE_integer("num_images", 0, "latents, --dry_run: pictures to print the size for", flag_values=values)
    absl_flags.DEFINE_string("features", "pixels", "stats: the feature space", flag_values=values)
    absl_flags.DEFINE_string("weights", "", "stats: file or folder of its network", flag_values=values)
    absl_flags.DEFINE_string("resize", "", "stats: how images are resized, where there is a choice", flag_values=values)
    absl_flags.DEFINE_bool("keep_features", False, "stats: keep the features of all images too", flag_values=values)
    absl_flags.DEFINE_integer("batch_size", 64, "stats: images at once on each device", flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Write the cache, or say how large it would be."""
    if values.stats and values.kind not in (None, "stats"):
        raise ValueError(f"--stats is short for --kind=stats, found --kind={values.kind} beside it: give one of them")
    kind = "stats" if values.stats else values.kind or "trajectories"
    compute = names.lookup(KINDS, kind, "--kind")
    for other, own in _OF.items():
        if other != kind and (given := [f"--{name}" for name in own if values[name].value != values[name].default]):
            raise ValueError(f"found {given} with --kind={kind}, they are of --kind={other}: leave them out")
    compute(values)


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
    from diffjax.train.settings import Settings

    config = flags.needed(values, "config", "configs/sfd/cifar10.py:2")
    out = flags.needed(values, "out", "runs/trajectories_2")
    targets, made_for = build.teacher_targets(config)
    settings = Settings.from_config(config.train.to_dict())
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


def _stats(values: absl_flags.FlagValues) -> None:
    import shutil
    from pathlib import Path

    import jax
    import numpy as np

    from diffjax import build
    from diffjax.build import evaluation, feature_spaces, image_sets, measures, streams
    from diffjax.metrics import protocol, references
    from diffjax.runtime import progress

    config = flags.needed(values, "config", "configs/quick/edm_digits.py")
    out = Path(flags.needed(values, "out", "digits_pixels.npz"))
    if out.suffix != ".npz" or values.batch_size < 1:
        found = f"--out={out}, --batch_size={values.batch_size}"
        raise ValueError(f"found {found}: give the name of an .npz file, and 1 or more")
    space = feature_spaces.load(values.features, values.weights, values.resize)
    images = image_sets.of_data(build.resolve(config).data)
    feature_spaces.check_images(np.zeros((1, *images.shape), np.uint8), space)
    fits = {name: of for name, of in measures.MEASURES.items() if space.name in protocol.METRICS[name].titles}
    metrics = [name for name, of in fits.items() if values.keep_features or not of.features]
    width = space.widths[feature_spaces.POOL] or int(np.prod(images.shape))
    size = f"{width:,} {space.name} features, {8 * width**2 / 2**20:,.3g} MiB"
    print(f"statistics of {images.total:,} images of {images.name}: {size}, into {out}")
    if values.dry_run:
        print("nothing was written: leave --dry_run out to write")
        return
    state = out.with_suffix(".state")
    with progress.Progress(images.total) as bar:
        how = streams.How(streams.local_mesh(), values.batch_size, say=bar.update)
        reference = evaluation.make_reference(images, space, metrics, how, state)
    if jax.process_index() == 0:
        print(f"{reference.count:,} images, sha256 of the file {references.write(out, reference)}")
        shutil.rmtree(state)


KINDS = {"latents": _latents, "stats": _stats, "trajectories": _trajectories}

if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
