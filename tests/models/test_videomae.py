"""VideoMAE against transformers' classes and, for version 2, the package cd-fvd's, with drawn weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.videomae import VIDEOMAE_B, VIDEOMAE_V2_G, VideoMAE
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap, load
from diffjax.weights import videomae as tables

# float32 in another order of sums; the tokens below have a deviation of 1 to 3
TOLERANCE = 5e-5

TINY = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
    num_frames=6, tubelet_size=2, num_labels=5,
)  # fmt: skip
OURS = dict(width=32, depth=3, heads=4, hidden=48, patch=4, tubelet=2, frames=6, image_size=16)


@pytest.fixture(scope="module")
def version_2():
    """The package's module, without its downloads."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    reason = "cd-fvd is not installed: pip install --no-deps cd-fvd"
    return pytest.importorskip("cdfvd.third_party.VideoMAEv2.videomaev2_finetune", reason=reason)


def weights_of(module):
    arrays = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    return tables.completed(load.Weights(arrays, "the module"))


def clips():
    return np.random.default_rng(1).standard_normal((2, 6, 16, 16, 3), np.float32)


def states(options, weights):
    constructor = lambda rngs: VideoMAE(**options, rngs=rngs)  # noqa: E731
    params = keymap.to_params(tables.table(weights), weights, abstract(constructor))
    return jax.jit(functionalize(constructor)[0])(params, clips())


@pytest.mark.fast
def test_a_tuned_network_equals_transformers(transformers, drawn):
    import torch

    config = transformers.VideoMAEConfig(**TINY)
    module = drawn(transformers.VideoMAEForVideoClassification, config)
    options = tables.options(config.to_dict())
    assert options == OURS | {"pooling": "normed_mean", "eps": 1e-12, "pooled_eps": 1e-5}
    x = torch.from_numpy(clips()).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        tokens = module.videomae(x).last_hidden_state
        pooled = module.fc_norm(tokens.mean(1))
    found = states(options, weights_of(module))
    assert 0.5 < np.std(found.pooled) < 2
    np.testing.assert_allclose(found.tokens, tokens.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found.pooled, pooled.numpy(), atol=TOLERANCE)


def test_a_network_that_was_not_tuned_equals_transformers(transformers, drawn):
    import torch

    config = transformers.VideoMAEConfig(**TINY, use_mean_pooling=False)
    module = drawn(transformers.VideoMAEModel, config)
    options = tables.options(config.to_dict())
    assert options == OURS | {"pooling": "mean_normed", "eps": 1e-12, "pooled_eps": 1e-12}
    with torch.no_grad():
        tokens = module(torch.from_numpy(clips()).permute(0, 1, 4, 2, 3)).last_hidden_state
    weights = weights_of(module)
    weights = load.Weights({f"videomae.{name}": array for name, array in weights.entries.items()}, "the module")
    found = states(options, weights)
    np.testing.assert_allclose(found.tokens, tokens.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found.pooled, tokens.mean(1).numpy(), atol=TOLERANCE)


def test_version_2_equals_cd_fvd(version_2, drawn):
    import torch

    make = lambda config: version_2.VisionTransformer(**config)  # noqa: E731
    config = dict(
        img_size=16, patch_size=4, num_classes=3, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6), all_frames=6, tubelet_size=2,
    )  # fmt: skip
    module = drawn(make, config)
    # of other numbers of frames than 16 it reads its positions between tubelets: here they are for 6
    module.interpolate_pos_encoding = lambda frames: module.pos_embed
    with torch.no_grad():
        expected = module.forward_features(torch.from_numpy(clips()).permute(0, 4, 1, 2, 3)).numpy()
    found = states(OURS | {"eps": 1e-6, "pooled_eps": 1e-6}, weights_of(module))
    np.testing.assert_allclose(found.pooled, expected, atol=TOLERANCE)


def test_published_sizes(transformers, version_2, fits):
    """Of networks without their tables of positions, which hold no weights and take seconds."""
    import torch

    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        base = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(image_size=16, num_frames=2))
        patch.setattr(version_2, "get_sinusoid_encoding_table", lambda *_: None)
        patch.setattr(torch, "linspace", lambda first, last, count: torch.zeros(count, device="cpu"))  # it reads them
        giant = version_2.vit_giant_patch14_224(num_classes=174)
    for preset, module, head, count in (
        (VIDEOMAE_B, base, 2 * 769, 86_236_416), (VIDEOMAE_V2_G, giant, 174 * 1409, 1_011_667_072)
    ):  # fmt: skip
        ours = abstract(lambda rngs, preset=preset: VideoMAE(**preset, rngs=rngs))
        keys = preset["depth"] * preset["width"]  # biases, zero here and absent there
        assert trees.count(ours) == sum(tensor.numel() for tensor in module.parameters()) - head + keys == count
        weights = tables.completed(load.Weights(dict(module.state_dict()), "the module"))
        fits(tables.table(weights), SimpleNamespace(state_dict=lambda weights=weights: weights), ours)


def test_names_of_published_files(transformers, drawn):
    """transformers 5 says query.bias where files have q_bias; keys have none."""
    module = drawn(transformers.VideoMAEForVideoClassification, transformers.VideoMAEConfig(**TINY))
    weights = weights_of(module)
    layer = "videomae.encoder.layer.1.attention.attention."
    assert {f"{layer}{part}_bias" for part in "qkv"} < set(weights) and f"{layer}query.bias" not in weights
    np.testing.assert_array_equal(weights[f"{layer}q_bias"], module.state_dict()[f"{layer}query.bias"].numpy())
    assert not weights[f"{layer}k_bias"].any()
    published = {name: array for name, array in weights.entries.items() if not name.endswith("k_bias")}
    assert set(tables.completed(load.Weights(published, ""))) == set(weights)
    options = tables.options(module.config.to_dict())
    expected = abstract(lambda rngs: VideoMAE(**options, rngs=rngs))
    params = keymap.to_params(tables.TUNED, weights, expected)
    second = load.Weights(keymap.to_weights(tables.V2, params) | {"head.weight": np.zeros((3, 32))}, "")
    assert {"blocks.2.attn.qkv.weight", "blocks.2.attn.q_bias", "blocks.2.attn.v_bias", "fc_norm.weight"} < set(second)
    back = keymap.to_params(tables.table(second), tables.completed(second), expected)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_wrong_input_is_refused():
    constructor = lambda rngs: VideoMAE(**OURS, rngs=rngs)  # noqa: E731
    network, params = functionalize(constructor)[0], abstract(constructor)
    with pytest.raises(ValueError, match=r"expected \(B, 6, 16, 16, 3\): cut and resize them"):
        jax.eval_shape(network, params, jax.ShapeDtypeStruct((1, 8, 16, 16, 3), jnp.float32))
    with pytest.raises(ValueError, match="found 5 frames of 16 with tubelets of 2 and 4"):
        abstract(lambda rngs: VideoMAE(**OURS | {"frames": 5}, rngs=rngs))
    with pytest.raises(ValueError, match="unknown pooling 'mean'"):
        abstract(lambda rngs: VideoMAE(**OURS, pooling="mean", rngs=rngs))
    with pytest.raises(ValueError, match="no weights of a VideoMAE"):
        tables.table(["conv1.weight"])
    with pytest.raises(ValueError, match="found qkv_bias=False"):
        tables.options({"qkv_bias": False})
