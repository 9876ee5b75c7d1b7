"""Checkpoints: exact, strict about what they hold, and honest when the disk is not."""

import json
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.runtime import checkpoint, checkpoint_read, configs, guards, mesh

CONFIG = {"seed": 0, "train": {"batch_size": 4, "total_images": 100}}


class Inner(NamedTuple):
    params: dict
    moments: tuple


class State(NamedTuple):
    step: jax.Array
    method: Inner
    ema_params: dict


def make_state(step=3, width=4, averaged=True):
    params = {"enc": {"16x16_block0": {"kernel": jnp.arange(3.0 * width).reshape(3, width)}}, "bias": jnp.ones(width)}
    return State(
        jnp.int32(step),
        Inner(params, (jnp.bfloat16(1.5), {"bias": jnp.full(width, 0.1)})),
        jax.tree.map(lambda x: x * 2, params) if averaged else {},
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def write(workdir, steps=(3,), **options):
    with checkpoint.Checkpoints(workdir, CONFIG, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step}, {"means": [0.1]})


def truncate(folder):
    """Cut the files that hold the arrays, as a machine that loses power does."""
    for path in (folder / "state" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)


def assert_equal(expected, found):
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.fast
def test_what_is_saved_comes_back_bit_equal_with_position_config_and_versions(tmp_path):
    write(tmp_path)
    found = checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)
    assert found.step == 3
    assert_equal(make_state(), found.state)
    assert found.run["iterator"] == {"position": 3}
    assert found.run["loop"] == {"means": [0.1]}
    assert found.run["config"] == CONFIG
    assert found.run["versions"]["jax"] == jax.__version__


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    write(tmp_path)
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert files
    assert not any(path.read_bytes().startswith(b"\x80\x04") or path.suffix in (".pkl", ".pickle") for path in files)


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    state = {"a": jnp.arange(2.0**20)}
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, None, {})
        for _ in range(5):
            state = bump(state)
        jax.block_until_ready(state)
    found = checkpoint_read.read_newest(tmp_path, abstract(state), CONFIG)
    np.testing.assert_array_equal(found.state["a"], np.arange(2.0**20))


def test_the_newest_stay_and_the_permanent_ones(tmp_path):
    write(tmp_path, steps=range(1, 9), keep_last=2, keep_every_steps=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7, 8]


def test_permanent_ones_outlive_restarts_and_those_that_a_time_brought_do_not(tmp_path):
    write(tmp_path, steps=(3, 4, 6), keep_last=1, keep_every_steps=3)
    assert checkpoint.steps(tmp_path) == [3, 6]
    write(tmp_path, steps=(7, 8), keep_last=1, keep_every_steps=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 8]


def test_none_where_nothing_was_saved(tmp_path):
    assert checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG) is None


def test_every_difference_of_the_trees_is_named(tmp_path):
    write(tmp_path)
    other = make_state(width=5)
    other = other._replace(ema_params={"new": jnp.zeros(2)}, step=jnp.float32(0))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint_read.read_newest(tmp_path, abstract(other), CONFIG)
    text = str(caught.value)
    for line in (
        "different: method/params/bias, expected float32[5], found float32[4]",
        "different: method/params/enc/16x16_block0/kernel, expected float32[3,5], found float32[3,4]",
        "different: step, expected float32[], found int32[]",
        "missing: ema_params/new float32[2]",
        "extra: ema_params/enc/16x16_block0/kernel float32[3,4]",
        "--workdir",
    ):
        assert line in text


def test_another_config_is_refused_with_every_difference_and_what_to_type(tmp_path):
    write(tmp_path)
    now = {"seed": 1, "train": {"batch_size": 8, "total_images": 200}, "extra": 1}
    with pytest.raises(configs.ConfigChangedError) as caught:
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), now)
    text = str(caught.value)
    assert "seed: 0 -> 1" in text and "train.batch_size: 4 -> 8" in text and "extra: absent -> 1" in text
    assert "--workdir" in text and "--config.allow_config_change=True" in text
    assert "total_images" not in text

    said = []
    now["allow_config_change"] = True
    assert checkpoint_read.read_newest(tmp_path, abstract(make_state()), now, said.append).step == 3
    assert any("train.total_images: 100 -> 200" in line for line in said)
    assert any("seed: 0 -> 1" in line for line in said)


