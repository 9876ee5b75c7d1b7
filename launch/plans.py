"""Plans of four trainings on TPUs that are not here, by their compiler, and weak scaling of one of them.

    dit      DiT-XL/2 on latents of ImageNet 256, as published, with Adam and an average of the weights
    mmdit    configs/conditioning/imagenet.py:mmdit_512_improved, mmDiT-XL/2
    emd      configs/emd/imagenet64.py, EMD of the ADM of ImageNet 64
    sfd      configs/sfd/sd_v15.py, SFD of Stable Diffusion 1.5

Each as `python -m diffjax.cli.inspect --topology=...` plans it: the run's own step, its weights nobody's. Table
`plans`: the largest batch of a few that were compiled, its memory and collectives. Table `weak_scaling`: the DiT with a
fixed batch a chip on more and more chips. Rows that runs/plans/report.json has are kept. Run by launch/plans.sh.
"""

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffjax.runtime import chips

TARGETS = {"v5e:4x4": "data:4,fsdp:4", "v5p:2x2x2": "data:2,fsdp:4", "v6e:4x4": "data:4,fsdp:4"}  # fsdp: a row of chips
SCALING = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64}
SCALING_IMAGES = 32  # a chip
LEVELS = ("O0", "O1", "O2", "O3")
# unet/config.json of stable-diffusion-v1-5, as far as its network depends on it
SD15 = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8, "center_input_sample": False,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "down_block_types": 3 * ["CrossAttnDownBlock2D"] + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + 3 * ["CrossAttnUpBlock2D"],
}  # fmt: skip


def dit() -> tuple[Any, dict]:
    """(config, configs of its teachers) of DiT-XL/2, whose sizes are the network's defaults."""
    from ml_collections import ConfigDict

    config = ConfigDict({"seed": 0, "optim": {"name": "adam", "learning_rate": 1e-4}})
    config.ema = {"halflife_images": 1_774_336}  # 0.9999 a step
    config.data = {"name": "latents", "path": "imagenet256_latents", "image_size": 32, "channels": 4}
    config.data.update({"num_classes": 1000, "companions": "stable-diffusion-v1-5"})
    config.model = {"name": "dit", "precondition": "eps", "compute_dtype": "bfloat16", "remat": "nothing"}
    config.method = {"name": "edm", "distribution": "discrete", "weighting": "eps", "label_dropout": 0.1}
    config.train = {"batch_size": 256, "total_images": 256 * 7_000_000}
    return config, {}


def mmdit() -> tuple[Any, dict]:
    from diffjax.cli import flags

    return flags.load_config("configs/conditioning/imagenet.py:mmdit_512_improved"), {}


def emd() -> tuple[Any, dict]:
    from diffjax.cli import flags

    config = flags.load_config("configs/emd/imagenet64.py")
    config.model.update({"compute_dtype": "bfloat16", "remat": "nothing"})
    return config, {config.method.teacher: flags.load_config("configs/edm/imagenet64_adm.py")}


def sfd() -> tuple[Any, dict]:
    from ml_collections import ConfigDict

    from diffjax.cli import flags
    from diffjax.weights import folders

    config = flags.load_config("configs/sfd/sd_v15.py")
    name, model, shape = folders.denoiser(SD15)
    teacher = {"seed": 0, "data": {"name": "none", **shape, "companions": "stable-diffusion-v1-5"}}
    teacher["method"] = {"name": "edm"}
    teacher["model"] = {"name": name, "precondition": "eps", "process": "scaled_linear", **model}
    return config, {config.method.teacher: ConfigDict(teacher)}


RECIPES: dict[str, Callable[[], tuple[Any, dict]]] = {"dit": dit, "mmdit": mmdit, "emd": emd, "sfd": sfd}


def row_of(recipe: str, topology: str, layout: str, level: str, found: Any, target: Any, tried: int) -> dict[str, Any]:
    """What the tables say of a plan."""
    from diffjax.build import plans

    devices = len(target.devices)
    row = {
        "recipe": recipe, "topology": topology, "mesh": layout, "level": level, "parameters": found.parameters,
        "images_per_chip": found.batch_size / devices, "batch": found.batch_size, "fits": found.fits,
        "batches_compiled": tried, "peak_GiB": None if found.peak is None else found.peak / chips.GIB,
        "limit_GiB": target.limit / chips.GIB,
    }  # fmt: skip
    if not found.fits:
        return row
    seconds, moved = plans.estimate(found, target.chip), plans.moved(found)
    kinds = {f"{kind}_GiB": one.num_bytes / chips.GIB for kind, one in moved.items()}
    return row | {
        "state_GiB": found.state / chips.GIB, "TFLOPs_per_chip": found.flops / devices / 1e12, **kinds,
        "collectives_GiB": sum(one.num_bytes for one in moved.values()) / chips.GIB,
        "whole_gradients_reduced_GiB": plans.reduced_whole(found) / chips.GIB, "estimated_s": max(seconds),
        "seconds_to_compile": found.seconds,
    }  # fmt: skip


def plan_row(recipe: str, topology: str, layout: str, level: str, first: int, compiles: int) -> dict[str, Any]:
    """The largest batch of a recipe that fits, of so many compiled ones. first: images a chip, 0 for the recipe's
    batch."""
    from diffjax.build import fitting, plans

    config, teachers = RECIPES[recipe]()
    job = plans.Job(config, plans.target(topology), layout, teachers)
    batch_size = first * len(job.target.devices) or config.train.batch_size
    best, tried = fitting.largest(job, batch_size, compiles=compiles)
    return row_of(recipe, topology, layout, level, best or tried[-1], job.target, len(tried))


