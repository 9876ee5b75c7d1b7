"""Reference statistics from any file that `metrics.references` or NVlabs/edm2 writes."""

import os
from pathlib import Path

import numpy as np

from diffjax.metrics import array_files, references
from diffjax.metrics.references import Reference
from diffjax.weights import edm_statistics


def read(path: str | os.PathLike[str], width: int | None = None, metric: str = "fid") -> Reference:
    """The reference in `path`: .npz as `metrics.references.read`; of a .pkl the part of `metric`, "fid" or "fd_dinov2".

    Raises FileNotFoundError, and ValueError like the readers and for a metric that a .pkl does not hold.
    """
    if Path(path).suffix.lower() != ".pkl":
        return references.read(path, width)
    found = edm_statistics.read(path)
    count = found.pop("num_images", 0)
    if metric not in found:
        raise ValueError(f"{path} has no statistics for {metric!r}, expected one of: {', '.join(found) or 'none'}")
    arrays = {**found[metric], "count": np.asarray(count, np.int64)}
    return references.of_arrays(arrays, path, width, array_files.sha256(path))
