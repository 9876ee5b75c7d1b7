"""What is done with the weights along a training: grids of samples, and metrics (section `evaluate`) in the log.

    config.evaluate = {"every_steps": 1000, "metric": "frechet", "features": "pixels", "num_samples": 2000}

every_steps: 0 = never. metric, features: of `measures.MEASURES` and `feature_spaces.SPACES`; weights, resize: of the
feature network, see `feature_spaces.load`. reference: a file of statistics; "" = all images that are trained on, whose
statistics are taken before the first evaluation of each start (`diffjax.cli.prepare --stats` makes a file).
num_samples: of seed config.seed, the same noise each time; batch_size: of them at once on each device. options: of the
metric.

The log's names are metric_features@protocol, so that values of different protocols never make one curve; the table
`protocols` of the run's report writes each protocol out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.build import companions, evaluation, feature_spaces, image_sets, measures, parts, runs, streams
from diffjax.build.video_networks import FIRST_FRAME, first_frames, spread
from diffjax.core import names
from diffjax.core.types import Array, Params
from diffjax.metrics import protocol
from diffjax.sampling import generate
from diffjax.train.hooks import Hook

_SAMPLES_SHOWN = 36  # images of a sample grid during training
_PICTURES_SHOWN = 8  # of a network on latents, whose pictures are large; videos


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `evaluate` of a config, see the module."""

    every_steps: int = 0
    metric: str = "frechet"
    features: str = "pixels"
    num_samples: int = 2000
    batch_size: int = 250
    reference: str = ""
    weights: str = ""
    resize: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Evaluation(NamedTuple):
    """hook: for the loop. protocols(): rows of the run's report, which name what the log's values were measured by."""

    hook: Hook
    protocols: Callable[[], list[dict[str, Any]]]


def grid(config: ConfigDict, made: parts.Parts) -> Callable[[Params], np.ndarray]:
    """Parameters to the uint8 images or videos of a sample grid, the same seeds each time; of texts those that are held
    out, of pictures to go on from those of the data."""
    is_latent = _autoencoder(config) is not None
    count = _PICTURES_SHOWN if is_latent or made.data.num_frames else _SAMPLES_SHOWN
    sample = _sampler(config, made, count, count, generate.to_uint8)
    return lambda params: sample(params, range(count))


def evaluation_of(config: ConfigDict, made: parts.Parts) -> Evaluation | None:
    """What the section `evaluate` asks for; None where it is absent or off. Opens the feature network.

    Raises ValueError for unknown keys and names, a metric that the space has not, a reference that does not serve it,
    images that do not fit, and methods that draw no samples; FileNotFoundError for absent weights.
    """
    section = config.get("evaluate", ConfigDict()).to_dict()
    names.check_options(Settings, section, "config.evaluate")
    settings = Settings(**section)
    if not settings.every_steps:
        return None
    _check(settings, config, made)
    space = feature_spaces.load(settings.features, settings.weights, settings.resize)
    how = streams.How(streams.local_mesh(config.train.get("num_devices", 0)), settings.batch_size)
    at_once = settings.batch_size * how.mesh.size
    sample = _sampler(config, made, settings.num_samples, at_once, lambda images: images, how.mesh)
    items = _items(config, made, settings)
    request = _request(config, settings, space, items, how)

    def measure(step: int, images_seen: int, params: Params) -> dict[str, float]:
        del step, images_seen
        own = items._replace(read=lambda seed, ids: sample(params, ids))
        ranges = evaluation.seed_ranges(own, [config.seed], settings.num_samples)
        results = evaluation.evaluate(own, ranges, [request()], how)
        return {_name(result.protocol): result.value for result in results}

    def protocols() -> list[dict[str, Any]]:
        found = evaluation.protocols_of([request()], settings.num_samples).values()
        return [{"values": _name(own), **protocol.row(own)} for own in found]

    return Evaluation(Hook(settings.every_steps, measure), protocols)


def _name(measured_by: protocol.Protocol) -> str:
    return f"{measured_by.metric}_{measured_by.features}@{protocol.identity(measured_by)}"


def _check(settings: Settings, config: ConfigDict, made: parts.Parts) -> None:
    if settings.every_steps < 0 or settings.num_samples < 2 or settings.batch_size < 1:
        raise ValueError(
            f"found evaluate.every_steps={settings.every_steps}, num_samples={settings.num_samples}, batch_size="
            f"{settings.batch_size}: expected 0 (off) or more, 2 or more, which a covariance needs, and 1 or more"
        )
    if made.plan is None:
        name = config.method.name
        raise ValueError(f"config.evaluate measures samples, and method {name!r} draws none: leave it out")


