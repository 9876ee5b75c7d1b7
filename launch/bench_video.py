"""What slices and step rehash cost and save in time: an SVD-like U-Net at a quarter of the width, 14 frames, guidance on.

One step unsliced beside one by the default plan, and a loop of 25 full steps beside one with 13 (Zhan 2024, section 5.1)
and the loop of those 13 alone, unsliced. The sides take turns in one process; a ratio is the median of those of neighbouring
turns. Random weights: what is measured does not depend on them. Run by launch/bench.sh; writes runs/bench_video.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping

from diffjax.runtime import xla

xla.set_flags()  # as the commands do, before JAX is imported

import jax
import jax.numpy as jnp

from diffjax.build import video_stages
from diffjax.core import grids, prediction, solvers
from diffjax.models.svd import SVDUNet
from diffjax.nn.functional import abstract
from diffjax.nn.groups import PLAIN, Runner
from diffjax.runtime import report
from diffjax.video import guided, memory, rehash, slicer
from diffjax.video.grouping import Plan

FRAMES, WIDTH = 14, 96  # 80 channels, a quarter of 320, are no multiple of 32 groups
# latents of a step: of 320x512 pixels, since slices of few places read the weights again for little work; and of a loop
STEP_SIDE, LOOP_SIDE = (40, 64), (8, 16)
DEFAULT = Plan(frames=FRAMES, rows=8)  # as in launch/video_memory.py
STEPS, FULL = 25, 13

Sides = Mapping[str, Callable[[], None]]


def network(run: Runner) -> guided.VideoNetwork:
    make = lambda rngs: SVDUNet(FRAMES, width=WIDTH, heads=(3, 6, 12, 12), rngs=rngs)  # noqa: E731
    return guided.guided(guided.run_by(guided.functions(make), run), jnp.linspace(1.0, 3.0, FRAMES))


def given(side: tuple[int, int]) -> tuple[dict, jax.Array, dict]:
    """(weights, latents, conditions of both halves)."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = abstract(lambda rngs: SVDUNet(FRAMES, width=WIDTH, heads=(3, 6, 12, 12), rngs=rngs))
    params = jax.tree.map(lambda leaf: 0.02 * jax.random.normal(keys[0], leaf.shape), shapes)
    x = jax.random.normal(keys[1], (1, FRAMES, *side, 4))
    picture = {"image": (1, 1024), "image_latents": (*side, 4), "control": (3,)}
    return params, x, {name: jax.random.normal(keys[2], (2, 1, *shape)) for name, shape in picture.items()}


def steps() -> Sides:
    """One call of the network, with both halves of guidance."""
    params, x, cond = given(STEP_SIDE)

    def side(run: Runner) -> Callable[[], None]:
        function = jax.jit(network(run).full)
        return lambda: jax.block_until_ready(function(params, x, jnp.ones(1), cond))

    return {"unsliced": side(PLAIN), "default plan": side(slicer.Sliced(DEFAULT))}


def loops() -> Sides:
    """25 steps of Euler, unsliced."""
    params, x, cond = given(LOOP_SIDE)
    plan = solvers.make_plan("euler", grids.append_zero(grids.polynomial(STEPS, 0.002, 700.0)))
    called = network(PLAIN)
    every, some = rehash.uniform(STEPS, STEPS), rehash.uniform(STEPS, FULL)

    def side(plan: solvers.Plan, schedule: rehash.Schedule) -> Callable[[], None]:
        run = functools.partial(rehash.sample, prediction.edm_v_denoiser, called)
        function = jax.jit(lambda params, x, cond: run(params, x, plan, schedule, cond))
        return lambda: jax.block_until_ready(function(params, 700 * x, cond))

    modes = {mode: side(plan, rehash.Schedule(STEPS, some.full, mode)) for mode in rehash.MODES}
    fewer = side(rehash.fewer(plan, some), rehash.uniform(FULL, FULL))
    return {"25 full steps": side(plan, every), **modes, "13 steps alone": fewer}


def compare(what: str, sides: Sides, turns: int) -> list[dict]:
    """A row a side, against the first."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for one in sides.values():
        one()  # compiles
    for _ in range(turns):
        for name, one in sides.items():
            start = time.perf_counter()
            one()
            found[name].append(time.perf_counter() - start)
    base, rows = next(iter(found.values())), []
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        rows.append({"what": what, "side": name, "seconds": statistics.median(seconds), "ratio": ratio, "turns": turns})
        print(f"{what}, {name}: {rows[-1]['seconds']:.2f} s, ratio {ratio:.3f}", flush=True)
    return rows


def compilation() -> list[dict]:
    """Seconds to compile SVD's whole step at full size, 14 frames of 576x1024 in the default plan, for this machine."""
    function, shapes = video_stages.stage("svd", "unet", (576, 1024))
    run = slicer.Sliced(DEFAULT)
    seconds = memory.compile_for(lambda *arrays: function(*arrays, run=run), *shapes, donate=(1,)).seconds
    print(f"SVD's step at full size: {seconds:.0f} s to compile for {jax.default_backend()}", flush=True)
    return [{"model": "svd", "plan": "default", "target": jax.default_backend(), "seconds": seconds}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="of each side")
    parser.add_argument("--out", default="runs/bench_video")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled here is measured
    rows = compare("one step", steps(), arguments.turns) + compare("loop", loops(), max(2, arguments.turns // 2))
    text = (
        f"U-Net of SVD with {WIDTH} channels, {FRAMES} frames, float32, both halves of guidance at once; a step of "
        f"{STEP_SIDE[0]}x{STEP_SIDE[1]} latents, a loop of {LOOP_SIDE[0]}x{LOOP_SIDE[1]}, unsliced. `ratio`: median "
        "over turns of a side's time over the first side's of the same turn.\n\n"
        "<!-- table: speed -->\n\nAgain: `bash launch/bench.sh video`"
    )
    tables = {"speed": rows, "compilation": compilation()}
    path = report.write_report(arguments.out, "Time of slices and step rehash", [("Side by side", text)], tables)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
