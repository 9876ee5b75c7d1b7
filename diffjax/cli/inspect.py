"""What a config costs, or what is in a run folder.

    python -m diffjax.cli.inspect --config=configs/edm/cifar10_ddpmpp.py
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher --config=configs/quick/edm_digits.py

--config: parameters by part, bytes of the training state, FLOPs of one training step; the data is not opened. With
--compile also the memory of the compiled step on this machine (for a large network that takes minutes).
--workdir: checkpoints, last log line, config. Both: how the run's config differs from the file.
"""

import datetime
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from diffjax.cli import flags


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    flags.define_workdir(values, "folder of a run")
    absl_flags.DEFINE_bool("compile", False, "compile the training step and show its memory", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Print what was asked for."""
    if values.config is None and not values.workdir:
        raise ValueError("give --config=configs/quick/edm_digits.py, --workdir=runs/digits_teacher, or both")
    if values.workdir:
        for line in run_lines(flags.run_folder(values), values.config):
            print(line)
    else:
        for line in config_lines(values.config, values.compile):
            print(line)


def config_lines(config: ConfigDict, compiled: bool = False) -> Iterable[str]:
    """Size and cost of the training that `config` describes. Raises ValueError as building it does."""
    import jax

    from diffjax import build
    from diffjax.core import trees

    with tempfile.TemporaryDirectory() as folder:
        experiment = build.experiment(with_blank_data(build.resolve(config), Path(folder)))
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in next(experiment.batches()).items()}
        state = jax.eval_shape(experiment.init)
        params = state.method.params
        yield f"parameters        {trees.count(params):,}"
        for name, part in params.items():
            yield f"  {name:15s} {trees.count(part):,}"
        yield f"state             {_bytes(_size(state))} (parameters, optimiser, average)"
        for name, leaf in batch.items():
            yield f"batch             {name} {leaf.dtype}{list(leaf.shape)}"
        lowered = jax.jit(experiment.step).lower(state, experiment.frozen, batch)
        yield f"training step     {_flops(lowered)} for {experiment.batch_size:,} images"
        if compiled:
            program = lowered.compile()
            memory = program.memory_analysis()
            yield f"compiled step     {_flops(program)}"
            yield f"memory            {_bytes(memory.argument_size_in_bytes)} arguments, {_bytes(memory.temp_size_in_bytes)} work"


def run_lines(workdir: Path, config: ConfigDict | None = None) -> Iterable[str]:
    """Checkpoints, last log line and config of a run; with `config`, how the run's own differs from it."""
    from diffjax.runtime import checkpoint, configs, writers

    saved = configs.read(workdir)
    steps = checkpoint.steps(workdir)
    yield f"run             {workdir}"
    for step in steps:
        folder = workdir / checkpoint.FOLDER / str(step)
        when = datetime.datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield f"checkpoint      step {step:,}, {_bytes(size)}, {when}"
    if not steps:
        yield "checkpoint      none yet"
    log = workdir / writers.FILE_NAME
    for record in writers.read(log)[-1:] if log.exists() else []:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in writers.RESERVED)
        yield f"last log line   step {record['step']:,}, {record['images']:,} images: {figures}"
    if config is None:
        for key, value in sorted(configs.flatten(saved).items()):
            yield f"config          {key} = {value!r}"
        return
    refused, free = configs.differences(saved, config)
    for line in refused + free:
        yield f"differs         {line}"
    if not refused + free:
        yield "differs         nowhere"


def with_blank_data(config: ConfigDict, folder: Path) -> ConfigDict:
    """The config with black images in place of its data, so that its cost shows where the data is not."""
    import numpy as np

    from diffjax import build
    from diffjax.data import sources

    if config.get("data", {}).get("name") not in sources.SOURCES or "train" not in config:
        return config  # no data to replace, or a mistake that building it will name
    shape, count = build.data_shape(config.data), config.train.batch_size
    path = folder / "blank.npz"
    labels = {"labels": np.zeros(count, np.int32)} if shape.num_classes else {}
    np.savez_compressed(path, images=np.zeros((count, *shape.shape), np.uint8), **labels)
    kept = ("image_size", "channels", "num_classes", "null_class", "flip", "augment_probability")
    blank = ConfigDict(config.to_dict())
    blank.data = {key: config.data[key] for key in kept if key in config.data} | {"name": "arrays", "path": str(path)}
    return blank


def _flops(program: Any) -> str:
    analysis = program.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis or {}
    if "flops" not in analysis:
        return "FLOPs unknown on this backend"
    return f"{analysis['flops']:.4g} FLOPs"


def _size(tree: Mapping[str, Any]) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
