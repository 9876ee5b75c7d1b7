"""Statistics of a reference set, as the field's tools write them and as we do.

    arrays of an .npz                                         of which tool
    mu (D,), sigma (D, D)                                     pytorch-fid --save-stats, clean-fid, EDM's fid.py
    mu, sigma, mu_s (S,), sigma_s (S, S), arr_0 (images)      ADM's reference batches; arr_0 is not read
    feats (N, D)                                              clean-fid's *_kid.npz; mean and covariance are theirs
    mu, sigma, [mu_s, sigma_s], [feats], count, protocol      ours (`write`), which the tools above read too

`build.references` reads these and the .pkl of EDM2.

mu_s and sigma_s are of spatial features, for the sFID. Covariances are normalised by N - 1 in all of them. Nothing in a
file is ever executed.

    reference = read("cifar10-32x32.npz", width=2048)
    fid.frechet_distance(total.mean, total.covariance, reference.mean, reference.covariance)
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.metrics import array_files, stats


class Reference(NamedTuple):
    """mean: (D,). covariance: (D, D). count: samples, 0 where the file does not say. spatial: (mean, covariance) of
    spatial features. features: (N, D), for KID and PRDC. source: the file's name. sha256: of the file. protocol: what
    `write` was given, None where the file does not say."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    features: np.ndarray | None = None
    source: str = ""
    sha256: str = ""
    protocol: dict[str, Any] | None = None


_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "feats", "count", "protocol")


def read(path: str | os.PathLike[str], width: int | None = None) -> Reference:
    """The reference in an .npz file; `width` is what D must be.

    Raises FileNotFoundError, and ValueError for a file that is damaged or of another kind, arrays that are missing,
    misshapen, not finite or made of Python objects, and features of another width.
    """
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"{path} is no .npz: give the statistics file of EDM, ADM, pytorch-fid or clean-fid, or ours")
    shapes = array_files.shapes(path)
    held = [name for name in _STATISTICS if name in shapes]
    if not {"mu", "sigma", "feats"} & set(held) and "arr_0" in shapes:
        raise ValueError(f"{path} holds images (arr_0) and no statistics (mu, sigma): give it as a set of images")
    for name in ("mu", "feats"):  # before hundreds of megabytes are read
        if name in held and shapes[name] and width is not None:
            _check_width(shapes[name][-1], width, path)
    return of_arrays(array_files.read(path, held), path, width, array_files.sha256(path))


def write(path: str | os.PathLike[str], reference: Reference) -> str:
    """Write `reference` to `path` (.npz), `source` and `sha256` apart; returns the file's sha256.

    The same reference gives the same bytes. Raises ValueError for one that `read` would refuse, and for another suffix.
    """
    if Path(path).suffix.lower() != ".npz":
        raise ValueError(f"{path} is no .npz: end its name so")
    arrays = {"mu": reference.mean, "sigma": reference.covariance}
    if reference.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = reference.spatial
    if reference.features is not None:
        arrays["feats"] = reference.features
    arrays["count"] = np.asarray(reference.count, np.int64)
    if reference.protocol is not None:
        arrays["protocol"] = np.asarray(json.dumps(reference.protocol, sort_keys=True))
    of_arrays(arrays, path)
    array_files.write(path, arrays)
    return array_files.sha256(path)


def of_arrays(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str], width: int | None = None, sha256: str = ""
) -> Reference:
    """The reference of the arrays found in the file `path`, named as in .npz files. Raises like `read`."""
    features = _finite(arrays, "feats", 2, path) if "feats" in arrays else None
    if features is not None and not {"mu", "sigma"} & set(arrays):
        moments = stats.of(features)
        mean, covariance = moments.mean, moments.covariance
    else:
        mean, covariance = _pair(arrays, "mu", "sigma", path)
    if width is not None:
        _check_width(len(mean), width, path)
    if features is not None:
        _check_width(features.shape[1], len(mean), path)
    spatial = _pair(arrays, "mu_s", "sigma_s", path) if {"mu_s", "sigma_s"} & set(arrays) else None
    count, protocol = _count(arrays, features, path), _protocol(arrays, path)
    return Reference(mean, covariance, count, spatial, features, Path(path).name, sha256, protocol)


def _pair(arrays: Mapping[str, np.ndarray], first: str, second: str, path: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, float64."""
    missing = [name for name in (first, second) if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {' and '.join(missing)}, expected {first} (D,) and {second} (D, D)")
    mean, covariance = _finite(arrays, first, 1, path), _finite(arrays, second, 2, path)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} has {first} {mean.shape} and {second} {covariance.shape}, expected (D,) and (D, D)")
    return mean.astype(np.float64), covariance.astype(np.float64)


def _finite(arrays: Mapping[str, np.ndarray], name: str, rank: int, path: Any) -> np.ndarray:
    array = np.asarray(arrays[name])
    if array.ndim != rank or not array.size or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} has {name} of {array.dtype} {array.shape}, expected floats with {rank} axes")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of {path} holds a NaN or infinity: make the file again")
    return array


def _check_width(found: int, expected: int, path: Any) -> None:
    if found != expected:
        raise ValueError(
            f"mismatched reference size: found features of width {found} in {path}, expected {expected}: give the "
            "statistics of the same feature network"
        )


def _count(arrays: Mapping[str, np.ndarray], features: np.ndarray | None, path: Any) -> int:
    if "count" not in arrays:
        return 0 if features is None or "mu" in arrays else len(features)
    count = np.asarray(arrays["count"])
    if count.shape or not np.issubdtype(count.dtype, np.integer) or count < 0:
        raise ValueError(f"{path} has count {count.dtype} {count.shape}, expected the number of samples")
    return int(count)


def _protocol(arrays: Mapping[str, np.ndarray], path: Any) -> dict[str, Any] | None:
    if "protocol" not in arrays:
        return None
    try:
        found = json.loads(str(arrays["protocol"][()]))
    except json.JSONDecodeError as error:
        raise ValueError(f"the protocol of {path} is no JSON ({error}): make the file again") from error
    if not isinstance(found, dict):
        raise ValueError(f"the protocol of {path} is a {type(found).__name__}, expected a dict: make the file again")
    return found
