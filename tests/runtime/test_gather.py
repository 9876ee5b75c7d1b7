"""Arrays of all processes: bits kept, in one process and in two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import gather_example
import numpy as np
import pytest

from diffjax.metrics import array_files, stats
from diffjax.runtime.gather import gather


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.fast
def test_one_process_gets_what_it_gave():
    (found,) = gather(gather_example.given(0))
    same(found, gather_example.given(0))


def test_python_objects_are_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="who hold Python objects"):
        gather({"who": np.asarray([{}], object)})


def test_two_processes_get_the_bits_of_both_and_the_moments_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = str(Path(gather_example.__file__))
    outs = [tmp_path / f"{process}.npz" for process in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(port), str(process), str(out)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for process in processes:
            log, _ = process.communicate(timeout=120)
            assert process.returncode == 0, log
    finally:
        for process in processes:
            process.kill()

    alone = stats.running(0, gather_example.BLOCK)
    total = stats.total(stats.update(alone, gather_example.features()))
    expected = {"count": np.asarray(total.count), "mean": total.mean, "scatter": total.scatter}
    for process in range(2):
        expected |= {f"{process}_{name}": array for name, array in gather_example.given(process).items()}
    for out in outs:
        same(array_files.read(out), expected)
