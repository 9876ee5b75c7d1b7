"""Fast diffusion models in JAX: train, distil into 1-5 network calls, sample and measure.

Importing the package imports nothing heavy; it only refuses releases of flax and jax that do not work together.
"""

import importlib.metadata
import re

__version__ = "0.1.0"

# (flax before, does not work with jax from): `from flax import nnx` needs names of jax.experimental.hijax that jax
# removed (MutableHiType in 0.11.1, HiPrimitive in 0.11.2). Found by importing every pair of releases from flax 0.12.8
# and jax 0.10.2 on; flax 0.12.10 is the first that imports with all of them.
_BROKEN_PAIRS = (("0.12.9", "0.11.1"), ("0.12.10", "0.11.2"))
_FLAX_FOR_NEW_JAX = "0.12.10"
_JAX_FOR_OLD_FLAX = "0.11.0"


def _numbers(version: str) -> tuple[int, ...]:
    """'0.12.0rc1' -> (0, 12, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


def _refuse_broken_pair(flax: str, jax: str) -> None:
    """Raise ImportError, with what to type, for releases whose import is known to fail."""
    for flax_before, jax_from in _BROKEN_PAIRS:
        if _numbers(flax) < _numbers(flax_before) and _numbers(jax) >= _numbers(jax_from):
            raise ImportError(
                f"flax {flax} cannot be imported with jax {jax} (flax before {flax_before} needs jax before {jax_from}); "
                f"type: pip install 'flax>={_FLAX_FOR_NEW_JAX}' (Python 3.12 or newer), or: pip install "
                f"'jax=={_JAX_FOR_OLD_FLAX}' 'jaxlib=={_JAX_FOR_OLD_FLAX}'"
            )


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"diffjax needs {package}, which is not installed; type: pip install . (in the checkout)") from error


_refuse_broken_pair(_installed("flax"), _installed("jax"))