_READ = """
import sys
import jax, jax.numpy as jnp
from diffjax.runtime import checkpoint_read
found = checkpoint_read.read_newest(sys.argv[1], {"a": jax.ShapeDtypeStruct((8,), jnp.float32)}, {})
print("restored", found.step, found.state["a"].tolist())
"""


def run_python(code, *arguments, before=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_truncated_newest_checkpoint_falls_back_and_says_so(tmp_path):
    def write_small(step):
        with checkpoint.Checkpoints(tmp_path, {}) as checkpoints:
            checkpoints.save(step, {"a": jnp.full(8, float(step))}, None, {})

    write_small(3)
    write_small(5)
    truncate(tmp_path / "checkpoints" / "5")
    # its own process: where a read fails, orbax leaves its other reads to the garbage collector, which complains
    done = run_python(_READ, tmp_path)
    assert done.returncode == 0, done.stderr
    warning, aside, restored = done.stdout.splitlines()
    assert "WARNING" in warning and "checkpoints/5 is unreadable" in warning and "checkpoints/3, is used" in warning
    assert restored == f"restored 3 {[3.0] * 8}"
    # put aside, never deleted, and step 5 can be written again
    assert "put aside" in aside and (tmp_path / "unreadable_checkpoints" / "5" / "state").exists()
    write_small(5)
    assert run_python(_READ, tmp_path).stdout == f"restored 5 {[5.0] * 8}\n"


@pytest.mark.parametrize("part", ["state/manifest.ocdbt", "run/metadata", "state", "run"])
def test_a_run_without_a_readable_checkpoint_is_an_error_and_nothing_is_moved(tmp_path, part):
    write(tmp_path)
    target = tmp_path / "checkpoints" / "3" / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint is readable:\n.*checkpoints/3"):
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)
    assert checkpoint.steps(tmp_path) == [3]


def test_a_foreign_folder_is_named(tmp_path):
    (tmp_path / "checkpoints" / "7" / "default").mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match="7 was not written by diffjax.*default.*--workdir"):
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)
    (tmp_path / "checkpoints" / "model.pt").touch()
    with pytest.raises(checkpoint.CheckpointError, match="model.pt.*did not write.*--workdir"):
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)


def test_a_checkpoint_of_another_format_or_step_is_named(tmp_path):
    write(tmp_path)
    shutil.move(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "4")
    with pytest.raises(checkpoint.CheckpointError, match="4 holds step 3"):
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)
    path = tmp_path / "checkpoints" / "4" / "run" / "metadata"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({"format": "other-2", "step": run["step"]}))
    with pytest.raises(checkpoint.CheckpointError, match="format 'other-2', expected 'diffjax-checkpoint-1'"):
        checkpoint_read.read_newest(tmp_path, abstract(make_state()), CONFIG)


def test_nothing_non_finite_is_saved(tmp_path):
    state = make_state()
    state.method.params["enc"]["16x16_block0"]["kernel"] = jnp.full((3, 4), jnp.nan)
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(guards.NonFiniteError, match="step 3: method/params/enc/16x16_block0/kernel of"):
            checkpoints.save(3, state, None, {})
    assert checkpoint.steps(tmp_path) == []


def test_an_iterator_position_that_is_not_json_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.raises(TypeError, match="position.*not JSON"):
            checkpoints.save(1, make_state(), b"bytes", {})


