"""The loop: one compilation, named failures, refused folders, periodic work."""

import errno
import json

import jax
import jax.numpy as jnp
import loop_example
import numpy as np
import pytest
from PIL import Image

from diffjax.runtime import checkpoint, checkpoint_read, configs, guards, writers
from diffjax.train import loop


def run(workdir, fields=None, poison_at=None, **train):
    config = loop_example.make_config(**train)
    return loop.run(loop_example.make_experiment(config, poison_at, **(fields or {})), config, workdir)


@pytest.mark.fast
def test_a_run_leaves_its_folder_complete(tmp_path):
    state = run(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == loop_example.make_config()
    lines = writers.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["images"]) for line in lines] == [(3, 24), (6, 48), (9, 72), (12, 96)]
    assert all(np.isfinite(line["loss"]) and line["time"]["total_s"] > 0 for line in lines)
    assert checkpoint.steps(tmp_path) == [10, 12]
    params, _, step = checkpoint_read.load_params(tmp_path)
    assert step == 12
    jax.tree.map(np.testing.assert_array_equal, params, state.ema_params)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_step_is_compiled_once_from_the_start_and_once_after_a_resume(tmp_path, num_devices):
    for images in (56, 96):
        with guards.CompileCounter() as compilations:
            run(tmp_path, total_images=images, num_devices=num_devices)
        assert compilations.count("train_step") == 1


def test_the_state_stays_whole_on_every_device_whatever_the_step_makes_of_the_batch(tmp_path):
    config = loop_example.make_config(total_images=24, num_devices=8)
    experiment = loop_example.make_experiment(config)

    def init():
        return experiment.init()._replace(ema_params={"last": jnp.zeros((8, 4, 4, 1))})

    def step(state, frozen, batch):
        new, metrics = experiment.step(state._replace(ema_params=state.method.params), frozen, batch)
        return new._replace(ema_params={"last": batch["image"]}), metrics

    with guards.CompileCounter() as compilations:
        state = loop.run(experiment._replace(init=init, step=step), config, tmp_path)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert compilations.count("train_step") == 1


def test_a_batch_that_changes_its_shape_is_reported(tmp_path, capfd):
    config = loop_example.make_config(max_in_flight=0)
    experiment = loop_example.make_experiment(config)

    class Shrinking:
        """Half a batch at step 5."""

        def __init__(self):
            self.inner, self.drawn = experiment.batches(), 0
            self.get_state = self.inner.get_state

        def __next__(self):
            self.drawn += 1
            return {"image": next(self.inner)["image"][: 4 if self.drawn == 5 else 8]}

    loop.run(experiment._replace(batches=Shrinking), config, tmp_path)
    assert "train step was compiled 2 times by step 6" in capfd.readouterr().err


@pytest.mark.parametrize("max_in_flight", [0, 2])
def test_a_non_finite_step_stops_the_run_with_names_and_is_never_saved(tmp_path, max_in_flight):
    with pytest.raises(guards.NonFiniteError) as caught:
        run(tmp_path, poison_at=9, max_in_flight=max_in_flight, checkpoint_every_steps=1, keep_checkpoints=20)
    text = str(caught.value)
    assert text.startswith("step 10: found non-finite grad_norm = nan, loss = nan")
    assert "first parameter with a non-finite gradient: in/bias" in text
    assert checkpoint.steps(tmp_path) == list(range(1, 10))
    assert [line["step"] for line in writers.read(tmp_path / "metrics.jsonl")] == [3, 6, 9]
    params, _, _ = checkpoint_read.load_params(tmp_path)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), params)))


def test_the_folder_of_another_config_is_refused_before_any_step(tmp_path):
    run(tmp_path, total_images=16)
    config = loop_example.make_config() | {"seed": 8}
    with pytest.raises(configs.ConfigChangedError, match=r"config.json.*\n  seed: 7 -> 8\n.*allow_config_change=True"):
        loop.run(loop_example.make_experiment(config), config, tmp_path)
    assert configs.read(tmp_path)["seed"] == 7
    allowed = config | {"allow_config_change": True}
    assert int(loop.run(loop_example.make_experiment(allowed), allowed, tmp_path).step) == 12
    assert configs.read(tmp_path)["seed"] == 8


def test_a_folder_without_checkpoints_still_belongs_to_its_config(tmp_path):
    configs.write(tmp_path, loop_example.make_config() | {"seed": 8})
    with pytest.raises(configs.ConfigChangedError, match="seed: 8 -> 7"):
        run(tmp_path)


