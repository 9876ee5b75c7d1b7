"""The host loop: steps, logs, checkpoints and stops of a run, the same for every method.

    state = run(experiment, config, "runs/demo")

Run folder: config.json metrics.jsonl checkpoints/ samples/. Running again with the same config goes on
from the newest checkpoint, and repeats the uninterrupted run bit by bit: the checkpoint holds the
position of the data iterator before the next batch, and the step's randomness depends on (seed, step).

The step is compiled once, its state is donated, and the host stays at most `max_in_flight` steps ahead
of the device.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from diffjax.core import names, trees
from diffjax.core.types import Batch, Metrics, Params
from diffjax.data.loader import Batches
from diffjax.runtime import checkpoint, clock, configs, guards, mesh, progress, writers
from diffjax.train.hooks import Hook, Means, RepeatFirst, sample_grid
from diffjax.train.state import TrainState, sampling_params


class Experiment(NamedTuple):
    """A run as functions.

    init() -> TrainState; traceable, since a resumed run needs its shapes only.
    step(state, frozen, batch) -> (state, metrics): pure, see `train.step`.
    frozen: parameters that are read (a teacher); {} for none.
    batches() -> data iterator with a position; arrays are (batch_size, ...), global.
    sample(params) -> uint8 (n, H, W, C), for the grids under samples/; None for none.
    hooks: further periodic work.
    warning() -> what a new run should be told before it starts, "" for nothing; it may compute for a while.
    tables() -> further tables of the run's report, name -> rows, once it has ended.
    """

    init: Callable[[], TrainState]
    step: Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
    frozen: Params
    batches: Callable[[], Batches]
    batch_size: int
    sample: Callable[[Params], Any | None] | None = None
    hooks: Sequence[Hook] = ()
    warning: Callable[[], str] = lambda: ""
    tables: Callable[[], Mapping[str, Sequence[Mapping[str, Any]]]] = dict


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `train` of a config. In images: total_images, rounded up to whole steps.

    0 turns off checkpoint_every_steps, checkpoint_every_minutes, sample_every_steps, keep_every_steps
    (checkpoints at its multiples are kept for good) and stall_minutes (without a step, the stacks are
    printed). num_devices 0: all. writers: "tensorboard", "wandb". overfit_one_batch: the first batch for
    ever. The last state is always saved.
    """

    batch_size: int
    total_images: int
    log_every_steps: int = 100
    checkpoint_every_steps: int = 1000
    checkpoint_every_minutes: float = 10.0
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    sample_every_steps: int = 0
    stall_minutes: float = 10.0
    max_in_flight: int = 2
    num_devices: int = 0
    writers: Sequence[str] = ()
    overfit_one_batch: bool = False

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Self:
        """Raises ValueError for an unknown key (with the nearest one) or a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in section:
            if key not in known:
                raise ValueError(f"unknown key train.{key}; {names.nearest(key, known)}")
        missing = [name for name in ("batch_size", "total_images") if name not in section]
        if missing:
            raise ValueError(f"the section train lacks {missing}: set --config.train.{missing[0]}=...")
        settings = cls(**section)
        for name in ("batch_size", "total_images", "log_every_steps", "keep_checkpoints"):
            if getattr(settings, name) < 1:
                raise ValueError(f"found train.{name} = {getattr(settings, name)}: use 1 or more")
        for name in known:
            value = getattr(settings, name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"found train.{name} = {value}: use 0 or more")
        return settings

    @property
    def total_steps(self) -> int:
        """Steps that show at least `total_images` images."""
        return -(-self.total_images // self.batch_size)


def run(experiment: Experiment, config: Mapping[str, Any], workdir: str | Path) -> TrainState:
    """Train until `config.train.total_images`, from the newest checkpoint where there is one.

    Returns the last state. Raises configs.ConfigChangedError for the folder of another config,
    checkpoint.CheckpointError (see there), guards.NonFiniteError (nothing non-finite is saved),
    guards.Preempted after SIGTERM or SIGINT (saved; ends the process with code 75).
    """
    config, workdir = configs.to_plain(config), Path(workdir)
    settings = Settings.from_config(config["train"])
    if settings.batch_size != experiment.batch_size:
        raise ValueError(
            f"the experiment has batches of {experiment.batch_size}, the config of {settings.batch_size}: build "
            "it from this config"
        )
    devices = mesh.make_mesh(settings.num_devices or None)
    mesh.check_batch_size(settings.batch_size, devices)
    abstract = _abstract(experiment, devices)
    workdir.mkdir(parents=True, exist_ok=True)
    saved = configs.read(workdir)
    if saved is not None:
        configs.check(saved, config, str(workdir / configs.FILE_NAME))
    checkpoint.check_space(workdir, abstract)
    restored = checkpoint.read_newest(workdir, abstract, config, _say)
    configs.write(workdir, config)
    return _train(experiment, settings, config, workdir, devices, restored)


def _train(
    experiment: Experiment,
    settings: Settings,
    config: Mapping[str, Any],
    workdir: Path,
    devices: jax.sharding.Mesh,
    restored: checkpoint.Restored | None,
) -> TrainState:
    step = restored.step if restored else 0
    state = restored.state if restored else _placed(experiment.init(), devices)
    batches = experiment.batches()
    if settings.overfit_one_batch:
        batches = RepeatFirst(batches)
    if restored:
        batches.set_state(restored.run["iterator"])
        _say(f"resumed from step {step:,} of {settings.total_steps:,} in {workdir}")
    loop = restored.run["loop"] if restored else {}
    paths = trees.paths(state.method.params)
    with contextlib.ExitStack() as stack:
        session = _Session(
            settings=settings,
            compiled=_compiled(experiment, devices),
            frozen=jax.device_put(experiment.frozen, mesh.replicated(devices)),
            batches=batches,
            batch_sharding=mesh.batch_sharding(devices),
            hooks=_hooks(experiment, settings, workdir),
            in_flight=guards.InFlight(settings.max_in_flight, paths),
            means=Means(loop.get("means")),
            clock=clock.Clock(loop.get("clock")),
            checkpoints=stack.enter_context(_checkpoints(settings, config, workdir)),
            log=stack.enter_context(writers.Writers(workdir, settings.writers, step, config)),
            bar=stack.enter_context(_bar(settings, step)),
            watchdog=stack.enter_context(guards.Watchdog(60 * settings.stall_minutes)),
            compilations=stack.enter_context(guards.CompileCounter()),
            stop=stack.enter_context(guards.StopSignal()),
        )
        return session.train(step, state)


def _hooks(experiment: Experiment, settings: Settings, workdir: Path) -> list[Hook]:
    if experiment.sample is None:
        return list(experiment.hooks)
    return [sample_grid(workdir, experiment.sample, settings.sample_every_steps), *experiment.hooks]


def _checkpoints(settings: Settings, config: Mapping[str, Any], workdir: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(
        workdir, config, keep_last=settings.keep_checkpoints, keep_every_steps=settings.keep_every_steps
    )


def _bar(settings: Settings, step: int) -> progress.Progress:
    return progress.Progress(settings.total_steps * settings.batch_size, step * settings.batch_size)


@dataclasses.dataclass
class _Session:
    """One process's share of a run: what the loop needs besides the state."""

    settings: Settings
    compiled: Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
    frozen: Params
    batches: Batches
    batch_sharding: jax.sharding.Sharding
    hooks: Sequence[Hook]
    in_flight: guards.InFlight
    means: Means
    clock: clock.Clock
    checkpoints: checkpoint.Checkpoints
    log: writers.Writers
    bar: progress.Progress
    watchdog: guards.Watchdog
    compilations: guards.CompileCounter
    stop: guards.StopSignal
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    expected_compilations: int = 1

    def train(self, step: int, state: TrainState) -> TrainState:
        """Steps from `step` to the end; saves the last state."""
        while step < self.settings.total_steps:
            self._end_if_stopped(step, state)
            batch = self._draw(step)
            with self.clock.account("train"):
                state, metrics = self.compiled(state, self.frozen, batch)
                step += 1
                done = self.in_flight.push(step, metrics)
            self._record(done)
            self._after(step, state)
        self._settle()
        if self.means.count:
            self._write(step, self.means.mean(), partial=True)
        self._save(step, state)
        self.checkpoints.close()
        return state

    def _draw(self, step: int) -> Batch:
        with self.clock.account("data"):
            try:
                batch = next(self.batches)
            except StopIteration as error:
                raise RuntimeError(
                    f"the data ended after step {step} of {self.settings.total_steps}: let the iterator repeat, or "
                    f"set --config.train.total_images={step * self.settings.batch_size}"
                ) from error
            return jax.device_put(dict(batch), self.batch_sharding)

    def _after(self, step: int, state: TrainState) -> None:
        """Periodic work of a step boundary: hooks before the checkpoint, so that their lines are in the log."""
        self.watchdog.beat()
        self.bar.update(step * self.settings.batch_size)
        self.checkpoints.check()
        due = [hook for hook in self.hooks if hook.due(step)]
        if due:
            self._settle()
        for hook in due:
            with self.clock.account("hooks"):
                metrics = hook.call(step, step * self.settings.batch_size, sampling_params(state))
            if metrics:
                self._write(step, metrics)
            self.watchdog.beat()
        every, minutes = self.settings.checkpoint_every_steps, self.settings.checkpoint_every_minutes
        by_time = minutes and time.monotonic() - self.saved_at >= 60 * minutes
        if by_time or (every and step % every == 0):
            self._save(step, state)

    def _end_if_stopped(self, step: int, state: TrainState) -> None:
        name = self.stop.received
        if name is None:
            return
        self._save(step, state)
        self.checkpoints.close()
        self.bar.say(f"{name}: saved step {step:,} of {self.settings.total_steps:,}; run the same command to go on")
        raise guards.Preempted(step, name)

    def _save(self, step: int, state: TrainState) -> None:
        self._settle()
        if self.checkpoints.last_step == step:
            return
        with self.clock.account("checkpoint"):
            loop = {"means": self.means.state(), "clock": self.clock.state()}
            self.checkpoints.save(step, state, self.batches.get_state(), loop)
        self.saved_at = time.monotonic()

    def _settle(self) -> None:
        """Wait for the steps in flight and log them: only a state known to be finite is used further."""
        with self.clock.account("train"):
            done = self.in_flight.drain()
        self._record(done)

    def _record(self, done: list[tuple[int, dict[str, float]]]) -> None:
        for step, metrics in done:
            self.means.add(metrics)
            if step % self.settings.log_every_steps == 0:
                self._write(step, self.means.mean())
                self.means.clear()
                self._warn_of_compilations(step)

    def _write(self, step: int, metrics: Mapping[str, float], partial: bool = False) -> None:
        times = {f"{name}_s": seconds for name, seconds in self.clock.state().items()}
        times["images_per_s"] = self.bar.images_per_s
        self.log.write(step, step * self.settings.batch_size, metrics, times, partial)

    def _warn_of_compilations(self, step: int) -> None:
        found = self.compilations.count(_STEP_NAME)
        if found > self.expected_compilations:
            self.expected_compilations = found
            self.bar.say(
                f"WARNING: the train step was compiled {found} times by step {step:,}: batches must keep their shapes "
                "and dtypes"
            )


def _compiled(
    experiment: Experiment, devices: jax.sharding.Mesh
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    everywhere = mesh.replicated(devices)

    # the name under which compilations are counted
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(everywhere, everywhere))
    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        return experiment.step(state, frozen, batch)

    return train_step


def _abstract(experiment: Experiment, devices: jax.sharding.Mesh) -> TrainState:
    everywhere = mesh.replicated(devices)
    shapes = jax.eval_shape(experiment.init)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)


def _placed(state: TrainState, devices: jax.sharding.Mesh) -> TrainState:
    """Own copies on every device: the step gives the state's memory away, and a student may start as its teacher.

    Weak types end here; the first step would return strong ones and the second compile again.
    """
    copies = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=leaf.dtype, copy=True), state)
    return jax.device_put(copies, mesh.replicated(devices), may_alias=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_STEP_NAME = "train_step"
