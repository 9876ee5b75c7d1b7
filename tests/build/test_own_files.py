"""A run's averaged weights as one .safetensors with our own names, and a run of such a file."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax import build
from diffjax.cli import convert, flags
from diffjax.core import trees
from diffjax.models.dit import DiT
from diffjax.nn import embeddings, functional
from diffjax.runtime import checkpoint, configs
from diffjax.weights import dit, load


def call(*argv):
    return flags.run(convert.__doc__, convert.define, convert.main, ["convert", *map(str, argv)], convert.POSITIONAL)


def spread(params):
    """Every array over eight devices, along the first axis that they divide."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(array):
        axis = next((i for i, size in enumerate(array.shape) if size % 8 == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "fsdp")
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(place, params)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run whose state eight devices held, its average)."""
    folder = tmp_path_factory.mktemp("own")
    options = dict(width=384, depth=1, heads=6, patch=4)
    init = functional.functionalize(lambda rngs: DiT(16, 4, 8, 10, **options, rngs=rngs))[1]
    raw, average = (jax.tree.map(np.asarray, init(jax.random.key(seed))) for seed in (0, 1))
    load.save(folder / "dit.safetensors", dit.to_weights(raw, "official", embeddings.grid(range(4), range(4), 384)))
    assert call("--kind=dit", folder / "dit.safetensors", folder / "published") == 0
    config = {**configs.read(folder / "published"), "train": {"batch_size": 8, "checkpoint_folder": ""}}
    with checkpoint.Checkpoints(folder / "run", config) as checkpoints:
        checkpoints.save(7, {"method": {"params": spread(raw)}, "ema_params": spread(average)}, None, {})
    configs.write(folder / "run", config)
    return folder / "run", average


@pytest.mark.fast
def test_every_bit_of_the_average_and_the_config_make_the_run_again(run, tmp_path, capsys):
    folder, average = run
    assert call("--export=diffjax", folder, tmp_path / "own.safetensors") == 0
    assert f"{folder}, step 7: {len(trees.paths(average))} arrays" in capsys.readouterr().out
    weights, metadata = load.read(tmp_path / "own.safetensors"), load.metadata(tmp_path / "own.safetensors")
    assert trees.compare(average, trees.nest({path: np.asarray(array) for path, array in weights.items()})) == []
    assert metadata["step"] == "7" and json.loads(metadata["config"])["model"]["width"] == 384
    assert call("--kind=diffjax", tmp_path / "own.safetensors", tmp_path / "again") == 0
    again = trees.flatten(build.load_run(tmp_path / "again").params)
    for path, array in trees.flatten(average).items():
        assert again[path].dtype == array.dtype and np.asarray(again[path]).tobytes() == array.tobytes(), path


def test_the_file_does_not_say_where_the_checkpoints_were(run, tmp_path):
    """A run made of it would write there."""
    assert call("--export=diffjax", run[0], tmp_path / "own.safetensors") == 0
    config = json.loads(load.metadata(tmp_path / "own.safetensors")["config"])
    assert config["train"] == {"batch_size": 8}


def test_a_file_without_a_config_is_refused(tmp_path, capsys):
    load.save(tmp_path / "other.safetensors", {"a": np.ones(3, np.float32)})
    assert call("--kind=diffjax", tmp_path / "other.safetensors", tmp_path / "run") == 2
    assert "says no config in its metadata: expected a file written with --export=diffjax" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
