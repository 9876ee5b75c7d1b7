"""Metrics of a set of images against a reference, each value with its protocol.

    space = feature_spaces.load("inception", "pt_inception-2015-12-05-6726825d.pth", "tf1")
    request = Request(space, ("fid", "kid"), open_reference("cifar10-32x32.npz", space))
    ranges = seed_ranges(samples, (0, 1, 2), 50_000)
    for result in evaluate(samples, ranges, [request], How(mesh), Path("runs/fid/state")):
        print(result.value, protocol.describe(result.protocol))

One pass over the images serves all requests. Values of a seed range are kept in a file beside its state, so that a
rerun measures what is missing; the state itself is removed then.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.build import feature_spaces, measures, references, streams
from diffjax.build.feature_spaces import POOL, FeatureSpace
from diffjax.build.image_sets import ImageSet
from diffjax.build.measures import MEASURES, Found
from diffjax.build.streams import How, Want
from diffjax.core import names
from diffjax.metrics import protocol, stats
from diffjax.metrics.protocol import Protocol, Result
from diffjax.metrics.references import Reference
from diffjax.runtime import gather, report


class Request(NamedTuple):
    """Metrics (keys of MEASURES) in one space. reference: None where none of them needs it. options: by metric, those
    of its function in `measures`."""

    space: FeatureSpace
    metrics: tuple[str, ...]
    reference: Reference | None = None
    options: Mapping[str, Mapping[str, Any]] = {}


class SeedRange(NamedTuple):
    """Samples first .. first + count - 1 of a seed. text: for reports."""

    seed: int
    first: int
    count: int
    text: str


# References ------------------------------------------------------------------------------------------------------


def open_reference(path: str, space: FeatureSpace) -> Reference:
    """The statistics in `path`, for features of `space`. Raises FileNotFoundError, ValueError as `references.read`, and
    for a file that says it was made with another network, resizing or rounding."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"reference {path!r} does not exist: give a statistics file, or make one with diffjax.cli.prepare --stats"
        )
    metric = "fd_dinov2" if space.name == "dinov2" else "fid"
    found = references.read(path, space.widths[POOL] or None, metric)
    told = found.protocol or {}
    wrong = [
        f"{key} {told[key]!r}, expected {value!r}"
        for key, value in space_protocol(space).items()
        if key in told and told[key] != value
    ]
    if wrong:
        raise ValueError(f"{path} was made by another protocol: {'; '.join(wrong)}. Make it again in this space")
    if told.get("images_sha256"):
        found = found._replace(sha256=told["images_sha256"], source=told.get("images", found.source))
    return found


def make_reference(
    items: ImageSet, space: FeatureSpace, metrics: Sequence[str], how: How, folder: Path | None
) -> Reference:
    """Statistics of all of `items`, and what else `metrics` need; the state stays in `folder`, so that it is made
    once."""
    wanted = want(Request(space, tuple(metrics)))
    kept = (POOL,) if any(MEASURES[name].features for name in metrics) else ()
    spatial = tuple(output for output in wanted.moments if output != POOL)
    wanted = Want(space, (POOL, *spatial), kept)
    place = None if folder is None else folder / _key(items, SeedRange(0, 0, items.total, ""), [wanted], how)
    found = streams.collect(items, 0, range(items.total), [wanted], how, place, digests=True)
    pool, apart = found.moments[f"{space.name}/{POOL}"], found.moments.get(f"{space.name}/spatial")
    return Reference(
        mean=pool.mean,
        covariance=pool.covariance,
        count=pool.count,
        spatial=None if apart is None else (apart.mean, apart.covariance),
        features=found.kept.get(f"{space.name}/{POOL}"),
        source=items.name,
        sha256=found.digest,
        protocol={**space_protocol(space), "images_sha256": found.digest, "images": items.name},
    )


def lacks(real: Reference, metrics: Sequence[str]) -> bool:
    """Whether one of `metrics` needs features or spatial statistics that `real` does not hold."""
    features = any(MEASURES[name].features for name in metrics) and real.features is None
    return features or ("sfid" in metrics and real.spatial is None)