def test_a_checkpoint_of_another_model_is_refused_with_names(tmp_path, monkeypatch):
    run(tmp_path, total_images=16)
    monkeypatch.setattr(loop_example, "WIDTH", 8)
    with pytest.raises(checkpoint.CheckpointError, match=r"ema_params/in/bias, expected float32\[8\]"):
        run(tmp_path)


def test_a_full_disk_stops_the_run_and_names_the_folder(tmp_path, monkeypatch):
    run(tmp_path, total_images=16)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(checkpoint.CheckpointError, match=rf"{tmp_path}/checkpoints.*No space left.*\n.*at steps \[2\]"):
        run(tmp_path)


def test_a_finished_run_returns_at_once_and_writes_nothing(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    second = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_checkpoints_by_time(tmp_path):
    # a time that has always passed: every step
    run(tmp_path, total_images=32, checkpoint_every_steps=0, checkpoint_every_minutes=1e-9, keep_checkpoints=9)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]


def test_grids_are_drawn_with_the_average_and_hooks_are_logged(tmp_path):
    seen = []

    def sample(params):
        return np.zeros((4, 8, 8, 1), np.uint8)

    def evaluate(step, images, params):
        seen.append((step, images, params["in"]["bias"].copy()))
        return {"frechet_distance": float(step)}

    state = run(tmp_path, {"sample": sample, "hooks": [loop.Hook(6, evaluate)]}, sample_every_steps=4)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{step:08d}.png" for step in (4, 8, 12)
    ]
    with Image.open(tmp_path / "samples" / "step_00000004.png") as picture:
        assert picture.size[0] > 2 * 64
    assert [entry[:2] for entry in seen] == [(6, 48), (12, 96)]
    np.testing.assert_array_equal(seen[-1][2], state.ema_params["in"]["bias"])
    logged = [line for line in writers.read(tmp_path / "metrics.jsonl") if "frechet_distance" in line]
    assert [(line["step"], line["frechet_distance"]) for line in logged] == [(6, 6.0), (12, 12.0)]


def test_a_teacher_may_share_memory_with_the_student(tmp_path):
    config = loop_example.make_config(total_images=16)
    experiment = loop_example.make_experiment(config)
    start = experiment.init()
    before = jax.tree.map(np.array, start.method.params)
    loop.run(experiment._replace(init=lambda: start, frozen={"teacher": start.method.params}), config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before, start.method.params)


def test_one_batch_is_overfitted(tmp_path):
    def losses(workdir, **train):
        run(workdir, total_images=800, log_every_steps=50, **train)
        return [line["loss"] for line in writers.read(workdir / "metrics.jsonl")]

    images = []
    config = loop_example.make_config(total_images=32, overfit_one_batch=True)
    experiment = loop_example.make_experiment(config)
    step = experiment.step

    def spy(state, frozen, batch):
        jax.debug.callback(lambda x: images.append(x.tobytes()), batch["image"])
        return step(state, frozen, batch)

    loop.run(experiment._replace(step=spy), config, tmp_path / "same")
    jax.effects_barrier()
    assert len(images) == 4 and len(set(images)) == 1
    falling = losses(tmp_path / "falling", overfit_one_batch=True)
    assert falling[-1] < falling[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"batch_size": 8, "total_images": 8, "log_evry_steps": 1}, "did you mean 'log_every_steps'"),
        ({"batch_size": 8}, "lacks .*total_images"),
        ({"batch_size": 0, "total_images": 8}, "train.batch_size = 0: use 1 or more"),
        ({"batch_size": 8, "total_images": 8, "stall_minutes": -1}, "train.stall_minutes = -1: use 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        loop.Settings.from_config(section)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8 does not divide over 3 devices.*num_devices=1"):
        run(tmp_path, num_devices=3)


def test_an_unknown_writer_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="unknown writer 'tensorbord'.*'tensorboard'"):
        run(tmp_path, writers=["tensorbord"])


def test_data_that_ends_says_where_and_what_to_type(tmp_path):
    config = loop_example.make_config()
    experiment = loop_example.make_experiment(config)

    class Short:
        def __init__(self):
            self.inner, self.left = experiment.batches(), 4
            self.get_state = self.inner.get_state

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return next(self.inner)

    with pytest.raises(RuntimeError, match="ended after step 4 of 12.*total_images=32"):
        loop.run(experiment._replace(batches=Short), config, tmp_path)