_FULL = """
import subprocess, sys
import jax, jax.numpy as jnp
import numpy as np
from diffjax.runtime import checkpoint, checkpoint_read
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", sys.argv[1]], check=True)
try:
    with checkpoint.Checkpoints(sys.argv[1], {}) as checkpoints:
        for step in (1, 2, 3):  # 0.9 MiB each: room for two
            noise = np.random.default_rng(step).standard_normal(225 * 2**10, np.float32)  # does not compress
            checkpoints.save(step, {"a": jnp.asarray(noise)}, None, {})
except checkpoint.CheckpointError as error:
    print(error)
found = checkpoint_read.read_newest(sys.argv[1], {"a": jax.ShapeDtypeStruct((225 * 2**10,), jnp.float32)}, {})
print("restored", found.step, checkpoint.steps(sys.argv[1]))
"""


def test_a_full_disk_is_named_and_older_checkpoints_stay(tmp_path):
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]  # of a user without rights, for one process
    try:
        subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system mounts nothing for its users: no small disk to fill")
    done = run_python(_FULL, tmp_path, before=own_mounts)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout and "at steps [1, 2]. Make space" in done.stdout
    assert done.stdout.endswith("restored 2 [1, 2]\n")


_FILL = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from diffjax.runtime import checkpoint
asynchronous = sys.argv[2] == "True"
try:
    with checkpoint.Checkpoints(sys.argv[1], {}, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(8)}, None, {})
        checkpoints.check()
        checkpoints._manager.wait_until_finished()
        # a file may not grow beyond 64 KiB from here on: the kernel fails the write as a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        noise = np.random.default_rng(0).standard_normal(2**20, np.float32)  # does not compress
        checkpoints.save(2, {"a": jnp.asarray(noise)}, None, {})
except checkpoint.CheckpointError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_the_kernel_refuses_names_the_folder_and_leaves_older_checkpoints(tmp_path, asynchronous):
    done = run_python(_FILL, tmp_path, asynchronous)
    assert done.returncode == 7, done.stderr
    assert f"could not write a checkpoint to {tmp_path / 'checkpoints'}" in done.stdout
    assert "MiB free" in done.stdout and "at steps [1]" in done.stdout and "Make space" in done.stdout
    found = checkpoint_read.read_newest(tmp_path, {"a": jax.ShapeDtypeStruct((8,), jnp.float32)}, {})
    assert found.step == 1


def test_a_disk_too_small_for_one_checkpoint_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(checkpoint.CheckpointError, match="0.0 MiB free, one checkpoint takes 4.0 MiB.*--workdir"):
        checkpoint.check_place(tmp_path / "new", CONFIG, {"a": jax.ShapeDtypeStruct((2**20,), jnp.float32)})
    assert not (tmp_path / "new").exists()


def test_params_for_sampling_are_the_average_or_the_raw_ones(tmp_path):
    write(tmp_path)
    params, config, step = checkpoint_read.load_params(tmp_path)
    assert_equal(make_state().ema_params, params)
    assert (config, step) == (CONFIG, 3)
    assert_equal(make_state().method.params, checkpoint_read.load_params(tmp_path, ema=False)[0])
    assert_equal(make_state().ema_params, checkpoint_read.load_params(tmp_path, ema=None)[0])


def test_an_average_that_was_not_kept_is_an_error(tmp_path):
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, make_state(1, averaged=False), None, {})
    with pytest.raises(checkpoint.CheckpointError, match="no moving average.*ema=False"):
        checkpoint_read.load_params(tmp_path)
    assert_equal(make_state().method.params, checkpoint_read.load_params(tmp_path, ema=None)[0])


def test_a_folder_without_checkpoints_says_what_to_do(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint: train first"):
        checkpoint_read.load_params(tmp_path / "absent")


def test_restored_arrays_take_the_shardings_asked_for(tmp_path):
    write(tmp_path)
    sharding = mesh.replicated(mesh.make_mesh(2))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state())
    found = checkpoint_read.read_newest(tmp_path, target, CONFIG)
    assert {leaf.sharding for leaf in jax.tree.leaves(found.state)} == {sharding}
    assert_equal(make_state(), found.state)
