"""EMD from its config: networks, chain, the options that make its rivals of it (see `methods.emd`)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.build import networks, parts, runs
from diffjax.build import step_sizes as step_size_check
from diffjax.core import guidance
from diffjax.core.types import Array, Cond, Denoiser, Params
from diffjax.data import sources
from diffjax.methods import density_ratio, emd
from diffjax.methods.emd_chain import StepSizes
from diffjax.methods.update import Update
from diffjax.models import ratio_head
from diffjax.nn import functional

# keys of a `method` section that are no fields of emd.Settings
_APART = (
    "noise_step", "latent_step", "guidance_scale", "score_optim", "regression", "perceptual", "ratio_optim",
    "check_step_sizes",
)  # fmt: skip


def emd_parts(config: ConfigDict) -> parts.Parts:
    """The entry "emd" of METHODS."""
    teacher = parts.load_teacher(config)
    if teacher.config.method.get("name") != "edm":
        raise ValueError(
            f"EMD needs a teacher that denoises at every noise level, and {config.method.teacher} is a student of method "
            f"{teacher.config.method.get('name')!r}: give the run that it was distilled from"
        )
    chosen, rates = settings(config, teacher.data), step_sizes(config.method)
    denoise, init_params = parts.student(config, teacher)
    guided = guided_teacher(config, teacher)
    regression, distance_params = _regression(config)
    ratio = _ratio(config, teacher) if "ratio_optim" in config.method else None
    method = emd.make(
        chosen, guided, denoise, Update(*parts.optimizer(config)),
        Update(*parts.optimizer(config, config.method.get("score_optim"))), regression=regression, ratio=ratio,
    )  # fmt: skip
    rates = jax.tree.map(jnp.float32, rates)
    plan = runs.student_plan(config.method)
    return parts.Parts(
        method=method,
        init_params=init_params,
        frozen=emd.Frozen(teacher.params, rates, distance_params),
        batches=parts.prompts(config) if ratio is None else parts.batches(config),
        denoise=runs.sampling_denoiser(runs.Run(config, denoise, {}, 0, teacher.data), plan),
        data=teacher.data,
        plan=plan,
        warning=lambda: (
            step_size_check.warning(chosen, guided, denoise, teacher.params, init_params(), rates)
            if config.method.get("check_step_sizes", True) and not parts.takes_texts(config) else ""
        ),
    )  # fmt: skip


def settings(config: ConfigDict, data: sources.DataShape) -> emd.Settings:
    """The settings of a `method` section for these images. Raises ValueError for unknown keys."""
    return emd.Settings(
        **parts.settings_options(config, emd.Settings, *_APART), batch_size=config.train.batch_size,
        image_shape=data.shape, num_classes=data.num_classes,
    )  # fmt: skip


def step_sizes(
    method: Mapping[str, Any], noise_step: float | None = None, latent_step: float | None = None
) -> StepSizes:
    """Those of a `method` section, but for those given. Raises ValueError for a negative one."""
    given, defaults = {"noise_step": noise_step, "latent_step": latent_step}, StepSizes()
    found = [
        float(method.get(name, default) if value is None else value)
        for (name, value), default in zip(given.items(), defaults, strict=True)
    ]
    for name, value in zip(given, found, strict=True):
        if not value >= 0:
            raise ValueError(f"{name} is a rate and must not be negative, found {value}; published: {StepSizes()}")
    return StepSizes(*found)


def guided_teacher(config: ConfigDict, teacher: runs.Run) -> Denoiser:
    """The teacher's network, guided at config.method.guidance_scale where that is set."""
    scale = config.method.get("guidance_scale", 1.0)
    if scale == 1.0:
        return teacher.denoise
    if parts.takes_texts(config):
        return guidance.cfg(teacher.denoise, scale, guidance.negative)
    runs.check_guidance(teacher, scale)
    return guidance.cfg(teacher.denoise, scale, runs.uncond(teacher.data.num_classes))


def _regression(config: ConfigDict) -> tuple[emd.Regression | None, Params]:
    """(term, parameters of its distance) of the section method.regression: weight, and the keys of `sample`."""
    options = config.method.get("regression", ConfigDict()).to_dict()
    weight = options.pop("weight", 0.0)
    if not weight:
        return None, {}
    distance, params = parts.perceptual(config)
    chosen = {} if distance is None else {"distance": distance}
    return emd.Regression(runs.plan(options), weight, **chosen), params


def _ratio(config: ConfigDict, teacher: runs.Run) -> density_ratio.Ratio:
    """The density ratio read off the teacher's bottleneck, trained as config.method.ratio_optim says."""
    features, width = networks.features(teacher.config.model, teacher.data)
    head, init = functional.functionalize(lambda rngs: ratio_head.RatioHead(width, rngs=rngs))
    prepare = parts.prepare(config)

    def logit(params: Params, teacher_params: Params, x: Array, sigma: Array, cond: Cond) -> Array:
        return head(params, jax.lax.stop_gradient(features(teacher_params, x, sigma, cond)))

    return density_ratio.Ratio(logit, init, Update(*parts.optimizer(config, config.method.ratio_optim)), prepare)
