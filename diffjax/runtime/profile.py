"""Traces of what the device does, for TensorBoard's profile page or Perfetto."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def trace(folder: str | os.PathLike[str], enabled: bool = True) -> Iterator[None]:
    """Record the block into `folder`/profile; call `jax.block_until_ready` inside, work still queued is lost."""
    if not enabled:
        yield
        return
    with jax.profiler.trace(str(Path(folder) / "profile")):
        yield
