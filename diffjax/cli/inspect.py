"""What a config costs, what is in a run folder, or what a published model consists of.

    python -m diffjax.cli.inspect --config=configs/edm/cifar10_ddpmpp.py
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher --verify
    python -m diffjax.cli.inspect --workdir=runs/digits_teacher --config=configs/quick/edm_digits.py
    python -m diffjax.cli.inspect --config=configs/conditioning/imagenet.py --topology=v5e:4x4 --mesh=data:4,fsdp:4
    python -m diffjax.cli.inspect --config=configs/emd/imagenet64.py --topology=v6e:4x4 --mesh=data:4,fsdp:4 \
        --teacher_config=configs/edm/imagenet64_adm.py
    python -m diffjax.cli.inspect sd15
    python -m diffjax.cli.inspect --video=svd_xt --size=576x1024 --budget=16GiB --topology=v5e:1x1

--config: parameters by part, bytes of the training state, FLOPs of one training step; the data is not opened. With
--compile also the memory of the compiled step on this machine (for a large network that takes minutes). A method's own
loops, such as EMD's chain, count as one turn of theirs.
--workdir: checkpoints, last log line, config. Both: how the run's config differs from the file. With --verify every
checkpoint is read whole and compared with its checksums; the command ends with code 1 where one is damaged.

--config with --topology: the run's own training step, or with --sample its sampling, compiled for the chips of v5e:4x4,
v5p:2x2x2, v6e:4x4 ..., for cpu:8 (so many fake devices), or gpu (those of this machine), laid out as --mesh or train.mesh
says: parameters, memory a device, the largest batch that fits, FLOPs, bytes, collectives, and an estimate of its time from
the makers' peaks. --budget: memory a device in place of the chip's. Where it does not fit, what does: blocks computed again,
more of the devices on fsdp, a smaller batch. No TPU is needed, the package libtpu is; neither data, nor a teacher, whose
config --teacher_config gives, or its folder as diffusers writes it. A compilation takes one to ten minutes.

A folder, of a model as diffusers saves it: for the denoiser, text encoders and autoencoder, block by block, parameters,
their bytes in float32, FLOPs of one image or text, and the bytes that its products and convolutions give, which a
gradient keeps beside others. FLOPs are those of products and convolutions, 2 for a multiplication and its addition. Only the
config files are read: the weights need not be there.

--video: for one step of the U-Net with guidance and for the decoder of svd, svd_xt or animatediff in bfloat16, its
groups of operators, their predicted memory, and with --budget the slices that keep them within it. --topology: the TPU
compiler says what the program needs on one chip, and where that is above the budget finer slices are tried; no TPU is
needed, the package libtpu is. --offload=skips,weights: these wait in the host's memory.
"""

import functools
import re
import sys
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from diffjax.cli import checkpoints, flags, plan_lines
from diffjax.runtime import chips

if TYPE_CHECKING:
    from diffjax.video.grouping import Plan
    from diffjax.video.steps import Traced

POSITIONAL = ("[FOLDER]",)
_ATTEMPTS = 3


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    flags.define_config(values, argv, new_keys=True)
    flags.define_workdir(values, "folder of a run")
    absl_flags.DEFINE_bool("compile", False, "compile the training step and show its memory", flag_values=values)
    absl_flags.DEFINE_bool("verify", False, "read the checkpoints of --workdir whole", flag_values=values)
    absl_flags.DEFINE_string("video", None, "a published video model: svd, svd_xt or animatediff", flag_values=values)
    absl_flags.DEFINE_string("size", "576x1024", "of its frames, HEIGHTxWIDTH in pixels", flag_values=values)
    absl_flags.DEFINE_integer("frames", 0, "of a clip, 0 = what the model was trained on", flag_values=values)
    absl_flags.DEFINE_bool("sequential_guidance", False, "guidance one half after the other", flag_values=values)
    absl_flags.DEFINE_string("budget", None, "bytes for it, as 16GiB or 12GB", flag_values=values)
    absl_flags.DEFINE_list("offload", [], "what waits in the host's memory: skips, weights", flag_values=values)
    absl_flags.DEFINE_string("topology", None, "devices to compile for: v5e:4x4, cpu:8, gpu", flag_values=values)
    absl_flags.DEFINE_string("mesh", "", "how they are laid out, as data:4,fsdp:4", flag_values=values)
    absl_flags.DEFINE_string("teacher_config", "", "what the run folder of --config's method will hold", flag_values=values)
    absl_flags.DEFINE_bool("sample", False, "with --topology: sampling in place of the training step", flag_values=values)


