"""What one training iteration costs, as the compiler counts it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.build import methods, networks, runs


class Cost(NamedTuple):
    """forwards: floating-point operations in forward passes of the trained network on the same batch.
    peak_bytes: the memory that the compiled iteration works in, without state, teacher and batch."""

    forwards: float
    peak_bytes: int


def emd_iteration(config: ConfigDict) -> Cost:
    """The cost of `method.step` of a config of EMD, compiled twice: the compiler counts a loop's body once, so the
    operations are those of the program without loops, the memory that of the program that runs."""
    config = runs.resolve(config)
    config.method.log_raw_gradient = False  # a diagnostic
    unrolled = ConfigDict(config.to_dict())
    unrolled.method.unroll = max(config.method.get("langevin_steps", 16), config.method.get("score_updates", 1))
    peak = _compiled_step(config).memory_analysis().temp_size_in_bytes
    return Cost(_flops(_compiled_step(unrolled)) / _forward_flops(config), int(peak))


def _compiled_step(config: ConfigDict) -> jax.stages.Compiled:
    parts = methods.METHODS[config.method.name](config)
    state = jax.eval_shape(lambda: parts.method.init(parts.init_params()))
    key = jax.eval_shape(lambda: jax.random.key(0))
    iteration = jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.jit(parts.method.step, donate_argnums=0)
    return step.lower(state, parts.frozen, {}, key, iteration).compile()


def _forward_flops(config: ConfigDict) -> float:
    shape, num = networks.data_shape(config.data), config.train.batch_size
    denoise, init = networks.denoiser(config.model, shape)
    x, sigma = jax.ShapeDtypeStruct((num, *shape.shape), jnp.float32), jax.ShapeDtypeStruct((num,), jnp.float32)
    cond = {"label": jax.ShapeDtypeStruct((num,), jnp.int32)} if shape.num_classes else {}
    params = jax.eval_shape(init, jax.random.key(0))
    return _flops(jax.jit(lambda *arguments: denoise(*arguments)).lower(params, x, sigma, cond).compile())


def _flops(program: jax.stages.Compiled) -> float:
    return program.cost_analysis()["flops"]