def space_protocol(space: FeatureSpace) -> dict[str, str]:
    """What a file of statistics says of the space that they are of."""
    return {
        "features": space.name,
        "weights_sha256": space.weights_sha256,
        "resize": space.resize,
        "rounding": space.rounding,
    }


def check_metrics(features: str, metrics: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError for metrics that the space `features` has not, and options that they have not."""
    for name in metrics:
        measure, metric = names.lookup(MEASURES, name, "metric"), protocol.metric_of(name)
        protocol.title((metric.gives or (name,))[0], features)
        names.check_options(measure.compute, options.get(name, {}), f"the metric {name!r}")
    if unknown := sorted(set(options) - set(metrics)):
        raise ValueError(f"options are for metrics that are measured, found some for {unknown}: leave them out")


def check_request(request: Request, items: ImageSet) -> None:
    """Raises ValueError, before any work, as `check_metrics`, for a reference that lacks what the metrics need, and
    images that do not fit."""
    space, real = request.space, request.reference
    check_metrics(space.name, request.metrics, request.options)
    feature_spaces.check_images(np.zeros((1, *items.shape), np.uint8), space)
    for name in request.metrics:
        measure, metric = MEASURES[name], protocol.metric_of(name)
        if measure.texts and not items.texts:
            raise ValueError(
                f"{name!r} needs the texts of {items.name}: set config.sets.NAME.prompts to a file with one a line"
            )
        if metric.reference and (real is None or lacks(real, (name,))):
            kind = "features" if measure.features else "spatial statistics" if name == "sfid" else "statistics"
            found = "is missing" if real is None else f"{real.source} does not hold"
            raise ValueError(
                f"{name!r} needs {kind} of the reference, which {found}: set config.reference.data to the data set, or "
                "give a file that holds them"
            )
    width = space.widths[POOL] or int(np.prod(items.shape))
    if real is not None and real.mean.size != width:
        raise ValueError(
            f"mismatched reference size: {real.source} has features of width {real.mean.size}, those of {items.name} "
            f"in {space.name!r} have {width}: take the reference of the same images and network"
        )


# Evaluation ------------------------------------------------------------------------------------------------------


def seed_ranges(items: ImageSet, seeds: Sequence[int], num_samples: int) -> list[SeedRange]:
    """One range a seed of a run; of files, which have no seeds, as many pieces as there are seeds and images for them,
    and all images for num_samples 0. Raises ValueError for fewer images than asked."""
    if not seeds:
        raise ValueError("found no seeds: say which, (0, 1, 2) for the three ranges of EDM's protocol")
    if items.seeded and num_samples < 1:
        raise ValueError(f"found num_samples={num_samples}: say how many samples of {items.name} to draw")
    count = num_samples or items.total
    if items.total and items.total < count:
        raise ValueError(
            f"{items.name} has {items.total:,} images, fewer than the {count:,} asked for: add some, or lower "
            "num_samples"
        )
    if items.seeded:
        return [SeedRange(seed, 0, count, f"{seed}: 0-{count - 1}") for seed in seeds]
    firsts = [i * count for i in range(min(len(seeds), items.total // count))]
    return [SeedRange(0, first, count, f"images {first}-{first + count - 1}") for first in firsts]


def evaluate(
    items: ImageSet, ranges: Sequence[SeedRange], requests: Sequence[Request], how: How, folder: Path | None = None
) -> list[Result]:
    """The values of all metrics of all requests over the seed ranges. folder: holds values and states; None keeps none.

    Raises as `check_request` and `streams.collect`; values of ranges that are done stay in `folder`.
    """
    for request in requests:
        check_request(request, items)
    rows = []
    for at in ranges:
        # progress counts on over the ranges
        start, stop = streams.share(at.count, *streams.place())
        before = len(rows) * (stop - start)
        onward = how._replace(say=lambda done, before=before: how.say(before + done))
        rows.append(_range_values(items, at, requests, onward, folder))
    protocols = protocols_of(requests, ranges[0].count)
    texts = [at.text for at in ranges]
    return [protocol.summarise([row[key] for row in rows], found, texts, items.nfe) for key, found in protocols.items()]


def want(request: Request) -> Want:
    """The outputs that a request needs."""
    found = [names.lookup(MEASURES, name, "metric") for name in request.metrics]
    moments, kept = ([output for measure in found for output in getattr(measure, kind)] for kind in ("moments", "kept"))
    return Want(request.space, tuple(dict.fromkeys(moments)), tuple(dict.fromkeys(kept)))


def _range_values(
    items: ImageSet, at: SeedRange, requests: Sequence[Request], how: How, folder: Path | None
) -> dict[str, float]:
    wants, ids = [want(request) for request in requests], range(at.first, at.first + at.count)
    fingerprint, place, file = items.fingerprint(ids), None, None
    if folder is not None:
        place = folder / _key(items, at, wants, how)
        asked = json.dumps([[key, found] for key, found in protocols_of(requests, at.count).items()])
        file = folder / f"{place.name}_{hashlib.sha256(asked.encode()).hexdigest()[:8]}.json"
        kept = _kept_values(file, fingerprint)
        # all or none: what one process lacks, all of them measure
        everyone = list(gather.gather({"kept": np.int32(kept is not None)}))
        if all(int(arrays["kept"]) for arrays in everyone):
            return kept
    found = streams.collect(items, at.seed, ids, wants, how, place)
    values: dict[str, float] = {}
    for request in requests:
        texts = [items.texts[i] for i in ids] if any(MEASURES[name].texts for name in request.metrics) else []
        values |= {f"{request.space.name}/{name}": value for name, value in _measure(request, found, texts).items()}
    if file is not None:
        report.write_text(file, json.dumps({"fingerprint": fingerprint, "values": values}) + "\n")
        shutil.rmtree(place, ignore_errors=True)
    return values


def _measure(request: Request, found: streams.Collected, texts: Sequence[str]) -> dict[str, float]:
    own = Found(
        moments=_of_space(request.space, found.moments),
        kept=_of_space(request.space, found.kept),
        texts=feature_spaces.embed(request.space, texts) if texts else None,
    )
    values: dict[str, float] = {}
    for name in request.metrics:
        values |= MEASURES[name].compute(own, request.reference, **request.options.get(name, {}))
    return values


def _of_space(space: FeatureSpace, found: Mapping[str, Any]) -> dict[str, Any]:
    """By output, what is there by "space/output"."""
    prefix = f"{space.name}/"
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def protocols_of(requests: Sequence[Request], num_samples: int) -> dict[str, Protocol]:
    """Of each value, by "space/name"."""
    found = {}
    for request in requests:
        for name in request.metrics:
            metric = protocol.metric_of(name)
            real = request.reference if metric.reference else None
            count = num_samples
            if name == "prdc" and request.options.get(name, {}).get("equal", True):
                count = min(count, len(real.features))
            for part in metric.gives or (name,):
                found[f"{request.space.name}/{part}"] = Protocol(
                    part,
                    **space_protocol(request.space),
                    reference="" if real is None else real.source,
                    reference_sha256="" if real is None else real.sha256,
                    reference_count=0 if real is None else real.count,
                    num_samples=count,
                    settings=measures.settings(name, request.options.get(name, {})),
                )
    return found


def _kept_values(file: Path, fingerprint: str) -> dict[str, float] | None:
    if not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["values"] if kept["fingerprint"] == fingerprint else None


def _key(items: ImageSet, at: SeedRange, wants: Sequence[Want], how: How) -> str:
    """Name of what is collected: sixteen hex digits."""
    outputs = [[*space_protocol(wanted.space).values(), wanted.moments, wanted.kept] for wanted in wants]
    facts = [items.identity, at[:3], outputs, how.batch_size, stats.BLOCK]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
