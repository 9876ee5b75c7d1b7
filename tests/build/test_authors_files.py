"""Files of DiT's and MDTv2's authors become runs: sizes are read from the weights, outputs are the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.build import networks
from diffjax.cli import convert, flags
from diffjax.data.sources import DataShape
from diffjax.models import mmdit, pixart, unet
from diffjax.models.dit import DiT
from diffjax.nn import embeddings, functional
from diffjax.weights import authors, dit, keymap, load
from diffjax.weights import mmdit as mmdit_tables
from diffjax.weights import pixart as pixart_tables
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
    assert call("--export=original", tmp_path / "run", tmp_path / "again.safetensors") == 0
    again = load.read(tmp_path / "again.safetensors")
    assert set(shapes) <= set(again) and all(tuple(again[name].shape) == shape for name, shape in shapes.items())
    assert {name for name in set(again) - set(shapes)} == {name for name in again if name.endswith("position_index")}
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
    assert call("--export=original", tmp_path / "run", tmp_path / "again.safetensors") == 0
    again = load.read(tmp_path / "again.safetensors")
    assert set(again) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(np.asarray(again[name]), value, err_msg=name)


PIXART = dict(width=384, depth=2, heads=6, patch=2, text_width=12, text_length=0, base_size=8)
SD3 = dict(width=128, depth=3, heads=2, patch=2, text_width=24, pooled_width=12, max_grid=64, stored_positions=True)


@pytest.mark.parametrize(
    "kind, network, options",
    [
        ("pixart", pixart.PixArt, PIXART),
        ("pixart", pixart.PixArt, PIXART | {"controls": 3}),
        ("sd3", mmdit.MMDiT, SD3 | {"qk_norm": True}),
        ("sd3", mmdit.MMDiT, SD3 | {"qk_norm": False}),
    ],
)
def test_single_files_with_texts(tmp_path, kind, network, options):
    """Read, and written again with the same names and bits. The null caption of PixArt's training is left out, the
    encoders beside SD3's network are left alone."""
    channels, size = (16, 128) if kind == "sd3" else (4, 16)
    outputs = {} if kind == "sd3" else {"out_channels": 8}
    init = functional.functionalize(lambda rngs: network(size, channels, **outputs, **options, rngs=rngs))[1]
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))
    if kind == "sd3":
        weights = keymap.to_weights(mmdit_tables.original(3), params)
        stored = {tables.PREFIX + name: value for name, value in weights.items()}
        stored["text_encoders.clip_l.x"] = stored["first_stage_model.y"] = np.ones(3, np.float32)
    else:
        weights = keymap.to_weights(pixart_tables.ORIGINAL, params) | {"pos_embed": embeddings.grid(range(8), range(8), 384)[None]}
        stored = weights | {"y_embedder.y_embedding": np.ones((120, 12), np.float32)}
    load.save(tmp_path / "file.safetensors", stored)
    assert call(f"--kind={kind}", tmp_path / "file.safetensors", tmp_path / "run") == 0
    run = build.load_run(tmp_path / "run")
    assert run.data == DataShape(size, channels, 0) and {key: run.config.model[key] for key in options} == options
    assert call("--export=original", tmp_path / "run", tmp_path / "again.safetensors") == 0
    again = load.read(tmp_path / "again.safetensors")
    assert set(again) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(np.asarray(again[name]), value, err_msg=name)


def test_other_positions_are_refused(tmp_path):
    options = PIXART | {"base_size": 4}
    init = functional.functionalize(lambda rngs: pixart.PixArt(16, 4, 8, **options, rngs=rngs))[1]
    weights = keymap.to_weights(pixart_tables.ORIGINAL, jax.tree.map(np.asarray, init(jax.random.key(0))))
    positions = embeddings.grid(np.arange(8) / 2, np.arange(8) / 2, 384)[None]
    load.save(tmp_path / "file.safetensors", weights | {"pos_embed": positions})
    with pytest.raises(ValueError, match="pos_embed .* is not this network's table"):
        convert.KINDS["pixart"](tmp_path / "file.safetensors", None)


def test_exports_that_cannot_be(tmp_path, capsys):
    assert call("--export=original", "--kind=dit", tmp_path, tmp_path / "x.safetensors") == 2
    assert "--export takes a run, found --kind" in capsys.readouterr().err
    assert call("--export=original", tmp_path, tmp_path / "x.bin") == 2
    assert "expected a name that ends with .safetensors" in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_text("kept")
    assert call("--export=original", tmp_path, tmp_path / "x.safetensors") == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "x.safetensors").read_text() == "kept"


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
