"""A run at 8 x 8 goes on at 16 x 16, and on other data: what is copied, resampled, made anew, refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import transfer
from diffjax.cli import convert, flags, sample, train
from diffjax.core import trees

TINY = {"width": 16, "heads": 2}
NETWORKS = {
    "dit": {"name": "dit", "depth": 2, **TINY},
    "mdt": {"name": "mdt", "depth": 4, "decoder_depth": 2, **TINY},
    "pixart": {"name": "pixart", "depth": 2, "text_width": 8, "text_length": 4, **TINY},
    "mmdit": {"name": "mmdit", "depth": 2, "text_width": 8, "pooled_width": 6, **TINY},
    "unet": {"name": "unet", "num_blocks": 1, "channel_mult": (1,), "transformer_depth": (1,), "context_width": 8,
             "width": 32, "heads": 2},
}  # fmt: skip
SAMPLE = {
    "solver": "euler", "num_steps": 3, "grid": "discrete", "process": "linear", "sigma_min": 0.1, "sigma_max": 150.0,
}  # fmt: skip


def sections(network, image_size=8, num_classes=3, **model):
    """A config of method edm for a network on images of 3 channels."""
    return ConfigDict({
        "seed": 1,
        "data": {"name": "none", "image_size": image_size, "channels": 3, "num_classes": num_classes},
        "model": {"precondition": "eps", "process": "linear", **NETWORKS[network], **model},
        "method": {"name": "edm", "distribution": "discrete", "weighting": "eps"},
        "optim": {"name": "adam", "learning_rate": 1e-3},
        "ema": {"halflife_images": 100},
        "train": {"batch_size": 4, "total_images": 8, "log_every_steps": 1},
        "sample": SAMPLE,
    })  # fmt: skip


def initial(config):
    return build.denoiser(config.model, build.data_shape(config.data))[1]


def written(folder, config):
    """A run with weights that no initialisation has."""
    shapes = jax.eval_shape(initial(config), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * draw(size=leaf.shape), leaf.dtype), shapes)
    convert.write(folder, {key: config.to_dict()[key] for key in ("seed", "data", "model", "method", "sample")}, params)
    return trees.flatten(params)


def started(folder, config):
    """(weights of a run's start by path, its report)"""
    config.method.start = str(folder)
    first = transfer.start(config, initial(config))
    params = first.init_params()
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(initial(config), jax.random.key(0)))
    return trees.flatten(params), first.report


def equal(found, known, paths):
    assert paths
    for path in paths:
        np.testing.assert_array_equal(found[path], known[path], err_msg=path)


@pytest.mark.fast
def test_dit_at_twice_the_resolution(tmp_path):
    """All of it is copied; its positions are no weights."""
    known = written(tmp_path / "low", sections("dit"))
    found, report = started(tmp_path / "low", sections("dit", 16, positions="interp", base_size=4))
    equal(found, known, known)
    assert report == f"start: {len(known)} of {len(known)} arrays are those of {tmp_path / 'low'}, step 0"


def test_mdt_at_twice_the_resolution(tmp_path):
    known = written(tmp_path / "low", sections("mdt"))
    found, report = started(tmp_path / "low", sections("mdt", 16))
    tables = [path for path in known if path.endswith(("positions", "bias_by_distance"))]
    equal(found, known, [path for path in known if path not in tables])
    for path in ("positions", "decoder_positions"):
        assert found[path].shape == (1, 64, 16)
        low, high = known[path].reshape(4, 4, 16), np.asarray(found[path]).reshape(8, 8, 16)
        np.testing.assert_allclose(high[::2, ::2], low, rtol=0, atol=1e-6)  # float32 between two conversions
    biases = [path for path in tables if path.endswith("bias_by_distance")]
    assert len(biases) == 4  # stacked in-blocks, out-blocks and decoder, and the block of the masked pass
    for path in biases:
        low = np.asarray(known[path])[..., :-3, :].reshape(-1, 7, 7, 2)
        high = np.asarray(found[path])[..., :-3, :].reshape(-1, 15, 15, 2)
        np.testing.assert_allclose(high[:, 1::2, 1::2], low, rtol=0, atol=1e-6)  # distances -6, -4, ..., 6
    assert report.endswith(f"resampled: {', '.join(path for path in found if path in tables)}")


TEXT = {"num_classes": 0, "text_width": 8}
CASES = [  # network, then both sections; what is made anew and left out
    ("dit", {}, {"num_classes": 5}, ["conditions/label"], []),
    ("mdt", {}, {"num_classes": 5, "image_size": 16}, ["conditions/label"], []),
    ("dit", {"condition": "attention"}, {"condition": "attention", **TEXT}, ["conditions/text"], ["conditions/label"]),
    ("pixart", {"num_classes": 0}, {"num_classes": 0, "text_width": 12}, ["caption/null", "caption/project"], []),
    ("pixart", {"num_classes": 0}, {"num_classes": 0, "text_length": 6}, ["caption/null"], []),
    ("pixart", {}, {"num_classes": 0}, ["caption/null", "caption/project"], ["label"]),
    ("mmdit", {"num_classes": 0}, {"num_classes": 0, "text_width": 12}, ["conditions/text"], []),
    ("mmdit", {}, {"num_classes": 0}, ["conditions/pooled", "conditions/text"], ["conditions/label"]),
    ("unet", {}, {"num_classes": 5}, ["classes"], []),
    ("unet", {}, {"num_classes": 0, "context_width": 12}, ["cross_attention/kv"], ["classes"]),
    ("dit", {}, {"metadata": {"high": ("flip",)}}, ["conditions/metadata/high", "conditions/metadata/null"], []),
]