def main(values: absl_flags.FlagValues, folder: str = "") -> None:
    """Print what was asked for."""
    if values.video is not None and (folder or values.config is not None or values.workdir):
        raise ValueError(f"found --video={values.video} beside a folder, --config or --workdir: give it alone")
    if folder and (values.config is not None or values.workdir):
        raise ValueError(f"found the folder {folder} beside --config or --workdir: give it alone")
    planning = {"--mesh": values.mesh, "--teacher_config": values.teacher_config, "--sample": values.sample}
    given = [name for name, value in planning.items() if value]
    if given and (values.config is None or values.topology is None):
        raise ValueError(f"found {' '.join(given)}, which need --config and --topology=v5e:4x4: add what is absent")
    if values.topology is not None and (values.workdir or folder or values.compile):
        raise ValueError("found --topology beside --workdir, --compile or a folder: give it with --config or --video")
    if values.video is not None:
        lines = video_lines(values)
    elif folder:
        lines = model_lines(Path(folder))
    elif values.verify:
        lines = checkpoints.verified_lines(flags.run_folder(values))
    elif values.workdir:
        lines = run_lines(flags.run_folder(values), values.config)
    elif values.config is not None and values.topology is not None:
        budget = None if values.budget is None else _parse_bytes(values.budget)
        asked = plan_lines.Asked(values.topology, values.mesh, values.teacher_config, budget, values.sample)
        lines = plan_lines.lines(values.config, asked)
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


def video_lines(values: absl_flags.FlagValues) -> Iterable[str]:
    """Groups and memory of each stage of a video model. Raises ValueError as building them does, and for a budget below
    what the finest slices need."""
    size, budget = _parse_size(values.size), None if values.budget is None else _parse_bytes(values.budget)
    if values.topology is not None:  # read when JAX is imported: the compiler asks no server what this machine is
        chips.set_environment(values.topology)
    import jax

    from diffjax.build import video_stages
    from diffjax.video import memory, steps
    from diffjax.video.grouping import Plan

    device = None if values.topology is None else memory.topology(values.topology)
    if device is not None:  # an eighth of the time, and about the same memory
        jax.config.update("jax_optimization_level", "O0")
    whole = Plan(offload=values.offload)
    for name in video_stages.STAGES:
        function, shapes = video_stages.stage(values.video, name, size, values.frames, values.sequential_guidance)
        platform = "" if device is None else "tpu"
        traced = steps.trace(function, *shapes, platform=platform, offload=whole.offload)
        yield f"{values.video} {name}: {_bytes(traced.argument_bytes)} of weights and inputs"
        plan = whole if budget is None else memory.fit(traced, budget)
        if device is not None:
            plan = yield from _compiled_lines(function, shapes, device, traced, plan, budget)
        yield from _plan_lines(traced, plan)


