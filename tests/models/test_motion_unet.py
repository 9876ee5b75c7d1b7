"""AnimateDiff's U-Net against diffusers under drawn weights, its groups part by part, reuse, files of its weights."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_by_one import OneByOne, distance, epsilons, from_torch, their_epsilons, to_torch
from test_unet import torch_weights

from diffjax.core import trees
from diffjax.models.motion_unet import ANCHORS, PRESETS, MotionModule, MotionUNet
from diffjax.nn.functional import abstract, functionalize
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, TOKENS
from diffjax.weights import keymap, load, motion
from diffjax.weights import unet as unet_weights

# 64 channels are 32 groups of two: what is added to a group of one channel is gone after its normalisation
TINY = dict(
    image_size=4, channels=4, out_channels=4, width=64, channel_mult=(1, 2), num_blocks=1, transformer_depth=(1, 0),
    heads=2, context_width=12, motion_heads=4,
)  # fmt: skip
TABLE = unet_weights.diffusers()
CONFIG = dict(
    in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=12,
    num_attention_heads=2, motion_num_attention_heads=4,
    down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
    up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
)  # fmt: skip


@pytest.fixture(scope="module")
def classes(transformers):
    """UNetMotionModel, MotionAdapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return diffusers.UNetMotionModel, diffusers.MotionAdapter


@functools.cache
def made(method="__call__", **options):
    """The network, and shapes of its parameters."""
    network, init = functionalize(lambda rngs: MotionUNet(**TINY | options, rngs=rngs), method)
    return network, jax.eval_shape(init, jax.random.key(0))


