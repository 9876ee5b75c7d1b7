"""One training step as a pure function of (state, frozen parameters, batch)."""

from collections.abc import Callable

from diffjax.core import microbatches, rng
from diffjax.core.types import Array, Batch, Method, Metrics, Params
from diffjax.train import ema
from diffjax.train.state import TrainState


def make_train_step(
    method: Method, decay: Callable[[Array], Array] | None = None, parts: int = 0
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The step that `jax.jit(step, donate_argnums=0)` compiles once for a run.

    Its key is made of (seed, step), both in the state, so it repeats exactly after a restart. `decay`
    (see `ema.make_decay`) maps the iteration to the average's beta; None keeps no average. `parts`: of the batch, see
    `core.microbatches`. Raises ValueError, at
    the first call, for a state that has an average where `decay` is None, or the reverse.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_average(state, decay)
        key = rng.stream(state.seed, "train", state.step)
        with microbatches.of(parts):
            method_state, metrics = method.step(state.method, frozen, batch, key, state.step)
        ema_params = state.ema_params
        if decay is not None:
            ema_params = ema.update(ema_params, method_state.params, decay(state.step))
        return TrainState(state.step + 1, state.seed, method_state, ema_params), metrics

    return step


def _check_average(state: TrainState, decay: Callable[[Array], Array] | None) -> None:
    if bool(state.ema_params) != (decay is not None):
        raise ValueError(
            f"the state {'has an' if state.ema_params else 'has no'} average of the weights, the step "
            f"{'none' if decay is None else 'one'}: use state.create(..., averaged=decay is not None)"
        )
