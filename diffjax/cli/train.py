"""Train what a config describes, or go on with a run that was stopped.

    python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher
    python -m diffjax.cli.train --config=configs/quick/edm_digits.py --workdir=runs/digits_teacher --dry_run

The folder gets config.json, metrics.jsonl, checkpoints/, samples/, report.md and report.json. The same command again
resumes it. A section `evaluate` measures samples of the averaged weights along the training, see `build.along`:
--config.evaluate.every_steps=500. --config.method.start=RUN, with method edm, begins at the weights of another run,
also of another resolution or other classes (`build.transfer`). Ends with code 0, 2 after an error in the config or the
data, or 75 after a stop by a signal (saved: run it again).
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from diffjax.cli import flags

if TYPE_CHECKING:
    from diffjax.train.loop import Experiment
    from diffjax.train.state import TrainState

_CURVE_ROWS = 20  # rows of the table of losses


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    flags.define_workdir(values, "folder of the run")
    flags.define_processes(values)
    absl_flags.DEFINE_integer(
        "profile", 0, "steps to trace into WORKDIR/profile, from the third one on; 0: none", 0, flag_values=values
    )
    absl_flags.DEFINE_bool("dry_run", False, "check everything, print what would be done, and end", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Train, or describe the run with --dry_run."""
    config = flags.needed(values, "config", "configs/quick/edm_digits.py")
    workdir = flags.workdir(values)
    if values.dry_run:
        print(describe(config, workdir))
        return
    command = shlex.join(["python", "-m", "diffjax.cli.train", *sys.argv[1:]])
    with flags.joined(values, config):
        train_and_evaluate(config, workdir, command=command, profile_steps=values.profile)


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike[str], *, command: str = "", profile_steps: int = 0
) -> "TrainState":
    """Train the run in `workdir` from its newest checkpoint to its end, and write its report; returns the last state.

    command: what reproduces the run, for the report. Raises ValueError, FileNotFoundError, CheckpointError or
    ConfigChangedError for a config, data or folder that does not fit, before long work; NonFiniteError when the
    training diverges; SystemExit with code 75 after SIGTERM (saved).
    """
    import jax

    from diffjax import build
    from diffjax.runtime import checkpoint, images, mesh
    from diffjax.train import loop
    from diffjax.train.state import sampling_params

    workdir, config = Path(workdir), build.resolve(config)
    experiment = build.experiment(config)
    if not checkpoint.steps(workdir) and (warning := experiment.warning()):
        print(warning, file=sys.stderr, flush=True)
    state = loop.run(experiment, config, workdir, profile_steps)
    params = mesh.local_copy(sampling_params(state))
    pictures = None if experiment.sample is None else experiment.sample(params)
    if jax.process_index():  # the first process writes
        return state
    if pictures is not None:
        images.save_png(workdir / "samples" / "final.png", images.grid(pictures))
    _write_report(config, workdir, experiment, state, command, pictures is not None)
    print(f"report: {workdir / 'report.md'}")
    return state


def describe(config: ConfigDict, workdir: Path) -> str:
    """What training `config` in `workdir` would do. Opens the data and reads one batch; computes nothing.

    Raises as `train_and_evaluate` does.
    """
    import jax

    from diffjax import build
    from diffjax.core import trees
    from diffjax.runtime import checkpoint, configs
    from diffjax.train.settings import Settings

    config = build.resolve(config)
    experiment = build.experiment(config)
    settings = Settings.from_config(config.train.to_dict())
    state = jax.eval_shape(experiment.init)
    batch = next(experiment.batches())
    jax.eval_shape(experiment.step, state, experiment.frozen, batch)
    saved = configs.read(workdir)
    changes = [] if saved is None else configs.check(saved, config, str(workdir / configs.FILE_NAME))
    done = max(checkpoint.steps(workdir), default=0)
    shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in batch.items()) or "none"
    lines = [
        f"method       {config.method.name}, network {config.model.name}",
        f"parameters   {trees.count(state.method.params):,}",
        f"batch        {shapes}; {experiment.batch_size:,} images a step",
        f"steps        {settings.total_steps:,} for {settings.total_images:,} images, {done:,} done",
        f"devices      {len(jax.devices())} x {jax.devices()[0].device_kind}",
        f"folder       {workdir} ({'new' if saved is None else 'resumed'})",
        *(f"changed      {line}" for line in changes),
        "nothing was written: leave --dry_run out to train",
    ]
    return "\n".join(lines)


def _write_report(
    config: ConfigDict, workdir: Path, experiment: "Experiment", state: "TrainState", command: str, pictures: bool
) -> None:
    from diffjax.core import trees
    from diffjax.runtime import configs, report, writers

    records = writers.read(workdir / writers.FILE_NAME)
    summary = {
        "images": int(state.step) * experiment.batch_size,
        "steps": int(state.step),
        "parameters": trees.count(state.method.params),
        "seconds": records[-1]["time"].get("total_s"),
        "images_per_s": records[-1]["time"].get("images_per_s"),
        "goodput": records[-1]["time"].get("goodput"),
        "loss": next((record["loss"] for record in reversed(records) if "loss" in record), None),
    }
    sections = [
        ("Training", "<!-- table: training -->"),
        ("Method", "What the config chose, such as `teacher_parity` (released or right coefficients).\n\n<!-- table: method -->"),
        ("Losses", "<!-- table: losses -->"),
    ]
    if pictures:
        sections.append(("Samples", "From the last weights (their average where one is kept).\n\n![](samples/final.png)"))
    call = "from diffjax.cli.train import train_and_evaluate  # with the config in config.json"
    sections.append(("Reproduce", f"```\n{command or call}\n```"))
    facts = {**report.environment(), "command": command or call}
    chosen = [{"option": key, "value": str(value)} for key, value in sorted(configs.flatten(config.method.to_dict()).items())]
    tables = {"training": [summary], "method": chosen, "losses": _curve(records), **experiment.tables()}
    report.write_report(workdir, f"{config.method.name} training", sections, tables, facts)


def _curve(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most _CURVE_ROWS lines of the log, evenly spaced, the last one among them; their times left out."""
    if len(records) > _CURVE_ROWS:
        last = len(records) - 1
        records = [records[round(i * last / (_CURVE_ROWS - 1))] for i in range(_CURVE_ROWS)]
    return [{name: value for name, value in record.items() if name not in ("time", "partial")} for record in records]


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
