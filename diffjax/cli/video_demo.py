"""Video networks trained in small: clips to look at, and what slices and step rehash change in them, memory and time.

A config names a folder with a run for each of `models`. Clips of each are made

    unsliced            every operator on the whole array
    default, tight      by the plans of the config: the same clips
    rehash, temporal    `full_steps` of the steps are full, the others reuse a feature of them
    rehash, output      the others reuse the network's output, which is what the paper's feature amounts to
    fewer               the full steps alone

all from the same noise. Table `exactness`, rows {model, plan, of, relative_l2, largest_difference}: sliced against
unsliced, of one call and of clips. `rehash`, rows {model, variant, calls, root_mean_square}: against all steps.
`memory`, rows {model, frames, size, target, plan, stage, peak_bytes}: of one call, by the compiler for this machine.
`times`, rows {model, of, variant, seconds, ratio, at_most, holds}: medians of rounds in which all take turns; `ratio`
is to the first of them in the same round.
"""

import collections
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import networks, video_networks
from diffjax.cli import comparison
from diffjax.core.solvers import Plan
from diffjax.core.types import Array, Cond
from diffjax.data import transforms
from diffjax.nn.groups import PLAIN, Runner
from diffjax.runtime import images, report, videos
from diffjax.sampling import generate
from diffjax.video import grouping, guided, memory, pipelines, rehash, slicer

Rows = list[dict[str, Any]]

FPS = 6
MOST_OF_UNSLICED, MOST_OF_FULL = 1.15, 0.56  # of the time: a default plan; 13 of 25 steps. Zhan 2024, sections 4.2, 5.2
_OUTPUT = "rehash, output"


class Model(NamedTuple):
    """A trained network of video, and what its clips are made of; real: clips that begin so, None where nothing is
    given."""

    name: str
    run: build.Run
    network: guided.VideoNetwork
    precondition: rehash.Precondition
    plan: Plan
    x: np.ndarray  # unit noise (B, T, H, W, C)
    cond: Cond
    real: np.ndarray | None


def entries(config: ConfigDict) -> list[comparison.Entry]:
    """The runs that are sampled, with their plans."""
    runs = {name: build.load_run(Path(config.base, name)) for name in config.models}
    plans = {name: build.run_plan(run, num_steps=config.num_steps) for name, run in runs.items()}
    return [comparison.Entry(name, run, {plans[name].nfe: plans[name]}) for name, run in runs.items()]


def load(config: ConfigDict, name: str) -> Model:
    """A run of the folder, with the noise and conditions of `config.num_clips` clips."""
    import jax.numpy as jnp

    run, count = build.load_run(Path(config.base, name)), config.num_clips
    network, precondition = networks.video_network(run.config.model, run.data)
    x = np.asarray(generate.initial_noise(config.seed, jnp.arange(count), run.data.shape))
    plan, real = build.run_plan(run, num_steps=config.num_steps), None
    cond = {"label": jnp.arange(count) % run.data.num_classes} if run.data.num_classes else {}
    if run.config.model.name in video_networks.FIRST_FRAME:
        source = build.source_of(run.config.data)
        indices = video_networks.spread(source, count)
        real = np.asarray(transforms.to_float(jnp.asarray(np.stack([source[i]["image"] for i in indices]))))
        cond["first_frame"] = jnp.asarray(real[:, 0] * run.data.scale)
    return Model(name, run, network, precondition, plan, x, cond, real)


def plans_of(config: ConfigDict) -> dict[str, Runner]:
    """"unsliced", and the plans of the config."""
    runners = {name: slicer.Sliced(grouping.Plan(**options)) for name, options in config.plans.items()}
    return {"unsliced": PLAIN, **runners}


# Clips ----------------------------------------------------------------------------------------------------------


def programs(config: ConfigDict, model: Model, schedule: rehash.Schedule) -> dict[str, Callable[[], Array]]:
    """By their names: functions that sample clips (B, T, H, W, C), compiled."""
    again = {"rehash, temporal": "temporal", _OUTPUT: "output"}
    variants: dict[str, tuple[Plan, dict[str, Any]]] = {
        **{name: (model.plan, {"run": run}) for name, run in plans_of(config).items()},
        **{
            name: (model.plan, {"schedule": rehash.Schedule(schedule.num_steps, schedule.full, mode)})
            for name, mode in again.items()
        },
        "fewer": (rehash.fewer(model.plan, schedule), {}),
    }
    return {name: _program(model, plan, options) for name, (plan, options) in variants.items()}


