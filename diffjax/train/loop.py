"""The host loop: steps, logs, checkpoints and stops of a run, the same for every method.

    state = run(experiment, config, "runs/demo")

Run folder: config.json metrics.jsonl checkpoints/ samples/. Running again with the same config goes on
from the newest checkpoint, and repeats the uninterrupted run bit by bit: the checkpoint holds the
position of the data iterator before the next batch, and the step's randomness depends on (seed, step).

The step is compiled once, its state is donated, and the host stays at most `max_in_flight` steps ahead
of the device. Several processes run the same loop, each with its rows of every batch; the first one writes.
"""

import collections
import contextlib
import dataclasses
import functools
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core import trees
from diffjax.core.types import Batch, Metrics, Params
from diffjax.data.loader import Batches
from diffjax.runtime import agreement, checkpoint, checkpoint_read, clock, configs, distributed, guards, mesh, profile, progress, writers
from diffjax.train.hooks import Hook, Means, RepeatFirst, sample_grid
from diffjax.train.settings import Settings
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


def run(
    experiment: Experiment, config: Mapping[str, Any], workdir: str | Path, profile_steps: int = 0
) -> TrainState:
    """Train until `config.train.total_images`, from the newest checkpoint where there is one.

    Returns the last state. Raises configs.ConfigChangedError for the folder of another config,
    checkpoint.CheckpointError (see there), guards.NonFiniteError (nothing non-finite is saved),
    guards.Preempted after SIGTERM or SIGINT (saved; ends the process with code 75).
    """
    started = time.monotonic()
    config, workdir = configs.to_plain(config), Path(workdir)
    settings = Settings.from_config(config["train"])
    if settings.batch_size != experiment.batch_size:
        raise ValueError(
            f"the experiment has batches of {experiment.batch_size}, the config of {settings.batch_size}: build "
            "it from this config"
        )
    devices = mesh.make_mesh(settings.num_devices or None, layout=settings.mesh)
    mesh.check_batch_size(settings.batch_size, devices)
    abstract = abstract_state(experiment, devices)
    workdir.mkdir(parents=True, exist_ok=True)
    saved = configs.read(workdir)
    if saved is not None:
        configs.check(saved, config, str(workdir / configs.FILE_NAME))
        checkpoint.check_moved(workdir, saved, config)
    checkpoint.check_place(workdir, config, abstract)
    restored = checkpoint_read.read_newest(workdir, abstract, config, _say)
    if jax.process_index() == 0:
        configs.write(workdir, config)
    return _train(experiment, settings, config, workdir, devices, restored, started, profile_steps)


def _train(
    experiment: Experiment,
    settings: Settings,
    config: Mapping[str, Any],
    workdir: Path,
    devices: jax.sharding.Mesh,
    restored: checkpoint_read.Restored | None,
    started: float,
    profile_steps: int,
) -> TrainState:
    step = restored.step if restored else 0
    state = restored.state if restored else first_state(experiment, devices)
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
            compiled=train_step(experiment, devices),
            frozen=mesh.place(experiment.frozen, mesh.shardings(experiment.frozen, devices)),
            batches=batches,
            devices=devices,
            hooks=_hooks(experiment, settings, workdir),
            in_flight=guards.InFlight(settings.max_in_flight, paths),
            means=Means(loop.get("means")),
            clock=clock.Clock(clock.carried_over(workdir, loop.get("clock"), _say), started),
            workdir=workdir,
            checkpoints=stack.enter_context(_checkpoints(settings, config, workdir)),
            log=stack.enter_context(_log(settings, workdir, step, config)),
            bar=stack.enter_context(_bar(settings, step)),
            watchdog=stack.enter_context(guards.Watchdog(60 * settings.stall_minutes, beside=distributed.table)),
            compilations=stack.enter_context(guards.CompileCounter()),
            stop=stack.enter_context(guards.StopSignal()),
            profile=stack.enter_context(profile.Profile(workdir, profile_steps, _say)),
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