def scaling_row(recipe: str, topology: str, layout: str, level: str) -> dict[str, Any]:
    """A recipe with SCALING_IMAGES a chip."""
    from diffjax.build import plans

    config, teachers = RECIPES[recipe]()
    job = plans.Job(config, plans.target(topology), layout, teachers)
    return row_of(recipe, topology, layout, level, plans.plan(job, SCALING_IMAGES * SCALING[topology]), job.target, 1)


def layouts_of_scaling() -> list[tuple[str, str]]:
    """(topology, mesh): fsdp along one row of chips, and along all of them."""
    rows = [(topology, f"data:{chips // 4},fsdp:4") for topology, chips in SCALING.items()]
    return rows + [(topology, f"fsdp:{chips}") for topology, chips in SCALING.items() if chips > 4]


def grown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what collectives of a chip are to those of the smallest topology at the same level."""
    base = {row["level"]: row["collectives_GiB"] for row in rows if row["topology"] == min(SCALING, key=SCALING.get)}
    return [row | {"times_of_4_chips": row["collectives_GiB"] / base.get(row["level"], math.nan)} for row in rows]


def write(tables: dict[str, list[dict[str, Any]]], out: str) -> Path:
    import importlib.metadata

    from diffjax.runtime import report

    compiler = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    text = (
        f"By {compiler}; nothing was run. Of one chip: `peak_GiB` as the compiler plans it at its effort `level`, and "
        "the bytes that collectives leave there in a step, loops as often as they run. Collective-permutes are rings, "
        "in which the compiler reduces and scatters gradients beside their products. `whole_gradients_reduced_GiB`: "
        "all-reduces of whole kernels, which there should be none of. `estimated_s`: the longest of products, memory "
        "traffic (more at O0 than at the usual effort) and links at the makers' peaks, an estimate, no measurement."
        "\n\n<!-- table: plans -->\n\nThe DiT "
        f"with {SCALING_IMAGES} images a chip:\n\n<!-- table: weak_scaling -->\n\nAgain: `bash launch/plans.sh`"
    )
    tables = {"plans": tables["plans"], "weak_scaling": grown(tables["weak_scaling"])}
    return report.write_report(out, "Plans of training on TPUs", [("Largest batches and collectives", text)], tables)


def wanted_rows(arguments: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """(table, recipe, topology, mesh) of each; weak scaling with all recipes and topologies only."""
    pairs = itertools.product(arguments.recipes, arguments.topologies)
    rows = [("plans", recipe, where, arguments.mesh or TARGETS.get(where, "fsdp:-1")) for recipe, where in pairs]
    if (arguments.recipes, arguments.topologies) == (list(RECIPES), list(TARGETS)):
        rows += [("weak_scaling", "dit", *layout) for layout in layouts_of_scaling()]
    return rows


def compute(arguments: argparse.Namespace) -> None:
    """One row, in this process, whose last line of output it is."""
    table, recipe, topology, layout = arguments.row
    chips.set_environment(topology)
    import jax

    jax.config.update("jax_optimization_level", arguments.level)
    make = scaling_row if table == "weak_scaling" else functools.partial(
        plan_row, first=arguments.first, compiles=arguments.compiles
    )  # fmt: skip
    print(json.dumps(make(recipe, topology, layout, arguments.level)))


def make_all(arguments: argparse.Namespace) -> list[str]:
    """Every row that is not there yet, in a process of its own: the compiler keeps memory, and some of its faults end the
    process. Returns what failed."""
    kept, keys, failed = Path(arguments.out, "report.json"), ("recipe", "topology", "mesh", "level"), []
    tables = json.loads(kept.read_text())["tables"] if kept.exists() else {"plans": [], "weak_scaling": []}
    for table, *wanted in wanted_rows(arguments):
        if any([row[key] for key in keys] == [*wanted, arguments.level] for row in tables[table]):
            continue
        options = [f"--{name}={getattr(arguments, name)}" for name in ("first", "compiles", "level")]
        command = [sys.executable, __file__, *options, "--row", table, *wanted]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(f"{' '.join(wanted)}: its process ended with code {done.returncode}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        tables[table].append(row)
        write(tables, arguments.out)
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    print(f"report: {write(tables, arguments.out)}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--topologies", nargs="+", default=list(TARGETS))
    parser.add_argument("--mesh", default="", help="in place of one row of chips on fsdp and the others on data")
    parser.add_argument("--compiles", type=int, default=4, help="batches to try for a row; the first guesses are low")
    parser.add_argument("--first", type=int, default=0, help="images a chip to try first, not those of the recipe")
    parser.add_argument("--level", default="O0", choices=LEVELS, help="the compiler's effort; O0 is fastest")
    parser.add_argument("--out", default="runs/plans")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        compute(arguments)
        return
    try:
        for topology in arguments.topologies:
            if chips.check(topology) != "tpu":
                raise ValueError(f"found the topology {topology}, expected a TPU's, as {' '.join(TARGETS)}")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    failed = make_all(arguments)
    if failed:
        again = "error: the report lacks these rows; started again with --recipes, --topologies and another --first it adds them:"
        parser.exit(1, "\n  ".join([again, *failed]) + "\n")


if __name__ == "__main__":
    main()