def _program(model: Model, plan: Plan, options: Mapping[str, Any]) -> Callable[[], Array]:
    import jax.numpy as jnp

    arguments = (model.run.params, model.x, plan, model.cond, {}, None)
    compiled = pipelines.denoise.lower(model.network, model.precondition, *arguments, **options).compile()
    return lambda: compiled(model.run.params, jnp.array(model.x), *arguments[2:])  # which overwrites its noise


def schedule_of(config: ConfigDict, model: Model) -> rehash.Schedule:
    """Full steps, found in a run with all of them."""
    import jax.numpy as jnp

    x = jnp.asarray(model.x) * np.float32(np.sqrt(1 + model.plan.sigmas[0] ** 2))
    arguments = (model.run.params, x, model.plan, model.cond, "temporal")
    similarity = rehash.record(model.precondition, model.network, *arguments)
    return rehash.of_count(similarity, config.full_steps, "temporal")


def in_turns(programs: Mapping[str, Callable[[], Array]], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of each, and the ratio to the first in the same round; medians."""
    seconds = collections.defaultdict(list)
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program().block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    return {name: (float(np.median(found)), float(np.median(found / first))) for name, found in seconds.items()}


def _differences(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    difference = found - reference
    relative = float(np.linalg.norm(difference) / np.linalg.norm(reference))
    return {"relative_l2": relative, "largest_difference": float(np.abs(difference).max())}


def sample(config: ConfigDict, model: Model, workdir: Path, tables: dict[str, Rows], progress: Callable) -> None:
    """Clips of a model in all ways: their differences, times and pictures."""
    progress(f"{model.name}: similarity of steps")
    schedule = schedule_of(config, model)
    rehash.write(workdir / f"{model.name}_schedule.json", schedule)
    progress(f"{model.name}: clips, of {model.plan.num_steps} steps and of {len(schedule.full)}")
    ways = programs(config, model, schedule)
    clips = {name: np.asarray(program()) for name, program in ways.items()}
    whole = clips["unsliced"]
    for plan in config.plans:
        row = {"model": model.name, "plan": plan, "of": "clips", **_differences(clips[plan], whole)}
        tables["exactness"].append(row)
    for variant in (name for name in ways if name != "unsliced" and name not in config.plans):
        error = float(np.sqrt(np.mean((clips[variant] - whole) ** 2)))
        row = {"model": model.name, "variant": variant, "calls": len(schedule.full), "root_mean_square": error}
        tables["rehash"].append(row)
    reused = {name: ways[name] for name in ways if name not in config.plans}
    most = MOST_OF_FULL * len(schedule.full) / 13 * 25 / model.plan.num_steps
    tables["times"] += _times(model, "clips", in_turns(reused, config.rounds), {_OUTPUT: most})
    draw_clips({name: clip / model.run.data.scale for name, clip in clips.items()}, model, workdir)


def _times(model: Model, what: str, found: Mapping[str, tuple[float, float]], most: Mapping[str, float]) -> Rows:
    rows = []
    for name, (seconds, ratio) in found.items():
        bar = {"at_most": most[name], "holds": ratio <= most[name]} if name in most else {}
        rows.append({"model": model.name, "of": what, "variant": name, "seconds": seconds, "ratio": ratio, **bar})
    return rows


def draw_clips(clips: Mapping[str, np.ndarray], model: Model, workdir: Path) -> None:
    """MODEL.gif, MODEL.mp4: a row of clips for each way. MODEL.png: the frames of the first clip, side by side."""
    whole = clips["unsliced"]
    rows = ({} if model.real is None else {"real": model.real}) | dict(clips)
    shown = {name: np.asarray(generate.to_uint8(clip)) for name, clip in rows.items()}
    scale = max(1, 64 // model.run.data.image_size)
    at = lambda t: images.labelled_rows({name: clip[:, t] for name, clip in shown.items()}, scale)  # noqa: E731
    film = [at(t) for t in range(whole.shape[1])]
    for suffix in (".gif", ".mp4"):
        videos.save(workdir / f"{model.name}{suffix}", np.stack(film), FPS)
    largest = {name: f"{np.abs(clip - whole).max():.1e}" for name, clip in clips.items() if name != "unsliced"}
    titles = {name: f"{name}, differs by {largest[name]}" if name in largest else name for name in shown}
    frames = {titles[name]: clip[0] for name, clip in shown.items()}
    images.save_png(workdir / f"{model.name}.png", images.labelled_rows(frames, scale))


# One call -------------------------------------------------------------------------------------------------------


def measure(config: ConfigDict, model: Model, tables: dict[str, Rows], progress: Callable) -> None:
    """Memory and time of one call of the network, on clips of `config.measured`."""
    import jax
    import jax.numpy as jnp

    frames, size = config.measured.frames, config.measured.size
    progress(f"{model.name}: one call, {frames} frames of {size} x {size}")
    channels = model.run.data.channels
    x = jnp.asarray(generate.initial_noise(config.seed, jnp.arange(1), (frames, size, size, channels)))
    cond = {"label": jnp.zeros(1, jnp.int32)} if "label" in model.cond else {"first_frame": x[:, 0]}
    calls, outs = {}, {}
    for plan, run in plans_of(config).items():
        compiled = _one_call(model, run).lower(model.run.params, x, cond).compile()
        row = {"model": model.name, "frames": frames, "size": f"{size}x{size}", "target": jax.default_backend()}
        row |= {"plan": plan, "stage": "unet", "peak_bytes": memory.read(compiled).peak}
        tables["memory"].append({**row, "weights_bytes": grouping.total_bytes(model.run.params)})
        calls[plan] = lambda compiled=compiled: compiled(model.run.params, x, cond)
        outs[plan] = np.asarray(calls[plan]())
    for plan in config.plans:
        row = {"model": model.name, "plan": plan, "of": "one call", **_differences(outs[plan], outs["unsliced"])}
        tables["exactness"].append(row)
    tables["times"] += _times(model, "one call", in_turns(calls, config.rounds), {"default": MOST_OF_UNSLICED})


def _one_call(model: Model, run: Runner) -> Callable:
    import jax
    import jax.numpy as jnp

    network = guided.run_by(model.network, run)
    return jax.jit(lambda params, x, cond: model.precondition(network.full)(params, x, jnp.float32(1), cond))


# Report ---------------------------------------------------------------------------------------------------------


def compare(
    config: ConfigDict, workdir: Path, command: str, progress: Callable[[str], None] = lambda text: None
) -> Path:
    """Sample, measure, and write `report.md`, `report.json`, clips and schedules into `workdir`; the report's path."""
    start, tables = time.perf_counter(), collections.defaultdict(list)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in config.models:
        model = load(config, name)
        sample(config, model, workdir, tables, progress)
        measure(config, model, tables, progress)
    tables["evaluation"] = [{"seconds": time.perf_counter() - start}]
    return report.write_report(workdir, "Video in small", sections(config, command), tables)


def sections(config: ConfigDict, command: str) -> list[tuple[str, str]]:
    """Headings and Markdown of the report, which place its tables."""
    both = (f"![{name}]({name}.gif)\n\n![{name}, frames of the first clip]({name}.png)" for name in config.models)
    clips = "\n\n".join(both)
    shape = f"{config.measured.frames} frames of {config.measured.size} x {config.measured.size}"
    exactness = "Sliced against unsliced, of one call and of clips after all steps. Only the order of sums differs."
    rehashed = (
        f"{config.full_steps} of {config.num_steps} steps are full, chosen by the similarity of features between "
        "steps. root_mean_square: of the difference to all steps, pixels in [-1, 1]."
    )
    memory = f"One call of the network on one clip, {shape}, weights included, as the compiler plans it."
    times = f"Medians of {config.rounds} rounds in which all take turns; ratio: to the first, in the same round."
    return [
        ("Clips", f"Rows: how they were made, from the same noise. Also as .mp4.\n\n{clips}"),
        ("Exactness", f"{exactness}\n\n<!-- table: exactness -->"),
        ("Step rehash", f"{rehashed}\n\n<!-- table: rehash -->"),
        ("Memory", f"{memory}\n\n<!-- table: memory -->"),
        ("Time", f"{times}\n\n<!-- table: times -->"),
        ("Reproduce", f"```bash\nbash launch/video_demo.sh   # which ends with\n{command}\n```"),
    ]