def _log(settings: Settings, workdir: Path, step: int, config: Mapping[str, Any]) -> writers.Writers:
    return writers.Writers(workdir, settings.writers, step, config, is_first=jax.process_index() == 0)


def _bar(settings: Settings, step: int) -> progress.Progress:
    images = settings.total_steps * settings.batch_size, step * settings.batch_size
    return progress.Progress(*images, is_silent=jax.process_index() > 0)


@dataclasses.dataclass
class _Session:
    """One process's share of a run: what the loop needs besides the state."""

    settings: Settings
    compiled: Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
    frozen: Params
    batches: Batches
    devices: jax.sharding.Mesh
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
    workdir: Path
    profile: profile.Profile
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    heard: set[str] = dataclasses.field(default_factory=set)
    recent: collections.deque[Batch] = dataclasses.field(init=False)
    expected_compilations: int = 1

    def __post_init__(self) -> None:
        self.recent = collections.deque(maxlen=self.settings.max_in_flight + 1)

    def train(self, step: int, state: TrainState) -> TrainState:
        """Steps from `step` to the end; saves the last state."""
        while step < self.settings.total_steps:
            self._end_if_stopped(step, state)
            batch = self._draw(step)
            with self.clock.account("train" if self.compilations.count(_STEP_NAME) else "compile"), self._blame():
                state, metrics = self.compiled(state, self.frozen, batch)
                step += 1
                done = self.in_flight.push(step, metrics)
            self._record(done)
            self.profile.step(step, functools.partial(self._wait, state))
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
            return self._placed(batch)

    def _placed(self, batch: Batch) -> Batch:
        """On the devices; of several processes each gives its rows, and its wishes."""
        where, size = mesh.batch_sharding(self.devices), self.settings.batch_size
        if not self.is_one_of_several:
            return jax.device_put(dict(batch), where)
        own = {name: np.asarray(rows) for name, rows in batch.items()}
        self.recent.append(own)
        placed = {
            name: jax.make_array_from_process_local_data(where, rows, (size, *rows.shape[1:])) for name, rows in own.items()
        }
        return placed | {agreement.BATCH_KEY: agreement.ballot(self.devices, self._own_wishes())}

    @property
    def is_one_of_several(self) -> bool:
        """Whether other processes have to do the same."""
        return jax.process_count() > 1

    def _own_wishes(self) -> set[str]:
        minutes = self.settings.checkpoint_every_minutes
        by_time = minutes and time.monotonic() - self.saved_at >= 60 * minutes
        return {kind for kind, wished in zip(agreement.KINDS, (self.stop.received, by_time), strict=True) if wished}

    def _agreed(self) -> set[str]:
        """What is to be done at this step: a process alone does as it wishes, several what came back with the metrics."""
        return self.heard if self.is_one_of_several else self._own_wishes()

    def _after(self, step: int, state: TrainState) -> None:
        """Periodic work of a step boundary: hooks before the checkpoint, so that their lines are in the log."""
        self.watchdog.beat()
        distributed.beat(step)
        self.bar.update(step * self.settings.batch_size)
        self.checkpoints.check()
        if self.checkpoints.last_step is not None and not self.checkpoints.is_writing:
            distributed.saved(self.checkpoints.last_step)
        due = [hook for hook in self.hooks if hook.due(step)]
        if due:
            self._settle()
            params = mesh.local_copy(sampling_params(state))
        for hook in due:
            with self.clock.account("hooks"):
                metrics = hook.call(step, step * self.settings.batch_size, params)
            if metrics:
                self._write(step, metrics)
            self.watchdog.beat()
        every = self.settings.checkpoint_every_steps
        if "save" in self._agreed() or (every and step % every == 0):
            self._save(step, state)

    def _end_if_stopped(self, step: int, state: TrainState) -> None:
        if "stop" not in self._agreed():
            return
        name = self.stop.received or "a signal to another process"
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
        self.saved_at, self.heard = time.monotonic(), self.heard - {"save"}
        self._keep_accounts()

    def _keep_accounts(self) -> None:
        if jax.process_index() == 0:
            self.clock.write(self.workdir)

    def _settle(self) -> None:
        """Wait for the steps in flight and log them: only a state known to be finite is used further."""
        with self.clock.account("train"), self._blame():
            done = self.in_flight.drain()
        self._record(done)

    def _wait(self, state: TrainState) -> None:
        """For the steps in flight, of one process alone: what they say is still heard where the others hear it."""
        with self.clock.account("train"):
            jax.block_until_ready(state)

    @contextlib.contextmanager
    def _blame(self) -> Iterator[None]:
        """Of several processes each says whether what it fed in was finite: a sum over all does not tell whose was not."""
        try:
            yield
        except guards.NonFiniteError as error:
            if not self.is_one_of_several:
                raise
            bad = {name for batch in self.recent for name, rows in batch.items() if not np.isfinite(rows).all()}
            found = f"its own part of the last batches holds no number in {sorted(bad)}" if bad else "its own data is finite"
            where = f"process {jax.process_index()} of {jax.process_count()} ({socket.gethostname()})"
            raise guards.NonFiniteError(f"{error}. On {where}: {found}") from error

    def _record(self, done: list[tuple[int, dict[str, float]]]) -> None:
        for step, metrics in done:
            self.heard |= agreement.take(metrics)
            self.means.add(metrics)
            if step % self.settings.log_every_steps == 0:
                self._write(step, self.means.mean())
                self.means.clear()
                self._warn_of_compilations(step)

    def _write(self, step: int, metrics: Mapping[str, float], partial: bool = False) -> None:
        times = {f"{name}_s": seconds for name, seconds in self.clock.state().items()}
        times["images_per_s"] = self.bar.images_per_s
        times["goodput"] = self.clock.goodput
        self._keep_accounts()
        self.log.write(step, step * self.settings.batch_size, metrics, times, partial)

    def _warn_of_compilations(self, step: int) -> None:
        found = self.compilations.count(_STEP_NAME)
        if found > self.expected_compilations:
            self.expected_compilations = found
            self.bar.say(
                f"WARNING: the train step was compiled {found} times by step {step:,}: batches must keep their shapes "
                "and dtypes"
            )