def drawn(shapes, seed=0):
    """Weights that are nowhere zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(random.standard_normal(a.shape) / np.sqrt(np.prod(a.shape[-4:-1])), jnp.float32), shapes
    )


def inputs(frames=5, size=(8, 12), seed=1):
    random = np.random.default_rng(seed)
    x, text = random.standard_normal((2, frames, *size, 4)), random.standard_normal((2, 3, 12))
    return jnp.asarray(x, jnp.float32), jnp.array([3.0, 999.0]), {"text": jnp.asarray(text, jnp.float32)}


@pytest.mark.parametrize(
    ("options", "config", "cases"),
    [
        pytest.param(dict(num_blocks=2), dict(layers_per_block=2), {"deepcache": dict()}, id="mid"),
        # sizes that halve to 3 x 4 and 5 x 3, and the first motion modules
        pytest.param(
            dict(mid_motion=False, max_frames=24), dict(use_motion_mid_block=False, motion_max_seq_length=24),
            {"temporal": dict(frames=3, size=(5, 8)), "literal": dict(frames=1, size=(9, 6))}, id="odd",
        ),
    ],
)  # fmt: skip
def test_equals_diffusers(classes, options, config, cases):
    import torch

    theirs = classes[0](**CONFIG | config).eval()
    named = load.Weights(torch_weights(theirs), "theirs")
    network, expected = made("keep", **options)
    params = motion.merge(*motion.split(named), expected, TABLE, options.get("max_frames", 32))
    back = keymap.to_weights(TABLE, params["unet"]) | motion.to_weights(params["motion"], options.get("max_frames", 32))
    assert back.keys() == named.keys()
    # the sines of numbers up to 31 in float32; all others bit for bit
    for name, array in back.items():
        np.testing.assert_allclose(array, named[name], rtol=0, atol=5e-6 if name.endswith(".pe") else 0)
    last, features = theirs.up_blocks[-1].motion_modules, []
    for (anchor, shape), after in zip(cases.items(), ({"deepcache": 2, "temporal": 1, "literal": 0}[a] for a in cases)):
        hook = last[len(last) - 1 - after].register_forward_hook(lambda *args: features.append(args[-1]))
        x, t, cond = inputs(**shape)
        with torch.no_grad():
            found = theirs(
                to_torch(x).transpose(1, 2), torch.from_numpy(np.array(t)),
                torch.from_numpy(np.repeat(np.array(cond["text"]), x.shape[1], axis=0)),
            ).sample  # fmt: skip
        found = from_torch(found.transpose(1, 2))
        hook.remove()
        assert 0.3 < np.std(found) < 3
        out, feature = jax.jit(network, static_argnums=4)(params, x, t, cond, anchor)
        # float32 sums of up to a thousand products in another order, measured at a tenth of this
        assert distance(out, found) < 2e-5
        assert distance(feature, from_torch(features[-1])) < 2e-5


def test_normalises_with_the_epsilons_of_diffusers(classes):
    theirs = classes[0](**CONFIG)
    modules = motion.split(load.Weights(torch_weights(theirs), "theirs"))[1]
    parts = {"unet": TABLE, "motion": motion.keymap_of(modules)}
    found = [epsilons(lambda rngs: MotionUNet(**TINY, rngs=rngs), table, part) for part, table in parts.items()]
    assert found[0] | found[1] == their_epsilons(theirs)


@pytest.mark.fast
@pytest.mark.parametrize("per_frame_norm", [False, True])
def test_a_motion_module_equals_its_formula(per_frame_norm):
    """The second as in the authors' code: a video's frames are a batch of pictures until they attend."""
    module, init = functionalize(lambda rngs: MotionModule(64, 4, 1, per_frame_norm, rngs=rngs))
    # frames of different means; so small that the norm's 1e-6 counts
    x = 3 * inputs(frames=3, size=(2, 5))[0][..., :1] + inputs(frames=48, size=(2, 5))[0].reshape(2, 3, 2, 5, 64)
    x = 1e-3 * x

    def by_hand(params, x):
        def linear(name, x, part=slice(None)):
            node = functools.reduce(lambda node, key: node[key], name.split("/"), params)
            kernel = node["kernel"] if node["kernel"].ndim == 2 else node["kernel"][0]
            return x @ kernel[:, part] + (jnp.ravel(node["bias"]) if "bias" in node else 0)

        def layer_norm(name, x):
            node = params["blocks"][name]
            return jax.nn.standardize(x, epsilon=1e-5) * node["scale"][0] + node["bias"][0]

        grouped = x.reshape(*x.shape[:-1], 32, 2)
        axes = (2, 3, 5) if per_frame_norm else (1, 2, 3, 5)
        normed = jax.nn.standardize(grouped, axis=axes, epsilon=1e-6).reshape(x.shape)
        z = linear("proj_in", normed * params["norm"]["scale"] + params["norm"]["bias"])
        place = jnp.arange(3.0)[:, None] / 10_000 ** (jnp.arange(0, 64, 2) / 64)
        table = jnp.stack([jnp.sin(place), jnp.cos(place)], axis=-1).reshape(3, 1, 1, 64)
        for number in "12":
            y = layer_norm(f"norm{number}", z) + table
            name, size = f"blocks/attention{number}", 16
            heads = []
            for first in range(0, 64, size):
                parts = (slice(start + first, start + first + size) for start in (0, 64, 128))
                q, k, v = (linear(f"{name}/qkv", y, part) for part in parts)  # noqa: B023
                weights = jax.nn.softmax(jnp.einsum("bthwc,bshwc->btshw", q, k) / 4, axis=2)
                heads.append(jnp.einsum("btshw,bshwc->bthwc", weights, v))
            z = z + linear(f"{name}/out", jnp.concatenate(heads, axis=-1))
        value, gate = jnp.split(linear("blocks/mlp/expand", layer_norm("norm3", z)), 2, axis=-1)
        return x + linear("proj_out", z + linear("blocks/mlp/contract", value * jax.nn.gelu(gate, approximate=False)))

    params = drawn(jax.eval_shape(init, jax.random.key(0)))
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(by_hand)(params, x)
    run = jax.jit(module, static_argnums=(2, 3))
    found = run(params, x, PLAIN, "motion")
    np.testing.assert_allclose(found, expected, atol=3e-5)  # float32, values up to 10
    np.testing.assert_allclose(run(params, x, OneByOne(3), "motion"), expected, atol=3e-5)
    assert jnp.abs(found - x).max() > 0.3
    new = params | {"proj_out": jax.tree.map(jnp.zeros_like, params["proj_out"])}
    np.testing.assert_array_equal(run(new, x, PLAIN, "motion"), x)
    assert not np.any(MotionModule(32, 4, 1, per_frame_norm, rngs=nnx.Rngs(0)).proj_out.kernel)


def test_groups_give_the_same_part_by_part():
    run = OneByOne(2)
    network, shapes = made()
    params, (x, t, cond) = drawn(shapes), inputs(3, (5, 4))
    whole = jax.jit(network)(params, x, t, cond)
    alone = jax.jit(lambda *args: network(*args, run=run))(params, x, t, cond)
    assert distance(alone, whole) < 1e-5  # float32 sums in another order
    names = {axis: {name for name, (found, *_) in run.seen.items() if found is axis} for axis in (FRAMES, ROWS, TOKENS)}
    levels = [("down_blocks/0", 1), ("down_blocks/1", 1), ("mid_block", 2), ("up_blocks/0", 2), ("up_blocks/1", 2)]
    layers = [(path, index) for path, number in levels for index in range(number)]
    spatial = {f"{path}/resnets/{index}/spatial" for path, index in layers}
    assert names[FRAMES] == spatial | {"conv_in", "conv_out", "down_blocks/0/resample"}
    assert names[ROWS] == {f"{path}/motion_modules/{index}" for path, index in layers} - {"mid_block/motion_modules/1"}
    attending = [("down_blocks/0", 0), ("mid_block", 0), ("up_blocks/1", 0), ("up_blocks/1", 1)]
    assert names[TOKENS] == {f"{path}/resnets/{index}/spatial/tokens" for path, index in attending}
    assert run.seen["up_blocks/1/resnets/0/spatial"][1:] == (6, ("resample", "join", "resnet", "attention"))


def test_a_feature_is_used_again():
    options = dict(channel_mult=(1,), transformer_depth=(0,))
    (keep, shapes), (reuse, _) = (made(method, **options) for method in ("keep", "reuse"))
    params, (x, t, cond) = drawn(shapes), inputs(2, (4, 4))
    both = jnp.stack([x, inputs(2, (4, 4), seed=2)[0]])

    def outputs(params, both, t, cond):
        for anchor in ANCHORS:
            out, feature = keep(params, both[0], t, cond, anchor)
            yield out, jax.vmap(lambda x: reuse(params, feature, x, t, cond, anchor))(both)  # noqa: B023

    found = jax.jit(lambda *args: dict(zip(ANCHORS, outputs(*args), strict=True)))(params, both, t, cond)
    for anchor, (whole, (again, changed)) in found.items():
        assert distance(again, whole) < 1e-5
        assert (distance(changed, whole) < 1e-6) == (anchor == "literal")


def test_parameters():
    shapes = abstract(lambda rngs: MotionUNet(**PRESETS["animatediff_v2"], rngs=rngs))
    unet, modules, middle = map(trees.count, (shapes["unet"], shapes["motion"], shapes["motion"]["mid_block"]))
    assert unet == 859_520_964 and unet + modules == 1_312_730_244 and round(middle / 1e6, 2) == 36.07


def test_bfloat16_products_keep_float32_weights():
    (network, shapes), same = made(dtype=jnp.bfloat16), made()[1]
    assert shapes == same
    for dtype in (jnp.float32, jnp.bfloat16):
        x, t, cond = inputs(2, (4, 4))
        out = jax.eval_shape(network, shapes, x.astype(dtype), t, cond)
        assert (out.shape, out.dtype) == ((2, 2, 4, 4, 4), jnp.bfloat16)


def test_files_of_the_authors(classes):
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    adapter = classes[1](block_out_channels=(64, 128), motion_layers_per_block=1, motion_num_attention_heads=4).eval()
    named = torch_weights(adapter)
    shapes, unet = made()[1], {"down_blocks.0": np.zeros(1)}
    assert motion.options(load.Weights(named, "")) == dict(mid_motion=True, max_frames=32)
    table = motion.keymap_of(named)
    params = keymap.to_params(table, named, shapes["motion"])
    original = motion.to_weights(params, 32, original=True)
    name = "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe"
    assert original[name].shape == (1, 32, 128) and len(original) == len(named) + 7  # a second table in each
    converted = convert_animatediff_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == {name for name in named if not name.endswith(".pe")}
    assert all(np.array_equal(converted[name], named[name]) for name in converted)
    again = keymap.to_params(motion.keymap_of(original), original, shapes["motion"])
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # saved in distributed training, without positions and middle
    kept = [name for name in original if "mid_block" not in name and not name.endswith(".pe")]
    bare = {f"module.{name}": original[name] for name in kept}
    assert motion.options(load.Weights(bare, "")) == dict(mid_motion=False)
    assert not unet.keys() & motion.split(load.Weights(bare | unet, ""))[1].keys()


def weights(change=lambda named: named):
    shapes = made()[1]
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes)
    named = change(motion.to_weights(zeros["motion"], 32))
    return load.Weights(keymap.to_weights(TABLE, zeros["unet"]), "unet"), load.Weights(named, "modules"), shapes, TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: {f"{name}_lora.down": a for name, a in named.items()}, "found a motion LoRA"),
        (lambda named: {}, "expected motion modules, which begin with"),
        (lambda named: {k: v for k, v in named.items() if "blocks.1" not in k}, "for a U-Net of 1 levels, expected 2"),
        (lambda named: {k: v[:, :24] if "pos_embed" in k else v for k, v in named.items()}, "know 24 frames"),
        (lambda named: {k: v + 0.1 if "pos_embed" in k else v for k, v in named.items()}, "has other positions"),
        (lambda named: {k: v for k, v in named.items() if "mid_block" not in k}, "missing: mid_block.motion_modules.0"),
    ],
)
def test_other_files_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        motion.merge(*weights(change), 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((2, 33, 4, 4, 4))), "found 33 frames, expected up to 32: .*model.max_frames"),
        (dict(x=jnp.zeros((2, 4, 4, 4))), r"expected \(batch, frames, height, width, 4\)"),
        (dict(text=jnp.zeros((4, 3, 12))), r"shape \(4, 3, 12\), expected \(2, any, 12\)"),
        (dict(anchor="deep"), "unknown anchor 'deep'; did you mean 'deepcache'"),
        (dict(motion_heads=5), "found 5 heads for 64 channels.*model.motion_heads"),
    ],
)
def test_wrong_input_is_refused(change, message):
    x, t, cond = inputs(2, (4, 4))
    given = dict(x=x, text=cond["text"], anchor="literal") | change
    with pytest.raises(ValueError, match=message):
        keep, shapes = made("keep", **{key: value for key, value in change.items() if key == "motion_heads"})
        jax.eval_shape(functools.partial(keep, anchor=given["anchor"]), shapes, given["x"], t, {"text": given["text"]})
