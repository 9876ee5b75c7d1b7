"""Model folders and files: shards, variants, both formats; one array at a time; damage is said before it is used."""

import hashlib
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from diffjax.weights import keymap, load

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RANDOM.standard_normal((3, 4)).astype(np.float32),
    "a.bias": RANDOM.standard_normal(3).astype(np.float16),
    "b.weight": RANDOM.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
}


def assert_equal(found, expected=ARRAYS):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.asarray(found[name]).dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def shards(folder):
    load.save(folder / "model-1-of-2.safetensors", {"a.weight": ARRAYS["a.weight"]})
    load.save(folder / "model-2-of-2.safetensors", {name: ARRAYS[name] for name in ("a.bias", "b.weight")})
    index = {name: f"model-{1 if name == 'a.weight' else 2}-of-2.safetensors" for name in ARRAYS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors"])
def test_folder_and_file(tmp_path, name):
    load.save(tmp_path / name, ARRAYS)
    assert_equal(load.read(tmp_path))
    assert_equal(load.read(tmp_path / name))
    assert load.read(tmp_path).source == str(tmp_path / name)


def test_shards_and_variant(tmp_path):
    shards(tmp_path)
    assert_equal(load.read(tmp_path))
    half = {"c": np.ones(2, np.float16)}
    load.save(tmp_path / "model.fp16.safetensors", half)
    assert_equal(load.read(tmp_path, variant="fp16"), half)


def test_digest_of_a_file_and_of_shards(tmp_path):
    load.save(tmp_path / "one" / "model.safetensors", ARRAYS)
    content = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert load.sha256(tmp_path / "one") == hashlib.sha256(content).hexdigest()
    assert load.sha256(tmp_path / "one" / "model.safetensors") == load.sha256(tmp_path / "one")
    shards(tmp_path)
    both = b"".join((tmp_path / f"model-{part}-of-2.safetensors").read_bytes() for part in (1, 2))
    assert load.sha256(tmp_path) == hashlib.sha256(both).hexdigest()
    with pytest.raises(FileNotFoundError, match="is absent: give a model folder"):
        load.sha256(tmp_path / "nowhere")


def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is no part of the core")
    tensors = {name: torch.tensor(array.astype(np.float32)) for name, array in ARRAYS.items()}
    torch.save({"state_dict": tensors}, tmp_path / "diffusion_pytorch_model.bin")
    assert_equal(load.read(tmp_path), {name: array.astype(np.float32) for name, array in ARRAYS.items()})
    torch.save({"model": tensors, "ema": tensors, "step": 3}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match=r"holds more than weights: \['ema', 'model', 'step'\]; save the dict"):
        load.read(tmp_path / "training.pt")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is absent: give a model folder"):
        load.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no diffusion_pytorch_model.safetensors.*MODEL/unet"):
        load.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json is absent"):
        load.config(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load.config(tmp_path)
    shards(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 shards: model-2-of-2.safetensors"):
        load.read(tmp_path)


def test_index_that_lies(tmp_path):
    shards(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["c.weight"] = "model-1-of-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 1 weights that its index names: \['c.weight'\]"):
        load.read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        load.read(tmp_path)


def test_damaged_file(tmp_path):
    load.save(tmp_path / "model.safetensors", ARRAYS)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.safetensors is damaged"):
        load.read(tmp_path / "half.safetensors")


def test_under():
    weights = load.Weights(ARRAYS, "file")
    assert set(load.under(weights, "a.")) == {"weight", "bias"}
    with pytest.raises(ValueError, match=r"file has no weights under 'model\.'; its names begin with \['a', 'b'\]"):
        load.under(weights, "model.")


def test_save_overwrites_nothing(tmp_path):
    load.save(tmp_path / "out" / "w.safetensors", ARRAYS, {"made": "here"})
    with pytest.raises(FileExistsError, match="is not overwritten"):
        load.save(tmp_path / "out" / "w.safetensors", {})
    assert_equal(load.read(tmp_path / "out" / "w.safetensors"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["w.safetensors"]


def test_one_leaf_at_a_time_on_its_devices(tmp_path):
    """16 arrays of 4 MiB go to 8 devices, each sharded; the host holds a few of them beside the devices' parts."""
    count, width = 16, 1024
    arrays = {f"layer{i}.weight": np.full((width, width), i, np.float32) for i in range(count)}
    load.save(tmp_path / "w.safetensors", arrays)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    expected = {f"layer{i}": {"kernel": jax.ShapeDtypeStruct((width, width), np.float32)} for i in range(count)}
    put = load.placed(jax.tree.map(lambda _: sharding, expected))
    tracemalloc.start()  # counts numpy's arrays, not those on devices
    params = keymap.to_params(keymap.KeyMap({}), load.read(tmp_path / "w.safetensors"), expected, put=put)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # one as read and in our layout, and what is still on its way to the devices; 5.3 measured, 32 for two copies of all
    assert peak < 8 * width * width * 4
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["layer5"]["kernel"], arrays["layer5.weight"].T)
