"""The latent U-Net with plain attention, of LDM-4 of faces and bedrooms: against diffusers, its sizes, and its names."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models import unet_blocks
from diffjax.models.unet import PRESETS, UNet
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import unet as weights

# 64 channels are 32 groups of two: what is added to a group of one channel is gone after its normalisation
TINY = dict(
    image_size=4, channels=3, out_channels=3, width=64, channel_mult=(1, 2), num_blocks=1, transformer_depth=(0, 1),
    head_dim=16, attention="plain",
)  # fmt: skip
COMMON = dict(in_channels=3, out_channels=3, block_out_channels=(64, 128), layers_per_block=1)
BLOCKS = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
# what decides the weights of the published folder of CelebA-HQ; bedrooms and FFHQ have the same sizes
PUBLISHED = dict(
    sample_size=64, block_out_channels=(224, 448, 672, 896), attention_head_dim=32,
    down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3, up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
)  # fmt: skip
BEFORE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # names of 2022


@pytest.fixture(scope="module")
def unet_class(transformers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return diffusers.UNet2DModel


def make(method="__call__", **options):
    """The compiled network, and shapes of its parameters."""
    network, init = functionalize(lambda rngs: UNet(**TINY | options, rngs=rngs), method)
    return jax.jit(network), jax.eval_shape(init, jax.random.key(0))


def drawn(shapes):
    """Weights that are nowhere zero."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(random.standard_normal(a.shape) / np.sqrt(np.prod(a.shape[-4:-1])), jnp.float32), shapes
    )


def same(some, others):
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in others)


def torch_weights(module):
    """Every weight drawn: kernels over the root of their inputs, scales about one."""
    import torch

    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = random.standard_normal(parameter.shape)
            values = values / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.3 * values
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.from_numpy((values + is_scale).astype(np.float32)))
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def before(name):
    for new, old in BEFORE.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize("kind", ["heads_of_16", "one_head"])
def test_equals_diffusers(unet_class, kind):
    import torch

    one = kind == "one_head"
    theirs = unet_class(**COMMON, **BLOCKS, attention_head_dim=None if one else 16).eval()
    named = torch_weights(theirs)
    network, shapes = make(**dict(heads=1, head_dim=0) if one else {})
    table = weights.keymap_of(named, (0, 1), 1)
    params = keymap.to_params(table, named, shapes)
    assert same(keymap.to_weights(table, params), named)
    old = {before(name): array for name, array in named.items()}
    assert len(set(old) - set(named)) == 8 * 4  # of each attention weights and biases of four
    assert same(trees.flatten(keymap.to_params(weights.keymap_of(old, (0, 1), 1), old, shapes)), trees.flatten(params))
    x, t = np.random.default_rng(1).standard_normal((2, 8, 12, 3)).astype(np.float32), np.float32([3, 20])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)).sample
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert 0.3 < np.std(expected) < 1.5
    # float32 sums of up to a thousand products in another order; noise labels are low, for diffusers rounds frequencies
    np.testing.assert_allclose(network(params, x, t), expected, atol=3e-5)


def test_has_the_weights_of_the_published_networks(unet_class, fits):
    import torch

    shapes = abstract(lambda rngs: UNet(**PRESETS["ldm_bedroom"], rngs=rngs))
    with torch.device("meta"):
        theirs = unet_class(**PUBLISHED)
    fits(weights.keymap_of(theirs.state_dict(), (0, 1, 1, 1)), theirs, shapes)


@pytest.mark.fast
def test_parameters():
    """Zhou 2024's counts, of its network for LSUN-Bedroom and of its step condition."""
    told = trees.flatten(abstract(lambda rngs: UNet(**PRESETS["ldm_bedroom"], step_condition=True, rngs=rngs)))
    branch = {path: leaf for path, leaf in told.items() if "step" in path}
    assert (trees.count(branch), trees.count(told)) == (12_659_136, 274_056_163 + 12_659_136)


