"""Compiler flags: set once, before JAX, and never against the user."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
{before}
from diffjax.runtime import xla
xla.set_flags()
import jax
jax.numpy.ones(3).block_until_ready()  # an unknown flag would end the process here
print(os.environ.get("XLA_FLAGS", ""))
"""
OWN = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("before", "flags", "expected"),
    [
        ("", "", "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"),
        ("", OWN, OWN),
        ("import jax", "", ""),
    ],
    ids=["default", "the user's", "too late"],
)
def test_flags(before, flags, expected):
    import jaxlib

    if expected and flags == "" and tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 12):
        expected = ""  # that XLA is as fast without
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", CODE.format(before=before)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