def train_step(
    experiment: Experiment, devices: jax.sharding.Mesh
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The program of a run's steps on a mesh. It takes a state and parameters laid out by `mesh.shardings`, batches by
    `mesh.batch_sharding`; the state is donated, metrics are everywhere."""
    states = mesh.shardings(jax.eval_shape(experiment.init), devices)

    # the name under which compilations are counted
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(states, mesh.replicated(devices)))
    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        rest = {name: value for name, value in batch.items() if name != agreement.BATCH_KEY}
        with jax.sharding.use_abstract_mesh(devices.abstract_mesh):  # which `core.sharding` and attention read
            state, metrics = experiment.step(state, frozen, rest)
        return state, metrics if len(rest) == len(batch) else metrics | agreement.count(batch[agreement.BATCH_KEY])

    return train_step


def abstract_state(experiment: Experiment, devices: jax.sharding.Mesh) -> TrainState:
    """Shapes and types of the state, and where its arrays lie on a mesh."""
    shapes = jax.eval_shape(experiment.init)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, mesh.shardings(shapes, devices)
    )


def first_state(experiment: Experiment, devices: jax.sharding.Mesh) -> TrainState:
    """Own copies on the devices: the step gives the state's memory away, and a student may start as its teacher.

    Weak types end here; the first step would return strong ones and the second compile again.
    """
    state = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=leaf.dtype, copy=True), experiment.init())
    return mesh.place(state, mesh.shardings(state, devices))


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


_STEP_NAME = "train_step"
