"""Compiler flags that the programs set before JAX starts; a library import leaves them alone."""

import importlib.metadata
import os
import sys
from collections.abc import MutableMapping

_YNN = "--xla_cpu_experimental_ynn_fusion_type"


def set_flags(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep XLA's own convolutions on the CPU: up to jaxlib 0.11 it hands them to YNNPACK, where a train step of
    DDPM++ takes 1.5 times as long. A flag that the user has set stays; other backends do not read it, and a JAX that
    has been imported may have read its flags already, so nothing is changed then.
    """
    if "jax" in sys.modules:
        return
    release = importlib.metadata.version("jaxlib").split(".")
    flags = environ.get("XLA_FLAGS", "")
    if (int(release[0]), int(release[1])) < (0, 12) and _YNN not in flags:
        environ["XLA_FLAGS"] = f"{flags} {_YNN}=-individual_convolution".strip()
