"""What a config costs, what is in a run folder, or what a published model consists of.

    python -m diffjax.cli.inspect --config=configs/edm/cifar10_ddpmpp.py
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher --config=configs/quick/edm_digits.py
    python -m diffjax.cli.inspect sd15

--config: parameters by part, bytes of the training state, FLOPs of one training step; the data is not opened. With
--compile also the memory of the compiled step on this machine (for a large network that takes minutes). A method's own
loops, such as EMD's chain, count as one turn of theirs.
--workdir: checkpoints, last log line, config. Both: how the run's config differs from the file.

A folder, of a model as diffusers saves it: for the denoiser, text encoders and autoencoder, block by block, parameters,
their bytes in float32, FLOPs of one image or text, and the bytes that its products and convolutions give, which a
gradient keeps beside others. FLOPs are those of products and convolutions, 2 for a multiplication and its addition. Only the
config files are read: the weights need not be there.
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

POSITIONAL = ("[FOLDER]",)


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    flags.define_workdir(values, "folder of a run")
    absl_flags.DEFINE_bool("compile", False, "compile the training step and show its memory", flag_values=values)


def main(values: absl_flags.FlagValues, folder: str = "") -> None:
    """Print what was asked for."""
    if folder and (values.config is not None or values.workdir):
        raise ValueError(f"found the folder {folder} beside --config or --workdir: give it alone")
    if folder:
        lines = model_lines(Path(folder))
    elif values.workdir:
        lines = run_lines(flags.run_folder(values), values.config)
    elif values.config is not None:
        lines = config_lines(values.config, values.compile)
    else:
        raise ValueError(
            "give --config=configs/quick/edm_digits.py, --workdir=runs/digits_teacher, or both, or the folder of a "
            "published model"
        )
    for line in lines:
        print(line)


def model_lines(folder: Path) -> Iterable[str]:
    """A table for each network of a model as diffusers saves it. Raises as `build.sizes.model_parts`."""
    from diffjax.build import sizes

    for part in sizes.model_parts(folder):
        yield f"{part.name} ({part.source}): FLOPs for {part.inputs}"
        yield _row("", "parameters", "float32", "GFLOPs", "results")
        for block in part.blocks:
            yield _size_row(block.name if block.repeats == 1 else f"{block.name} ({block.repeats} equal)", block)
        yield _size_row("all", sizes.total(part))


def _size_row(name: str, block: Any) -> str:
    weights, results = _bytes(4 * block.parameters), _bytes(block.result_bytes)
    return _row(name, f"{block.parameters:,}", weights, f"{block.flops / 1e9:,.2f}", results)


def _row(name: str, *columns: str) -> str:
    return f"  {name:24s}" + "".join(f"{column:>15s}" for column in columns)


def config_lines(config: ConfigDict, compiled: bool = False) -> Iterable[str]:
    """Size and cost of the training that `config` describes. Raises ValueError as building it does."""
    import jax

    from diffjax import build
    from diffjax.core import trees
    from diffjax.nn import stack

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
        # a function of its own, since JAX remembers traces: the count needs equal blocks one by one, not in a loop
        with stack.unrolled():
            lowered = jax.jit(lambda *arguments: experiment.step(*arguments)).lower(state, experiment.frozen, batch)
        yield f"training step     {_flops(lowered)} for {experiment.batch_size:,} images"
        if compiled:
            memory = jax.jit(experiment.step).lower(state, experiment.frozen, batch).compile().memory_analysis()
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
    """The config with black images, or empty prompts, in place of its data, so that its cost shows where the data is not.
    Its companions are needed."""
    import numpy as np

    from diffjax import build
    from diffjax.build import companions
    from diffjax.data import latents, sources

    if config.get("data", {}).get("name") not in sources.SOURCES or "train" not in config:
        return config  # no data to replace, or a mistake that building it will name
    kept = ("image_size", "channels", "num_classes", "null_class", "flip", "augment_probability", "companions")
    blank, count = ConfigDict(config.to_dict()), config.train.batch_size
    blank.data = {key: config.data[key] for key in kept if key in config.data}
    if config.data.name == "prompts":
        (folder / "blank.txt").write_text("a\n" * count)
        blank.data.update({"name": "prompts", "path": str(folder / "blank.txt")})
        return blank
    shape = build.data_shape(config.data).shape
    beside = companions.load_companions(config.data.companions) if config.data.get("companions") else None
    if beside is not None and beside.autoencoder is not None:
        vae = beside.autoencoder
        shape = (shape[0] * vae.factor, shape[1] * vae.factor, vae.channels)
    labels = {"labels": np.zeros(count, np.int32)} if config.data.get("num_classes") or config.data.get("captions") else {}
    told = {name: np.ones(count, np.float32) for name in latents.METADATA} if config.model.get("metadata") else {}
    np.savez_compressed(folder / "blank.npz", images=np.zeros((count, *shape), np.uint8), **labels, **told)
    blank.data.update({"name": "arrays", "path": str(folder / "blank.npz"), "metadata": bool(told)})
    if config.data.get("captions"):
        (folder / "blank.txt").write_text("a\n")
        blank.data.captions = str(folder / "blank.txt")
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
    sys.exit(flags.run(__doc__, define, main, positional=POSITIONAL))
