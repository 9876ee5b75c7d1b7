"""Accelerators as plans of runs need them: their names, what their makers say of them, what is set before JAX starts.

    set_environment("v5e:4x4")      # before JAX is imported: the compiler asks no server what this machine is
    chip("v5e:4x4").flops

Figures are the makers' peaks of one chip; no program reaches them.
"""

import importlib.util
import os
import re
import sys
from collections.abc import MutableMapping
from typing import NamedTuple

from diffjax.core import names

GIB = 2**30


class Chip(NamedTuple):
    """flops: bfloat16 products, FLOP/s. hbm_bytes: what a program may have. hbm: bytes/s of its memory. links: bytes/s
    that it sends to others over all links, half of what makers call bidirectional."""

    flops: float
    hbm_bytes: float
    hbm: float
    links: float


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, tables "key specifications" (bidirectional ICI 400, 1200, 800
# GB/s); v4's are recalled from /v4. hbm_bytes is what their compiler says is available (libtpu 0.0.52), of v4 with both
# cores as one device. GPUs, recalled from NVIDIA's data sheets of A100 80GB, H100 and H200 SXM: products without
# sparsity, all of the memory, NVLink's 600 and 900 GB/s in both directions.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1.2e12, 300e9),
    "v5e": Chip(197e12, 15.75 * GIB, 0.819e12, 200e9),
    "v5p": Chip(459e12, 95.73 * GIB, 2.765e12, 600e9),
    "v6e": Chip(918e12, 31.24 * GIB, 1.638e12, 400e9),
    "a100": Chip(312e12, 80e9, 2.039e12, 300e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
}
TPUS = ("v4", "v5e", "v5p", "v6e")
# slices that Google lends, for the nearest name of a misspelt one; the compiler knows others
_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
TOPOLOGIES = tuple(f"{chip}:{shape}" for chip in TPUS for shape in _SHAPES[2 if chip.endswith("e") else 3])
_FLAG = "--xla_force_host_platform_device_count"


def check(topology: str) -> str:
    """"tpu", "cpu" or "gpu" of v5e:4x4, cpu:8, gpu or gpu:4. Raises ValueError for what is none of them, with the
    nearest."""
    kind, _, rest = topology.partition(":")
    if kind == "gpu" and (not rest or rest.isdecimal() and int(rest)):
        return kind
    if kind == "cpu" and rest.isdecimal() and int(rest):
        return kind
    dims = 2 if kind.endswith("e") else 3
    if kind in TPUS and re.fullmatch(r"[1-9]\d*" + (dims - 1) * r"x[1-9]\d*", rest):
        return "tpu"
    known = [name for name in TOPOLOGIES if name.startswith(f"{kind}:")] or [*TOPOLOGIES, "cpu:8", "gpu"]
    raise ValueError(f"no topology {topology!r} to compile for; {names.nearest(topology, known)}")


def chip(topology: str, device_kind: str = "") -> Chip | None:
    """That of a topology, or of a device by the name that JAX has for it; None for one that is not in CHIPS."""
    if check(topology) == "tpu":
        return CHIPS[topology.partition(":")[0]]
    return next((found for name, found in CHIPS.items() if re.search(rf"\b{name}\b", device_kind.lower())), None)


def set_environment(topology: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make this process one that compiles for a topology. Raises ValueError as `check`, without the TPU compiler, and
    where JAX has started with fewer CPU devices than the topology has."""
    kind = check(topology)
    environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the partitioner's warnings, a page for each
    if kind == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError("the TPU compiler is not installed: type python -m pip install --no-deps libtpu")
        environ.update(
            JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16",
            TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )  # fmt: skip
        # libtpu ends the process at a flag that it does not know
        environ["XLA_FLAGS"] = " ".join(flag for flag in environ.get("XLA_FLAGS", "").split() if "xla_cpu" not in flag)
    if kind == "cpu":
        number = int(topology.partition(":")[2])
        if "jax" in sys.modules:
            import jax

            if jax.device_count("cpu") < number:
                have = jax.device_count("cpu")
                raise ValueError(f"JAX has started with {have} CPU devices, found {topology}: start anew")
            return
        environ["JAX_PLATFORMS"] = "cpu"
        flags = re.sub(rf"{_FLAG}=\d+", "", environ.get("XLA_FLAGS", ""))
        environ["XLA_FLAGS"] = f"{flags} {_FLAG}={number}".strip()