def test_names_of_the_single_file():
    """Rombach 2022's code: every block counts, attention is the second part of one, an upsampling the last."""
    shapes = abstract(lambda rngs: UNet(**PRESETS["ldm_bedroom"], rngs=rngs))
    flat, table = trees.flatten(shapes), weights.original((0, 1, 1, 1), plain_heads=(8, 32))
    names = {name for path in flat for name in table.theirs(path)}
    assert len(names) == len(flat)  # q, k and v are one
    attended = {name.removesuffix(".qkv.weight") for name in names if name.endswith("qkv.weight")}
    inputs, outputs = [f"input_blocks.{i}.1" for i in (4, 5, 7, 8, 10, 11)], [f"output_blocks.{i}.1" for i in range(9)]
    assert attended == {weights.PREFIX + name for name in [*inputs, "middle_block.1", *outputs]}
    for name in ("output_blocks.8.2.conv.weight", "output_blocks.11.0.in_layers.0.bias", "middle_block.1.proj_out.bias",
                 "input_blocks.4.1.norm.weight", "input_blocks.9.0.op.bias"):  # fmt: skip
        assert weights.PREFIX + name in names
    middle = weights.PREFIX + "middle_block.1.qkv.weight"
    assert weights.keymap_of({middle: 0, weights.PREFIX + "input_blocks.0.0.bias": 0}, (0, 1, 1, 1), head_dim=32) == table


@pytest.mark.parametrize("heads", [dict(head_dim=16), dict(heads=2, head_dim=0)])
def test_single_files_have_heads_side_by_side(heads):
    random = np.random.default_rng(0)
    shapes = make(**heads)[1]
    params = jax.tree.map(lambda a: random.standard_normal(a.shape).astype(np.float32), shapes)
    table = weights.original((0, 1), 1, plain_heads=(heads.get("heads", 8), heads["head_dim"]))
    single, folder = keymap.to_weights(table, params), keymap.to_weights(weights.diffusers(plain=list(BEFORE)), params)
    number = heads.get("heads", 8)  # of 128 channels
    for kind, axes in (("weight", (128, 1)), ("bias", ())):
        found = single[f"{weights.PREFIX}output_blocks.1.1.qkv.{kind}"]
        assert found.shape == (3 * 128, *axes)
        parts = found.reshape(number, 3, 128 // number, *axes)  # (head, q k v, channel, ...)
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            expected = folder[f"up_blocks.0.attentions.1.{name}.{kind}"]
            np.testing.assert_array_equal(parts[:, part].reshape(expected.shape), expected)
    projection = single[weights.PREFIX + "middle_block.1.proj_out.weight"]
    np.testing.assert_array_equal(projection[..., 0], folder["mid_block.attentions.0.to_out.0.weight"])
    assert weights.keymap_of(single, (0, 1), 1, **heads) == table
    assert same(trees.flatten(keymap.to_params(table, single, shapes)), trees.flatten(params))


def test_attention_against_a_loop():
    """A new one is the identity; heads are separate; a gradient is the same where nothing is kept."""
    make_one = lambda policy: functionalize(lambda rngs: unet_blocks.PlainAttention(32, 4, remat=policy, rngs=rngs))  # noqa: E731
    (network, init), (again, _) = make_one(""), make_one("nothing")
    x = jax.random.normal(jax.random.key(1), (1, 2, 3, 32))
    np.testing.assert_array_equal(jax.jit(lambda key: network(init(key), x))(jax.random.key(0)), x)
    params = drawn(jax.eval_shape(init, jax.random.key(0)))

    def loop(x):
        # 32 groups of one channel
        normed = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
        tokens = (normed * params["norm"]["scale"] + params["norm"]["bias"]).reshape(6, 32)
        qkv = tokens @ params["qkv"]["kernel"] + params["qkv"]["bias"]
        heads = []
        for head in range(4):
            q, k, v = (qkv[:, part * 32 + 8 * head :][:, :8] for part in range(3))
            scores = np.exp(q @ k.T / np.sqrt(8))
            heads.append(scores / scores.sum(1, keepdims=True) @ v)
        return x + (np.concatenate(heads, 1) @ params["out"]["kernel"] + params["out"]["bias"]).reshape(x.shape)

    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    np.testing.assert_allclose(jax.jit(network)(single, x), loop(np.asarray(x, np.float64)), atol=1e-5)
    gradients = [jax.jit(jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p, x)))))(single) for f in (network, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_text_is_not_asked_for():
    network, shapes = make()
    x = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    assert jax.eval_shape(network, shapes, x, jax.ShapeDtypeStruct((2,), jnp.float32)).shape == x.shape
    assert not any("context" in path or "classes" in path for path in trees.flatten(shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="plan"), "found model.attention='plan', expected one of"),
        (dict(num_classes=10), "found 10 classes, and no place for them in plain attention"),
        (dict(transformer_depth=(0, 2)), r"found transformer_depth=\(0, 2\) for plain attention, expected 0 or 1"),
        (dict(head_dim=48), "found heads of 48 for 128 channels"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