def _plan_lines(traced: "Traced", plan: "Plan") -> Iterable[str]:
    """A table of the groups, their slices and predicted memory."""
    from diffjax.video import memory
    from diffjax.video.grouping import Plan

    yield _row("", "axis", "parts", "slices", "predicted", "unsliced", width=48)
    before, after = (memory.peaks_by_group(traced, each) for each in (Plan(), plan))
    for group in {group.name: group for group in traced.groups if group.name in before}.values():
        slices = -(-group.length // plan.size(group.name, group.axis, group.length))
        peaks = _bytes(after[group.name]), _bytes(before[group.name])
        yield _row(group.name, group.axis.name, str(group.length), str(slices), *peaks, width=48)
    peaks = _bytes(memory.peak(traced, plan).bytes), _bytes(memory.peak(traced, Plan()).bytes)
    yield _row("peak", "", "", "", *peaks, width=48)


def _compiled_lines(
    function: Any, shapes: Sequence[Any], device: Any, traced: "Traced", plan: "Plan", budget: float | None
) -> Generator[str, None, "Plan"]:
    """What the compiler says of a plan. Above the budget, or what the chip has, plans for less follow, up to
    _ATTEMPTS in all; the last plan is returned."""
    from diffjax.nn.groups import PLAIN
    from diffjax.video import memory, slicer
    from diffjax.video.grouping import Plan

    target = budget
    for attempt in range(_ATTEMPTS):
        program = functools.partial(function, run=PLAIN if plan == Plan() else slicer.Sliced(plan))
        try:
            found = memory.compile_for(program, *shapes, device=device, offload=plan.offload)
            yield f"the compiler, at its least effort: {_bytes(found.peak)}, compiled in {found.seconds:.0f} s"
            needed, most = found.peak, budget
        except memory.DoesNotFit as error:
            yield f"the compiler: {error}"
            needed, most = error.needed, min(budget or 0, error.available or budget or 0)
        if target is None or (needed is not None and needed <= most) or attempt == _ATTEMPTS - 1:
            return plan
        target *= 0.95 * most / (needed or 1.25 * most)
        try:
            plan = memory.fit(traced, target)
        except ValueError as error:
            yield f"above {_bytes(most)}, and no slices would do: {error}"
            return plan
        yield f"above {_bytes(most)}: again with the slices that are predicted to stay within {_bytes(target)}"
    return plan


def _parse_size(text: str) -> tuple[int, int]:
    """(height, width) of 576x1024."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise ValueError(f"found --size={text}, expected HEIGHTxWIDTH in pixels, as 576x1024")
    return int(found[1]), int(found[2])


def _parse_bytes(text: str) -> float:
    """Of 16GiB, 12GB or 800MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])(i?)B", text)
    if not found or not float(found[1]):
        raise ValueError(f"found --budget={text}, expected a number of MiB, GiB, MB or GB, as 16GiB")
    return float(found[1]) * (1024 if found[3] else 1000) ** {"M": 2, "G": 3}[found[2]]


def _size_row(name: str, block: Any) -> str:
    weights, results = _bytes(4 * block.parameters), _bytes(block.result_bytes)
    return _row(name, f"{block.parameters:,}", weights, f"{block.flops / 1e9:,.2f}", results)


def _row(name: str, *columns: str, width: int = 24) -> str:
    return f"  {name:{width}s}" + "".join(f"{column:>15s}" for column in columns)


def config_lines(config: ConfigDict, compiled: bool = False) -> Iterable[str]:
    """Size and cost of the training that `config` describes. Raises ValueError as building it does."""
    import jax

    from diffjax import build
    from diffjax.core import trees
    from diffjax.nn import stack

    build.check(config)
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
    from diffjax.runtime import configs, writers

    saved = configs.read(workdir)
    yield f"run             {workdir}"
    yield from checkpoints.lines(workdir)
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
    """The config with black images, empty prompts, or videos of digits in place of its data, so that its cost shows where
    the data is not. Its companions are needed."""
    import numpy as np

    from diffjax import build
    from diffjax.build import companions
    from diffjax.data import latents, sources

    if config.get("data", {}).get("name") not in sources.SOURCES or "train" not in config:
        return config  # no data to replace, or a mistake that building it will name
    kept = ("image_size", "channels", "num_classes", "null_class", "flip", "augment_probability", "companions")
    blank, count = ConfigDict(config.to_dict()), config.train.batch_size
    count *= 2 if config.get("method", {}).get("held_out") else 1  # that a batch is left
    blank.data = {key: config.data[key] for key in kept if key in config.data}
    if config.data.name == "prompts":
        (folder / "blank.txt").write_text("a\n" * count)
        blank.data.update({"name": "prompts", "path": str(folder / "blank.txt")})
        return blank
    if config.data.get("num_frames"):
        blank.data.update({"name": "moving_digits", "num_frames": config.data.num_frames, "num": count})
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


_bytes = checkpoints.readable_bytes

if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main, positional=POSITIONAL))
