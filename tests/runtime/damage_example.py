"""Checkpoints damaged in every way, as a program: python damage_example.py FOLDER FLIPS.

Each line of its output is what became of one damage, as JSON: the file and what was done to it, whether restoring gave
the exact arrays of step 2, those of step 1 (the one before), or what was raised.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.runtime import checkpoint, checkpoint_read

CONFIG = {"seed": 0}


def make_state(step: int) -> dict:
    values = np.random.default_rng(step).standard_normal((40, 50)).astype(np.float32)
    return {
        "kernel": jnp.asarray(values), "half": jnp.asarray(values[0], jnp.bfloat16), "step": jnp.int32(step),
        "zeros": jnp.zeros((3, 4)), "seed": jnp.uint32(7),
    }  # fmt: skip


def write(folder: Path) -> None:
    with checkpoint.Checkpoints(folder, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"position": step}, {"means": [0.1 * step]})


def damages(folder: Path, flips: int):
    """(file, what, do): each file removed, emptied, cut in two, and with single bits flipped at random places."""
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        size = (folder / file).stat().st_size
        yield file, "removed", lambda path: path.unlink()
        yield file, "emptied", lambda path: os.truncate(path, 0)
        yield file, "halved", lambda path, size=size: os.truncate(path, size // 2)
        for _ in range(flips):
            place, bit = random.randrange(size), random.randrange(8)
            yield file, f"bit {bit} of byte {place}", lambda path, place=place, bit=bit: flip(path, place, bit)


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def restore(folder: Path) -> str:
    """What a run would begin with."""
    state = make_state(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    said: list[str] = []
    try:
        found = checkpoint_read.read_newest(folder, abstract, CONFIG, said.append)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), found.state, make_state(found.step))
    if not all(equal.values()) or found.run["iterator"] != {"position": found.step}:
        return f"wrong arrays or position of step {found.step}"
    if found.step == 2:
        return "exact"
    warned = any("WARNING" in line and "checkpoints/2 is unreadable" in line for line in said)
    moved = (folder / "unreadable_checkpoints" / "2").exists() and checkpoint.steps(folder) == [1]
    return f"fell back: {said[0]}" if warned and moved else f"fell back without a word, or left it: {said}"


def main(folder: str, flips: str) -> None:
    random.seed(0)
    whole, damaged = Path(folder) / "whole", Path(folder) / "damaged"
    write(whole)
    newest = Path(checkpoint.FOLDER) / "2"
    for file, what, do in damages(whole / newest, int(flips)):
        shutil.copytree(whole, damaged)
        do(damaged / newest / file)
        print(json.dumps([str(file), what, restore(damaged)]), flush=True)
        shutil.rmtree(damaged)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