@pytest.mark.parametrize(("network", "before", "after", "anew", "left_out"), CASES)
def test_other_classes_and_texts(tmp_path, network, before, after, anew, left_out):
    """What sees them first is drawn as in a fresh run of the same seed; all else is copied."""
    known = written(tmp_path / "first", sections(network, **before))
    config = sections(network, **after)
    found, report = started(tmp_path / "first", config)
    fresh = trees.flatten(transfer.start(sections(network, **after), initial(config)).init_params())
    new = [path for path in found if any(f"/{part}/" in f"/{path}/" for part in anew)]
    equal(found, fresh, new)
    equal(found, known, [path for path in found if path not in new and known[path].shape == found[path].shape])
    told = (re.search(f"{name}: ([^;]*)", report) for name in ("made anew", "left out"))
    made, dropped = (match[1].split(", ") if match else [] for match in told)
    assert {next(part for part in anew if name.endswith(part)) for name in made} == set(anew) and dropped == left_out


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"width": 32}, r"different: blocks/attention/out/bias, expected float32\[2,32\], found float32\[2,16\]"),
        ({"depth": 3}, r"different: blocks/.*expected float32\[3,.*found float32\[2,"),
        ({"condition": "attention"}, r"missing: blocks/cross/"),
        ({"learned_variance": True}, r"2 differences:\n  different: head/out/bias"),
        ({"positions": "interp", "image_size": 16}, "without model.base_size, .* set model.base_size=4"),
    ],
)
def test_other_networks_are_refused(tmp_path, after, message):
    """Each weight that does not fit is named."""
    written(tmp_path / "first", sections("dit"))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        started(tmp_path / "first", sections("dit", **after))


CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({{
        "seed": 0, "method": {{"name": "edm", "distribution": "discrete", "weighting": "eps", "label_dropout": 0.1}},
        "data": {{"name": "arrays", "path": {path!r}, "image_size": 16, "num_classes": 5}},
        "model": {{"name": "teacher", "positions": "interp", "base_size": 4, "resolution_scale": 2.0}},
        "optim": {{"name": "adam", "learning_rate": 1e-3}}, "ema": {{"halflife_images": 100}},
        "train": {{"batch_size": 4, "total_images": 8, "log_every_steps": 1, "num_devices": 1}}, "sample": {sample!r},
    }})
"""


def call(module, *argv):
    """A command in this process; its exit code."""
    argv = [module.__name__, *map(str, argv)]
    return flags.run(module.__doc__, module.define, module.main, argv, getattr(module, "POSITIONAL", ()))


def test_one_command_from_8_to_16_pixels(tmp_path, capsys):
    """Other classes, interpolated positions and rescaled noise: started, said, trained, resumed, sampled, refused."""
    known = written(tmp_path / "low", sections("dit"))
    generator = np.random.default_rng(0)
    images = {"images": generator.integers(0, 256, (8, 16, 16, 3), np.uint8), "labels": np.arange(8) % 5}
    np.savez(tmp_path / "images.npz", **images)
    (tmp_path / "high.py").write_text(CONFIG.format(path=str(tmp_path / "images.npz"), sample=SAMPLE))
    argv = [f"--config={tmp_path / 'high.py'}", f"--config.method.start={tmp_path / 'low'}"]

    config = flags.load_config(str(tmp_path / "high.py"))
    config.method.start = str(tmp_path / "low")
    state = build.experiment(config).init()
    copied = {path: leaf for path, leaf in known.items() if "label" not in path}
    for params in (state.method.params, state.ema_params):  # the average begins at the transferred weights
        equal(trees.flatten(params), copied, copied)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.method.opt_state))  # Adam's, fresh

    assert call(train, *argv, f"--workdir={tmp_path / 'high'}") == 0
    said = capsys.readouterr().err
    assert said.count("start: ") == 1
    assert f"arrays are those of {tmp_path / 'low'}, step 0; made anew: conditions/label" in said
    assert call(train, *argv, f"--workdir={tmp_path / 'high'}", "--config.train.total_images=12") == 0
    assert "start: " not in capsys.readouterr().err  # a run that goes on

    run = build.load_run(tmp_path / "high")
    assert run.data.shape == (16, 16, 3) and run.data.num_classes == 5 and run.config.sample.resolution_scale == 2.0
    assert run.config.model.base_size == 4 and build.run_plan(run).sigmas[0] == 300.0
    drawing = [f"--workdir={tmp_path / 'high'}", "--seeds=0-1", "--guidance_scale=3"]
    assert call(sample, *drawing, f"--out={tmp_path / 'samples'}") == 0
    assert "guidance_scale 3 of pre-training is about 5 here" in capsys.readouterr().out
    assert (tmp_path / "samples" / "samples.png").exists()
    assert call(train, *argv, f"--workdir={tmp_path / 'other'}", "--config.sample.resolution_scale=1.0") == 2
    assert "draws grey or blurred images" in capsys.readouterr().err and not (tmp_path / "other").exists()
