"""Cache the trajectories of a teacher, so that students of the same seed and grids need not ask it again.

    python -m diffjax.cli.prepare --config=configs/sfd/cifar10.py:2 --out=runs/trajectories_2
    python -m diffjax.cli.train --config=configs/sfd/cifar10.py:2 --workdir=runs/sfd_cifar10_2 \\
        --config.method.trajectories=runs/trajectories_2

The same command goes on after a stop. The student's losses are those without the cache.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    absl_flags.DEFINE_string("out", None, "folder for the trajectories", flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Write the cache, or say how large it would be."""
    import math

    import numpy as np

    from diffjax import build
    from diffjax.data import trajectories
    from diffjax.runtime import progress
    from diffjax.train import loop

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


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
