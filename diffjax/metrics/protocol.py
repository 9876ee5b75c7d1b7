"""What a number was measured by: its protocol, and which numbers may stand beside each other.

A value without its protocol cannot be compared: other weights, resizing, rounding, reference sets and counts move an
FID by more than most papers improve it (Parmar 2022; Chong & Forsyth 2020). So each value is a `Result`, which carries
its `Protocol`, and `check_comparable` refuses to compare values whose protocols differ:

    check_comparable([ours, theirs])       # ValueError that names each field that differs
    tables = tables([("runs/a", ours)])    # rows for a report: `metrics` and `protocols`

`METRICS` says what is measured, in which feature spaces, and what it is called there: only Inception features make an
FID, the same formula on pixels is a "pixel Frechet distance".
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffjax.core import names

ROUNDED = "uint8, clip(127.5 x + 128)"  # sampling.generate.to_uint8, as EDM
UNROUNDED = "none"
ONE_RANGE = "one seed range"


class Protocol(NamedTuple):
    """How a value was measured.

    metric: a key of METRICS, or of what it gives ("precision"). features: a feature space, "inception". weights_sha256:
    of the network's file, "" where there is none. resize: a key of metrics.resize.RESIZES and the size, "tf1 299", ""
    for none. rounding: ROUNDED or UNROUNDED. reference, reference_sha256, reference_count: the set that samples are
    compared with, "" and 0 where the metric needs none, count 0 also where a file does not say. num_samples: of one
    seed range. settings: the metric's own, "k=3". statistic: what the value is of its seed ranges.
    """

    metric: str
    features: str
    weights_sha256: str = ""
    resize: str = ""
    rounding: str = ROUNDED
    reference: str = ""
    reference_sha256: str = ""
    reference_count: int = 0
    num_samples: int = 0
    settings: str = ""
    statistic: str = ONE_RANGE


class Spread(NamedTuple):
    """Of the values of all seed ranges."""

    min: float
    mean: float
    max: float


class Result(NamedTuple):
    """One value. seeds: a text a seed range, "0: 0-49999"; nfe: network calls a sample, None for a folder of images."""

    value: float
    protocol: Protocol
    seeds: tuple[str, ...] = ()
    nfe: float | None = None
    spread: Spread | None = None


class Metric(NamedTuple):
    """titles: by feature space, what the value is called there; a space that is not named cannot be used. source:
    paper.

    gives: values, where the metric has several. reference: needs a reference set. lower: the lower the better.
    """

    titles: Mapping[str, str]
    source: str
    gives: tuple[str, ...] = ()
    reference: bool = True
    lower: bool = True


_CLIPS = {
    "clip_b32": "CLIP ViT-B/32",
    "clip_l14": "CLIP ViT-L/14",
    "clip_l14_336": "CLIP ViT-L/14@336",
    "clip_g14": "CLIP ViT-g/14",
}
_TITLED = {"pixels": "pixel", "inception": "Inception", "classifier": "classifier", "dinov2": "DINOv2", **_CLIPS}

METRICS: Mapping[str, Metric] = {
    "fid": Metric({"inception": "FID"}, "Heusel 2017"),
    "sfid": Metric({"inception": "sFID"}, "Nash 2021"),
    "fid_infinity": Metric({"inception": "FID-infinity"}, "Chong & Forsyth 2020"),
    "kid": Metric({"inception": "KID"}, "Binkowski 2018"),
    "is": Metric({"inception": "Inception Score"}, "Salimans 2016", reference=False, lower=False),
    "prdc": Metric(
        {name: title + " {}" for name, title in _TITLED.items()},
        "Kynkaanniemi 2019, Naeem 2020",
        gives=("precision", "recall", "density", "coverage"),
        lower=False,
    ),
    "cmmd": Metric({"clip_l14_336": "CMMD"}, "Jayasumana 2024"),
    "clip_score": Metric(
        {name: f"CLIP score, {title}" for name, title in _CLIPS.items()},
        "Radford 2021; 100 max(mean cos, 0)",
        reference=False,
        lower=False,
    ),
    "fd_dinov2": Metric({"dinov2": "FD-DINOv2"}, "Stein 2023"),
    "fvd": Metric({"i3d": "FVD", "videomae": "FVD, VideoMAE features"}, "Unterthiner 2018, Ge 2024"),
    "frechet": Metric(
        {name: f"{_TITLED[name]} Frechet distance" for name in ("pixels", "classifier")}, "Heusel 2017, eq. 6; no FID"
    ),
}

_OF = {part: name for name, metric in METRICS.items() for part in metric.gives}


def metric_of(name: str) -> Metric:
    """The entry of METRICS that measures `name`, "fid" or "precision". Raises ValueError for an unknown name."""
    return names.lookup(METRICS, _OF.get(name, name), "metric")


def title(name: str, features: str) -> str:
    """What the value of metric `name` in the space `features` is called, "pixel Frechet distance".

    Raises ValueError for an unknown metric, and for a space that it is not defined in.
    """
    titles = metric_of(name).titles
    if features not in titles:
        raise ValueError(f"{name!r} is not defined on the features {features!r}, expected one of: {', '.join(titles)}")
    return titles[features].format(name)


def identity(protocol: Protocol) -> str:
    """Eight hex digits, the same for all protocols that may be compared."""
    return hashlib.sha256(json.dumps(_compared(protocol)).encode()).hexdigest()[:8]


def describe(protocol: Protocol) -> str:
    """One sentence: "FID: inception features (weights 0f2c...), ... against ..."."""
    p = protocol
    parts = [f"{p.features} features" + (f" (weights sha256 {p.weights_sha256[:12]})" if p.weights_sha256 else "")]
    parts.append(f"rounding {p.rounding}")
    if p.resize:
        parts.append(f"resized {p.resize}")
    parts.append(f"{p.num_samples:,} samples")
    if p.reference:
        count = f"{p.reference_count:,} items of " if p.reference_count else ""
        digest = f" (sha256 {p.reference_sha256[:12]})" if p.reference_sha256 else ""
        parts.append(f"against {count}{p.reference}{digest}")
    parts += [text for text in (p.settings, p.statistic) if text]
    return f"{title(p.metric, p.features)}: {', '.join(parts)}."


def check_comparable(results: Iterable[Result | Protocol]) -> None:
    """Raise ValueError that names each field in which protocols differ.

    A reference is compared by its hash, where it has one; its name and count are then no matter.
    """
    protocols = [item.protocol if isinstance(item, Result) else item for item in results]
    if len({_key(protocol) for protocol in protocols}) < 2:
        return
    found = [_compared(protocol) for protocol in protocols]
    differ = []
    for field in Protocol._fields:
        values = dict.fromkeys(json.dumps(values.get(field)) for values in found)
        if len(values) > 1:
            differ.append(f"{field}: {' and '.join(values)}")
    raise ValueError(
        f"these values were measured by different protocols and cannot be compared: {'; '.join(differ)}. Evaluate both "
        "with one config"
    )


def summarise(values: Sequence[float], protocol: Protocol, seeds: Sequence[str], nfe: float | None = None) -> Result:
    """The result of the values of several seed ranges: their minimum where lower is better (as EDM reports FID), else
    their mean, with the spread of all."""
    spread = Spread(float(np.min(values)), float(np.mean(values)), float(np.max(values)))
    value = spread.min if metric_of(protocol.metric).lower else spread.mean
    return Result(value, of_ranges(protocol, len(values)), tuple(seeds), nfe, spread)


def of_ranges(protocol: Protocol, num_ranges: int) -> Protocol:
    """The protocol of what `summarise` makes of as many seed ranges, from that of one."""
    if num_ranges < 2:
        return protocol
    which = "minimum" if metric_of(protocol.metric).lower else "mean"
    return protocol._replace(statistic=f"{which} of {num_ranges} seed ranges")


def row(protocol: Protocol) -> dict[str, Any]:
    """Of a report's table `protocols`."""
    return {"protocol": identity(protocol), **protocol._asdict(), "in words": describe(protocol)}


