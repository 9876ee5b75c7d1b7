"""Settings and fixtures of the whole suite: strict JAX on 8 fake CPU devices, golden arrays, counted skips."""

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import warnings
import zlib
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
# XLA's threads spin while they wait: workers that shared cores would slow each other several times over
if WORKER and hasattr(os, "sched_setaffinity"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(WORKER.removeprefix("gw")) % len(cores) :: workers])
os.environ["JAX_PLATFORMS"] = "cpu"
# compiling is most of what a test does: machine code is made in a hurry (a third of the time is saved), and by the way
# that jaxlib 0.10 can still go beside its newer one (a third of the rest; later releases refuse an unknown flag)
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

# a trace makes millions of objects that live on: looking for garbage among them took a fifth of its time
gc.set_threshold(100_000, 10, 10)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# a folder per worker, since JAX does not write the files of its cache atomically
CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ROOT / ".cache" / "jax")) / (WORKER or "")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
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
def transformers():
    """The package, one thread of torch; skips where it is not installed."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _declare_operators(torch)
        reason = "transformers is not installed: pip install 'diffjax[test]'"
        package = pytest.importorskip("transformers", reason=reason)
        names = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", "T5EncoderModel", "CLIPTokenizer")
        for name in names:  # each is imported when it is asked for
            getattr(package, name)
    package.logging.set_verbosity_error()  # tiny vocabularies lack the default ids of its configs
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on models this small a second thread costs more than it saves
    yield package
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torch_fidelity():
    """The package; skips where it is not installed."""
    return _beside_torch("torch_fidelity", "torch-fidelity")


@pytest.fixture(scope="session")
def clean_fid():
    """The package with its module `fid`; skips where it is not installed."""
    return _beside_torch("cleanfid", "clean-fid", "fid")


@pytest.fixture(scope="session")
def pytorch_fid():
    """The package with its modules `inception` and `fid_score`; skips where it is not installed."""
    return _beside_torch("pytorch_fid", "pytorch-fid", "inception", "fid_score")


def _beside_torch(name, published, *modules):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _declare_operators(torch)
        package = pytest.importorskip(name, reason=f"{published} is not installed: pip install 'diffjax[test]'")
        for module in modules:
            importlib.import_module(f"{name}.{module}")
    return package


def _declare_operators(torch):
    """transformers imports torchvision, if it is there. The published one is built for CUDA: beside the CPU build of
    torch its operators do not load, and the registration of two of them ends the import. They are not needed here."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["torch"].torchvision_operators = library  # undone where it is collected


@pytest.fixture(scope="session")
def cifar10_dir():
    """Folder of tensorflow-datasets that holds CIFAR-10 as ArrayRecord; skips where there is none."""
    named = [os.environ[name] for name in ("DIFFJAX_DATA", "TFDS_DATA_DIR") if os.environ.get(name)]
    for folder in (*map(Path, named), ROOT.parent / "shared" / "data" / "tensorflow_datasets"):
        if (folder / "cifar10").is_dir():
            return str(folder)
    pytest.skip("CIFAR-10 is absent: set DIFFJAX_DATA or TFDS_DATA_DIR to a folder with cifar10/ as ArrayRecord")


def pytest_collection_modifyitems(items):
    """Files of whole runs first: one of them at the end would keep a single worker busy for minutes."""
    long = ("test_readme.py", "test_notebooks.py", "e2e/", "test_configs.py")
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    items.sort(key=lambda item: next((i for i, start in enumerate(long) if names[item].startswith(start)), len(long)))


def pytest_terminal_summary(terminalreporter):
    """Every skip with its reason, and how many there were."""
    skipped = terminalreporter.stats.get("skipped", [])
    for report in skipped:
        terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[-1]}")
    terminalreporter.write_line(f"{len(skipped)} skipped, each with its reason above" if skipped else "no test skipped")
