"""Memory of video models at full size on one TPU chip, by the TPU compiler: no TPU is needed.

SVD (14 frames), SVD-XT (25) and AnimateDiff (16) at 576 x 1024 in bfloat16, one step of the U-Net with guidance and the
decoding of all frames, weights included:

    unsliced         every operator on the whole array
    official_style   the slices of the paper's released code (Zhan 2024), which are lossy
    default          groups in slices, exact
    tight            the finest slices that pay, and guidance one half after the other; exact

Nothing is run and no weights are made; peaks are the compiler's own. What does not fit one v5e chip (15.75 GiB) is
compiled for a v6e (31.25 GiB); what fits neither has the bytes that the compiler asks for, where it says them. Rows
that runs/video_memory/report.json has are kept. Run by launch/video_memory.sh.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

# read when JAX is imported: the compiler asks no server what this machine is, and two of them may run at a time
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)  # fmt: skip

import jax

from diffjax.build import video_stages
from diffjax.nn.groups import PLAIN, Runner
from diffjax.runtime import report
from diffjax.video import memory, slicer
from diffjax.video.grouping import Plan, total_bytes

SIZE = 576, 1024
TARGETS = "v5e:1x1", "v6e:1x1"
GIB = 2**30
# of the U-Net and of the decoder in half precision: weights, skips and what one group holds at least
FLOORS = {"svd": (4.1e9, 4.5e9), "svd_xt": (4.8e9, 7.8e9), "animatediff": (3.7e9, 1.0e9)}
SEQUENTIAL_FLOORS = {"svd": 3.6e9, "svd_xt": 4.05e9, "animatediff": 3.3e9}  # of the U-Net, with half of the skips


def plan_of(name: str, model: str) -> tuple[Runner, bool]:
    """How groups are run, and whether guidance takes one half after the other."""
    frames = video_stages.MODELS[model].frames
    if name == "unsliced":
        return PLAIN, False
    if name == "official_style":  # the released code's own counts
        pictures = Plan(frames=2, rows=16, groups={"decoder": 16})  # frames are decoded one by one
        counts = pictures if model == "animatediff" else Plan(frames=7, rows=7)
        return slicer.runner(counts, "official"), False
    if name == "default":
        return slicer.Sliced(Plan(frames=frames, rows=8)), False
    return slicer.Sliced(Plan(frames=frames, rows=24, tokens=16)), True


def row_of(model: str, name: str, plan: str, target: str) -> dict[str, Any]:
    """Compile a stage for one chip."""
    run, sequential = plan_of(plan, model)
    function, shapes = video_stages.stage(model, name, SIZE, sequential=sequential)
    row = {
        "model": model, "frames": video_stages.MODELS[model].frames, "size": f"{SIZE[0]}x{SIZE[1]}", "target": target,
        "plan": plan, "stage": name,
    }  # fmt: skip
    floor = SEQUENTIAL_FLOORS[model] if sequential and name == "unet" else FLOORS[model][name == "vae"]
    facts = {"weights_bytes": total_bytes(shapes[0]), "floor_bytes": int(floor)}
    try:
        donate = (1,) if name == "unet" else ()  # the latents are written over
        program, device = functools.partial(function, run=run), memory.topology(target)
        found = memory.compile_for(program, *shapes, device=device, donate=donate)
    except memory.DoesNotFit as error:
        return row | {"peak_bytes": error.needed, "fits": False, **facts, "seconds_to_compile": None}
    return row | {"peak_bytes": found.peak, "fits": True, **facts, "seconds_to_compile": round(found.seconds, 1)}


def kept_row(rows: list[dict[str, Any]], *wanted: str) -> dict[str, Any] | None:
    """The row of this model, plan, stage and target, if there is one."""
    keys = "model", "plan", "stage", "target"
    return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)


def write(rows: list[dict[str, Any]], out: str, level: str) -> Path:
    models = list(video_stages.MODELS)
    rows = sorted(rows, key=lambda row: (models.index(row["model"]), row["plan"], row["stage"], row["target"]))
    compiler = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}, optimisation level {level}"
    text = (
        f"{SIZE[0]} x {SIZE[1]}, bfloat16, guidance on, one chip, {compiler}. `peak_bytes` as the compiler plans them, "
        "weights included; nothing was run. Where `fits` is false it is what the compiler asks for. `floor_bytes`: "
        "weights, skips and the least that one group holds, estimated by hand. Zhan 2024, table 1, on an A100 with all "
        "parts in memory: SVD 39.49 GB unsliced, 23.42 in slices; SVD-XT 61.17, 36.32; AnimateDiff 41.71, 11.07."
        "\n\n<!-- table: memory -->\n\nAgain: `bash launch/video_memory.sh`"
    )
    return report.write_report(out, "Memory of video models", [("One TPU chip", text)], {"memory": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=video_stages.MODELS, default=list(video_stages.MODELS))
    parser.add_argument("--plans", nargs="+", choices=("tight", "default", "official_style", "unsliced"),
                        default=["tight", "default", "unsliced", "official_style"])  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=("unet", "vae"), default=["vae", "unet"])
    parser.add_argument("--level", default="O0", choices=("O0", "O1", "O2", "O3"),
                        help="how hard the compiler tries; O0 takes an eighth of the usual time")  # fmt: skip
    parser.add_argument("--out", default="runs/video_memory")
    arguments = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.exit(2, "error: the TPU compiler is not installed: type python -m pip install --no-deps libtpu\n")
    jax.config.update("jax_optimization_level", arguments.level)
    kept = Path(arguments.out, "report.json")
    rows = json.loads(kept.read_text())["tables"]["memory"] if kept.exists() else []
    for plan, model, name in itertools.product(arguments.plans, arguments.models, arguments.stages):
        for target in TARGETS:
            row = kept_row(rows, model, plan, name, target)
            if row is None:
                row = row_of(model, name, plan, target)
                rows.append(row)
                write(rows, arguments.out, arguments.level)
            size = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f} GiB"
            fits = "fits" if row["fits"] else "does not fit"
            print(f"{model:>12} {plan:>15} {name:>5} {target}: {size}, {fits}", flush=True)
            if row["fits"]:
                break
    print(f"report: {write(rows, arguments.out, arguments.level)}")


if __name__ == "__main__":
    main()
