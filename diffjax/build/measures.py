"""How each metric is computed from what was collected of samples and from a reference."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax.build.feature_spaces import POOL
from diffjax.metrics import clip_score, fid, fid_infinity, inception_score, kid, mmd, prdc, stats
from diffjax.metrics.references import Reference


class Found(NamedTuple):
    """What was collected of a set in one space: by output, moments and kept features; and embeddings (n, D) of its
    texts."""

    moments: Mapping[str, stats.Moments]
    kept: Mapping[str, np.ndarray]
    texts: np.ndarray | None = None


class Measure(NamedTuple):
    """compute(found, reference, **options) -> value by name; the outputs it takes; features: whether it takes those of
    the reference, beside its statistics; texts: whether images need them."""

    compute: Callable[..., dict[str, float]]
    moments: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    features: bool = False
    texts: bool = False


def _frechet(name: str, found: Found, real: Reference) -> dict[str, float]:
    own = found.moments[POOL]
    return {name: fid.frechet_distance(own.mean, own.covariance, real.mean, real.covariance)}


def _sfid(found: Found, real: Reference) -> dict[str, float]:
    own = found.moments["spatial"]
    return {"sfid": fid.frechet_distance(own.mean, own.covariance, *real.spatial)}


def _infinity(found: Found, real: Reference, num_points: int = 15, smallest: int = 5000) -> dict[str, float]:
    limit = fid_infinity.fid_infinity(found.kept[POOL], real.mean, real.covariance, num_points, smallest)
    return {"fid_infinity": limit.value}


def _kid(found: Found, real: Reference, num_subsets: int = 100, subset_size: int = 1000) -> dict[str, float]:
    return {"kid": kid.kid(real.features, found.kept[POOL], num_subsets, subset_size).mean}


def _is(found: Found, real: None, splits: int = 10) -> dict[str, float]:
    return {"is": inception_score.inception_score(found.kept["logits"], splits).mean}


def _prdc(found: Found, real: Reference, k: int = 5, equal: bool = True) -> dict[str, float]:
    """equal: as many of both, the first ones, since the radii of a set depend on its size; ADM takes all of each."""
    own, other = found.kept[POOL], real.features
    count = min(len(own), len(other)) if equal else max(len(own), len(other))
    return prdc.prdc(other[:count], own[:count], k)._asdict()


def _cmmd(found: Found, real: Reference) -> dict[str, float]:
    return {"cmmd": mmd.cmmd(real.features, found.kept[POOL])}


def _clip_score(found: Found, real: None) -> dict[str, float]:
    return {"clip_score": clip_score.clip_score(np.asarray(clip_score.cosines(found.kept[POOL], found.texts)))}


MEASURES: Mapping[str, Measure] = {
    **{
        name: Measure(functools.partial(_frechet, name), moments=(POOL,))
        for name in ("fid", "frechet", "fd_dinov2", "fvd")
    },
    "sfid": Measure(_sfid, moments=("spatial",)),
    "fid_infinity": Measure(_infinity, kept=(POOL,)),
    "kid": Measure(_kid, kept=(POOL,), features=True),
    "is": Measure(_is, kept=("logits",)),
    "prdc": Measure(_prdc, kept=(POOL,), features=True),
    "cmmd": Measure(_cmmd, kept=(POOL,), features=True),
    "clip_score": Measure(_clip_score, kept=(POOL,), texts=True),
}


def settings(name: str, options: Mapping[str, Any]) -> str:
    """Every option of a measure with its value, "k=5"."""
    known = inspect.signature(MEASURES[name].compute).parameters.values()
    return ", ".join(f"{p.name}={options.get(p.name, p.default)}" for p in known if p.default is not p.empty)
