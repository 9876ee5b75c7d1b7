"""Distances of sets of images in pixel space, each with its protocol: what the reports of runs are made of.

    real = reference(data, "digits")
    result = frechet(samples, real)                                 # a protocol.Result
    near = prdc(samples, real, k=5)                                 # {"precision": Result, ...}
    rows = protocols({"frechet_distance": results})                 # for a report

Images (N, H, W, C) are uint8, or floats in about [-1, 1] that are neither clipped nor rounded; they are compared number
by number, without a network, so the distance is no FID.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffjax.metrics import fid, protocol
from diffjax.metrics import prdc as neighbours
from diffjax.metrics.references import Reference

FEATURES = "pixels"


def reference(images: np.ndarray, source: str, keep_features: bool = False) -> Reference:
    """Images to compare samples with; `source` names them. keep_features: for `prdc`."""
    mean, covariance = fid.pixel_statistics(images)
    features = fid.pixels(images) if keep_features else None
    sha256 = protocol.set_sha256(protocol.digests(images))
    return Reference(mean, covariance, len(images), None, features, source, sha256, None)


def frechet(samples: np.ndarray, real: Reference) -> protocol.Result:
    """The pixel Frechet distance, squared (`fid.frechet_distance`)."""
    distance = fid.frechet_distance(*fid.pixel_statistics(samples), real.mean, real.covariance)
    return protocol.Result(distance, _protocol("frechet", real, len(samples)))


def prdc(samples: np.ndarray, real: Reference, k: int) -> dict[str, protocol.Result]:
    """Precision, recall, density and coverage, by name. At most as many samples as real images are used, the first
    ones: the radii of recall depend on the size of the set."""
    same = samples[: len(real.features)]
    found = neighbours.prdc(real.features, fid.pixels(same), k)
    settings = f"k={k}, equal={len(samples) >= len(real.features)}"  # as the evaluation's option of that name
    values = found._asdict()
    return {name: protocol.Result(values[name], _protocol(name, real, len(same), settings)) for name in values}


def protocols(measured: Mapping[str, Sequence[protocol.Result]]) -> list[dict[str, Any]]:
    """Rows of a report's table `protocols`: for each name, what its values were measured by.

    Raises ValueError where values of one name were measured by different protocols.
    """
    rows = []
    for name, results in measured.items():
        protocol.check_comparable(results)
        rows.append({"values": name, **protocol.row(results[0].protocol)})
    return rows


def _protocol(metric: str, real: Reference, num_samples: int, settings: str = "") -> protocol.Protocol:
    return protocol.Protocol(
        metric=metric,
        features=FEATURES,
        rounding=protocol.UNROUNDED,
        reference=real.source,
        reference_sha256=real.sha256,
        reference_count=real.count,
        num_samples=num_samples,
        settings=settings,
    )
