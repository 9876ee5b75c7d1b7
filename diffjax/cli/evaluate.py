"""Compare runs, as config.report says: "calls" (also where it is absent), a teacher, training-free solvers and students by
Frechet distance against network calls; "one_call", one-step generators; "immiscible", assigned noise along the training;
"conditioning", what networks are told, padding of texts and a change of resolution; "video", clips in slices and with reused
steps; "metrics", FID and its kin of runs and of folders of images or videos.

    python -m diffjax.cli.evaluate --config=configs/quick/compare_digits.py --workdir=runs/quickstart
    python -m diffjax.cli.evaluate --config=configs/quick/compare_emd.py --workdir=runs/emd_digits
    python -m diffjax.cli.evaluate --config=configs/quick/evaluate_digits.py --workdir=runs/digits_metrics

Needs finished runs, named in the config. Writes report.md, report.json and pictures into the folder.
"""

import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from diffjax.cli import flags
from diffjax.runtime import launchers


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=False)
    flags.define_workdir(values, "folder of the report")
    flags.define_processes(values)
    absl_flags.DEFINE_bool("dry_run", False, "list what would be sampled, and end", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Write the comparison, or list its rows with --dry_run."""
    from diffjax.cli import comparison, conditioning, immiscible, metrics, one_call, video_demo
    from diffjax.core import names

    config = flags.needed(values, "config", "configs/quick/compare_digits.py")
    kinds = {"calls": comparison, "one_call": one_call, "immiscible": immiscible, "conditioning": conditioning}
    kinds |= {"video": video_demo, "metrics": metrics}
    kind = names.lookup(kinds, config.get("report", "calls"), "report")
    workdir = flags.workdir(values)
    if values.dry_run:
        for entry in kind.entries(config):
            print(f"{entry.method:24s} calls {', '.join(map(str, entry.plans))}")
        return
    if kind is not metrics and (place := launchers.find(os.environ, values.processes)):
        raise ValueError(
            f"found {place.num_processes} processes ({place.how}), but only the report 'metrics' is made by several: start "
            "one, or type --processes=one"
        )
    command = shlex.join(["python", "-m", "diffjax.cli.evaluate", *sys.argv[1:]])
    with flags.joined(values, config):
        path = kind.compare(config, workdir, command, progress=lambda text: print(text, file=sys.stderr, flush=True))
        print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