def tables(results: Iterable[tuple[str, Result]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a report from (run, result): `metrics`, one a value, and `protocols`, one a protocol that they name."""
    rows, protocols = [], {}
    for run, result in results:
        p = result.protocol
        at = identity(p)
        spread = result.spread or Spread(result.value, result.value, result.value)
        rows.append(
            {
                "run": run,
                "metric": title(p.metric, p.features),
                "value": result.value,
                **spread._asdict(),
                "nfe": result.nfe,
                "num_samples": p.num_samples,
                "seeds": "; ".join(result.seeds),
                "protocol": at,
            }
        )
        protocols.setdefault(at, row(p))
    return {"metrics": rows, "protocols": list(protocols.values())}


def digests(images: np.ndarray) -> np.ndarray:
    """sha256 of the bytes of each of `images` (n, ...), (n, 32) uint8."""
    found = b"".join(hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images)
    return np.frombuffer(found, np.uint8).reshape(len(images), 32)


def set_sha256(digests: np.ndarray) -> str:
    """Of a set of images, from the `digests` of all in their order, in whatever parts they were made."""
    return hashlib.sha256(np.ascontiguousarray(digests)).hexdigest()


def _compared(protocol: Protocol) -> dict[str, Any]:
    values = protocol._asdict()
    if protocol.reference_sha256:
        del values["reference"], values["reference_count"]
    return values


def _key(protocol: Protocol) -> str:
    return json.dumps(_compared(protocol))