def _items(config: ConfigDict, made: parts.Parts, settings: Settings) -> image_sets.ImageSet:
    """The samples, whose `read` depends on the weights and is put in when they are there."""
    vae, texts = _autoencoder(config), _texts(config, settings.num_samples)
    side = made.data.image_size * (1 if vae is None else vae.factor)
    shape = made.data.shape if vae is None else (side, side, vae.channels)
    return image_sets.ImageSet("samples of this training", None, 0, shape, {}, seeded=True, texts=texts)


def _request(
    config: ConfigDict,
    settings: Settings,
    space: feature_spaces.FeatureSpace,
    items: image_sets.ImageSet,
    how: streams.How,
) -> Callable[[], evaluation.Request]:
    """What makes the request, with the statistics of the data where no file has them, once. Checked as far as it can be
    before these are taken."""
    metrics = (settings.metric,)
    request = evaluation.Request(space, metrics, None, {settings.metric: settings.options} if settings.options else {})
    if settings.reference or not protocol.metric_of(settings.metric).reference:
        real = evaluation.open_reference(settings.reference, space) if settings.reference else None
        request = request._replace(reference=real)
        evaluation.check_request(request, items)
        return lambda: request
    measure = names.lookup(measures.MEASURES, settings.metric, "metric")
    names.check_options(measure.compute, settings.options, f"the metric {settings.metric!r}")
    gives = protocol.metric_of(settings.metric).gives or metrics
    protocol.title(gives[0], space.name)
    feature_spaces.check_images(np.zeros((1, *items.shape), np.uint8), space)
    data = image_sets.of_data(config.data)
    return functools.cache(
        lambda: request._replace(reference=evaluation.make_reference(data, space, metrics, how, None))
    )


def _sampler(
    config: ConfigDict, made: parts.Parts, count: int, batch_size: int, finish: Callable[[Array], Array],
    devices: Mesh | None = None,
) -> Callable[[Params, Sequence[int]], np.ndarray]:  # fmt: skip
    """(parameters, ids) -> finish(images in about [-1, 1]) of these ids, below `count`, seed config.seed."""
    beside, vae = parts.beside_data(config), _autoencoder(config)
    pixels = made.data.image_size * (1 if vae is None else beside.factor)
    cond = companions.metadata(config.model, pixels, count)
    if beside is not None:
        if texts := _texts(config, count):
            cond |= companions.conditions(beside, texts, "", count)
        cond |= companions.controls(config.model, pixels, count)
    if config.model.name in FIRST_FRAME:
        source = parts.source_of(config.data)
        frames = first_frames(source, spread(source, count))
        cond["first_frame"] = frames * made.data.scale

    def finish_pixels(images: Array) -> Array:
        return finish(images / made.data.scale)

    def sample(params: Params, ids: Sequence[int]) -> np.ndarray:
        images = generate.generate(
            made.denoise,
            made.with_frozen(params),
            made.plan,
            ids,
            made.data.shape,
            batch_size=batch_size,
            seed=config.seed,
            cond={name: value if np.ndim(value) == 0 else value[np.asarray(ids)] for name, value in cond.items()},
            num_classes=made.data.num_classes or None,
            finish=finish_pixels if vae is None else None,
            sampler=runs.sampler_for(made.plan, made.sampler),
            mesh=devices,
        )
        return images if vae is None else np.asarray(finish(beside.pictures(images)))

    return sample


def _autoencoder(config: ConfigDict) -> companions.Autoencoder | None:
    """Of a network on latents."""
    beside = parts.beside_data(config)
    return None if beside is None else beside.autoencoder


def _texts(config: ConfigDict, count: int) -> list[str]:
    """`count` texts that are held out, or else of the data, again from the first where there are fewer; [] without a
    text encoder."""
    if not parts.takes_texts(config):
        return []
    source = parts.source_of(config.data)
    held_out = getattr(source, "held_out", None)
    caption = getattr(source, "caption", lambda i: str(source[i]["caption"]))
    texts = held_out or [caption(i) for i in range(min(count, len(source)))]
    return [texts[i % len(texts)] for i in range(count)]
