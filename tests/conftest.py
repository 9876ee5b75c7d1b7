"""Settings and fixtures of the whole suite: strict JAX on 8 fake CPU devices, golden arrays, counted skips."""

import json
import os
import zlib
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden():
    """name -> (arrays, meta) of tests/golden/<name>.npz, made by the original PyTorch code."""

    def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return arrays, json.loads(str(arrays.pop("meta_json")))

    return load


@pytest.fixture(scope="session")
def golden_weights():
    """(PyTorch name, shape) -> float32 weights by the rule that made the golden arrays: drawn, never stored."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.RandomState(zlib.crc32(("golden/" + name).encode()) & 0x7FFFFFFF)
        values = random.standard_normal(shape)
        if len(shape) >= 2:
            values = values / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        return values.astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def cifar10_dir():
    """Folder of tensorflow-datasets that holds CIFAR-10 as ArrayRecord; skips where there is none."""
    named = [os.environ[name] for name in ("DIFFJAX_DATA", "TFDS_DATA_DIR") if os.environ.get(name)]
    for folder in (*map(Path, named), ROOT.parent / "shared" / "data" / "tensorflow_datasets"):
        if (folder / "cifar10").is_dir():
            return str(folder)
    pytest.skip("CIFAR-10 is absent: set DIFFJAX_DATA or TFDS_DATA_DIR to a folder with cifar10/ as ArrayRecord")


def pytest_terminal_summary(terminalreporter):
    """Every skip with its reason, and how many there were."""
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[-1]}")
    terminalreporter.write_line(f"{len(skipped)} skipped, each with its reason above" if skipped else "no test skipped")
