"""Files of DiT's and MDTv2's authors become runs: sizes are read from the weights, outputs are the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.build import networks
from diffjax.cli import convert, flags
from diffjax.data.sources import DataShape
from diffjax.models import unet
from diffjax.models.dit import DiT
from diffjax.nn import embeddings, functional
from diffjax.weights import authors, dit, keymap, load
from diffjax.weights import unet as tables


def call(*argv):
    return flags.run(convert.__doc__, convert.define, convert.main, ["convert", *map(str, argv)], convert.POSITIONAL)


def test_mdt(tmp_path, golden, golden_weights):
    arrays, meta = golden("mdtv2")
    kept = {name: arrays[short] for name, short in (("pos_embed", "pos_embed"), ("decoder_pos_embed", "decoder_pos_embed"))}
    shapes = {name: tuple(shape) for name, shape in meta["param_shapes"].items()}
    weights = {name: golden_weights(name, shape) for name, shape in shapes.items() if name not in kept}
    load.save(tmp_path / "mdt.safetensors", weights | {name: value.reshape(shapes[name]) for name, value in kept.items()})
    assert call("--kind=mdt", tmp_path / "mdt.safetensors", tmp_path / "run") == 0
    run = build.load_run(tmp_path / "run")
    assert (run.data, run.null_class) == (DataShape(12, 4, 7), True)
    assert run.config.model.learned_variance and run.config.model.decoder_depth == 2 and run.config.model.depth == 8
    _, network, _ = networks._parts(run.config.model, run.data)
    out = network(run.params, jnp.asarray(arrays["x"].transpose(0, 2, 3, 1)), jnp.asarray(arrays["t"], jnp.float32),
                  {"label": jnp.asarray(arrays["y"], jnp.int32)}, None)  # fmt: skip
    expected = arrays["out_full"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())  # as the golden arrays' notes have it


@pytest.mark.fast
def test_dit(tmp_path):
    options = dict(width=384, depth=2, heads=6, patch=4)
    init = functional.functionalize(lambda rngs: DiT(16, 4, 8, 10, **options, rngs=rngs))[1]
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    weights = dit.to_weights(params, "official", embeddings.grid(range(4), range(4), 384))
    load.save(tmp_path / "dit.safetensors", weights)
    assert call("--kind=dit", tmp_path / "dit.safetensors", tmp_path / "run", "--companions=vae") == 0
    run = build.load_run(tmp_path / "run")
    assert run.data == DataShape(16, 4, 10) and run.config.data.companions == "vae"
    assert {key: run.config.model[key] for key in options} == options
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_single_file_of_a_unet(tmp_path, monkeypatch):
    """With averages in it, which count; the text encoder beside them is left alone."""
    small = dict(unet.PRESETS["sd_v1"], width=32, channel_mult=(1, 2), transformer_depth=(1, 0), context_width=16, image_size=8)
    monkeypatch.setitem(vars(unet), "PRESETS", {**unet.PRESETS, "sd_v1": small})
    init = functional.functionalize(lambda rngs: unet.UNet(**small, rngs=rngs))[1]
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    weights = keymap.to_weights(tables.original(small["transformer_depth"]), params)
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): value for name, value in weights.items()}
    others = {"cond_stage_model.transformer.x": np.ones(3, np.float32), "first_stage_model.y": np.ones(2, np.float32)}
    raw = {name: np.zeros_like(value) for name, value in weights.items()}
    load.save(tmp_path / "sd.safetensors", raw | averages | others)
    assert call("--kind=sd_v1", tmp_path / "sd.safetensors", tmp_path / "run") == 0
    run = build.load_run(tmp_path / "run")
    assert run.data == DataShape(8, 4, 0) and run.config.model.process == "scaled_linear"
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_files_are_refused(tmp_path, capsys):
    weights = {"a.weight": np.zeros((2, 2), np.float32)}
    load.save(tmp_path / "other.safetensors", weights)
    assert call("--kind=dit", tmp_path / "other.safetensors", tmp_path / "run") == 2
    assert "these are no weights of dit" in capsys.readouterr().err
    assert call("--kind=edm", tmp_path / "other.safetensors", tmp_path / "run", "--companions=vae") == 2
    assert "--companions is for networks on latents in a single file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown kind 'unet'"):
        authors.describe("unet", weights)
