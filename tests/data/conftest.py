"""Data of the tests: small pictures, and CIFAR-10 where it is at hand."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).parents[2].parent / "shared" / "data" / "tensorflow_datasets"


@pytest.fixture(scope="session")
def cifar10_dir():
    """Folder of tensorflow-datasets that holds CIFAR-10 as ArrayRecord; skips where there is none."""
    named = [os.environ[name] for name in ("DIFFJAX_DATA", "TFDS_DATA_DIR") if os.environ.get(name)]
    for folder in (*map(Path, named), _BESIDE):
        if (folder / "cifar10").is_dir():
            return str(folder)
    pytest.skip("CIFAR-10 is absent: set DIFFJAX_DATA or TFDS_DATA_DIR to a folder with cifar10/ as ArrayRecord")
