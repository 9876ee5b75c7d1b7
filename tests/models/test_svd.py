"""The U-Net of Stable Video Diffusion against diffusers under drawn weights, in groups, and with reused features."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_by_one import OneByOne, distance, draw, epsilons, from_torch, their_epsilons, to_torch

from diffjax.core import trees
from diffjax.models.svd import PRESETS, Given, SVDUNet, Transformer
from diffjax.models.video_blocks import ANCHORS
from diffjax.nn.functional import abstract, functionalize
from diffjax.nn.groups import PLAIN
from diffjax.weights import keymap, svd

# 64 channels are 32 groups of two: what is added to a group of one channel is gone after its normalisation
SMALL = dict(width=64, channel_mult=(1, 2), num_blocks=1, transformer_depth=(1, 0), heads=(2, 4), context_width=24)
CASES = {  # our options, frames and size
    "three levels": (SMALL | dict(channel_mult=(1, 1, 2), transformer_depth=(1, 1, 0), heads=(2, 4, 4)), 5, (8, 12)),
    "odd size": (SMALL | dict(num_blocks=2), 7, (7, 9)),
}
# float32 sums in another order; 1.4e-6 was measured
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def unet_class(transformers):
    del transformers  # which diffusers imports
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return diffusers.UNetSpatioTemporalConditionModel


def theirs(unet_class, width=320, channel_mult=(1, 2, 4, 4), num_blocks=2, transformer_depth=(1, 1, 1, 0),
           heads=(5, 10, 20, 20), context_width=1024, **_):  # fmt: skip
    """Their network of our configuration."""
    kinds = ["CrossAttn" if depth else "" for depth in transformer_depth]
    return unet_class(
        block_out_channels=tuple(width * mult for mult in channel_mult), layers_per_block=num_blocks,
        down_block_types=tuple(f"{kind}DownBlockSpatioTemporal" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)),
        num_attention_heads=tuple(heads), cross_attention_dim=context_width,
    )  # fmt: skip


def shapes_of(options):
    return abstract(lambda rngs: SVDUNet(**options, rngs=rngs))


def method(options, name="__call__", **static):
    network = functionalize(lambda rngs: SVDUNet(**options, rngs=rngs), name)[0]
    return jax.jit(functools.partial(network, **static))


@functools.cache
def kept():
    """Inputs of the small network, and anchor -> (output, feature), in one program: nearly all is common to them."""
    keep = functionalize(lambda rngs: SVDUNet(**SMALL, rngs=rngs), "keep")[0]
    given = inputs(3, (5, 6))
    outputs = jax.jit(lambda *given: {anchor: keep(*given, anchor) for anchor in ANCHORS})
    return given, outputs(params_of_small(), *given)


@functools.cache
def inputs(frames, size, tokens=1, seed=0):
    """Two videos, the second without its picture."""
    random, given = np.random.default_rng(seed), np.array([1.0, 0.0], np.float32)
    x = random.standard_normal((2, frames, *size, 4)).astype(np.float32)
    cond = {
        "image": random.standard_normal((2, tokens, 24)).astype(np.float32) * given.reshape(2, 1, 1),
        "image_latents": random.standard_normal((2, *size, 4)).astype(np.float32) * given.reshape(2, 1, 1, 1),
        "control": np.array([[6, 127, 0.02], [24, 40, 0.1]], np.float32),
    }
    return jax.tree.map(jnp.asarray, (x, jnp.array([1.63777, -1.2]), cond))


def drawn(shapes):
    """Kernels over the root of their inputs, scales about one, blends far from one half."""
    random = np.random.default_rng(0)

    def leaf(path, shape):
        inputs = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 10
        values = random.standard_normal(shape.shape) / np.sqrt(inputs) + (path[-1].key == "scale")
        return jnp.asarray(5 * values if path[-1].key == "mix_factor" else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def params_of_small():
    return drawn(shapes_of(SMALL))


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(unet_class, golden_weights, case):
    import torch

    options, frames, size = CASES[case]
    module = theirs(unet_class, **options)
    weights = draw(module, golden_weights)
    params = keymap.to_params(svd.unet(), weights, shapes_of(options))
    written = keymap.to_weights(svd.unet(), params)
    assert written.keys() == weights.keys() and all(np.array_equal(written[name], weights[name]) for name in weights)
    x, noise_label, cond = inputs(frames, size)
    picture = jnp.broadcast_to(cond["image_latents"][:, None], x.shape)
    given = map(torch.tensor, map(np.array, (noise_label, cond["image"], cond["control"])))
    expected = from_torch(module(to_torch(jnp.concatenate([x, picture], axis=-1)), *given).sample)
    found = method(options)(params, x, noise_label, cond)
    assert 0.2 < expected.std() < 5
    assert distance(found, expected) < TOLERANCE


def test_has_the_weights_of_the_published_network(unet_class, fits):
    import torch

    assert PRESETS["svd_xt"] == PRESETS["svd"] | dict(num_frames=25)
    shapes = shapes_of(PRESETS["svd"])
    assert trees.count(shapes) == 1_524_623_082
    with torch.device("meta"):
        module = theirs(unet_class)
    fits(svd.unet(), module, shapes)
    assert epsilons(lambda rngs: SVDUNet(rngs=rngs), svd.unet()) == their_epsilons(module)


@pytest.mark.fast
def test_groups_part_by_part():
    """No operator looks beyond its part; the first four frames are of both videos."""
    run, (given, outputs) = OneByOne(2), kept()
    expected = outputs["literal"][0]
    found = method(SMALL, run=run)(params_of_small(), *given)
    assert distance(found, expected) < 1e-5  # sums of products in another order: 1.4e-6 was measured
    axes = {name: (axis.name, length) for name, (axis, length, _) in run.seen.items()}
    assert axes["conv_in"] == axes["down_blocks/0/resample"] == axes["conv_out"] == ("frames", 6)
    assert run.seen["up_blocks/1/resnets/0/spatial"][2] == ("resample", "join", "resnet")
    assert run.seen["up_blocks/1/resnets/1/spatial"][2] == ("join", "resnet")
    for path, rows in (("down_blocks/0", 5), ("mid_block", 3), ("up_blocks/1", 5)):
        assert axes[f"{path}/resnets/0/spatial"] == axes[f"{path}/attentions/0/spatial"] == ("frames", 6)
        for name in ("resnets/0/temporal/conv1", "resnets/0/temporal/conv2", "attentions/0/temporal"):
            assert axes[f"{path}/{name}"] == ("rows", rows)
        assert axes[f"{path}/attentions/0/spatial/tokens"] == ("tokens", {5: 30, 3: 9}[rows])
    assert len(axes) == 3 + 3 * 8 + 3 * 4


def test_features_are_reused():
    ((x, noise_label, cond), outputs), params = kept(), params_of_small()
    for anchor, (out, feature) in outputs.items():
        assert feature.shape == {"deepcache": (6, 3, 3, 128)}.get(anchor, (6, 5, 6, 64))
        reuse = functools.partial(method(SMALL, "reuse", anchor=anchor), params)
        again = reuse(feature, x, noise_label, cond)
        assert distance(again, out) < 1e-6  # the same sums
        for other in (reuse(feature, x[:, ::-1], noise_label, cond), reuse(feature, x, noise_label + 1, cond)):
            assert np.array_equal(other, again) if anchor == "literal" else distance(other, again) > 1e-3
        assert distance(reuse(feature[:, ::-1], x, noise_label, cond), again) > 1e-2


def test_one_token_needs_no_attention():
    """Its weight is 1: given twice, each has the weight one half, and the sum is the same."""
    network, init = functionalize(lambda rngs: Transformer(64, 24, 2, rngs=rngs))
    params, random = drawn(jax.eval_shape(init, jax.random.key(0))), np.random.default_rng(1)
    video = jnp.array([0, 0, 0, 1, 1, 1])

    @jax.jit
    def apply(x, context):
        return network(params, x, Given(3, video, jnp.zeros((2, 1)), context), PLAIN) - x

    x, context = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((6, 3, 4, 64), (2, 2, 24)))
    found = apply(x, context[:, :1])
    assert distance(found, apply(x, jnp.repeat(context[:, :1], 2, axis=1))) < 1e-6  # of float32
    assert distance(found, apply(x, context)) > 1e-2  # another token beside it


def test_a_new_network_gives_zero():
    init = functionalize(lambda rngs: SVDUNet(**SMALL, rngs=rngs))[1]

    def zeros(key):  # only what is asked for is computed
        names = ("conv_out", "conv2", "proj_out")
        return [leaf for path, leaf in trees.flatten(init(key)).items() if any(name in path for name in names)]

    found = jax.jit(zeros)(jax.random.key(0))
    assert len(found) == 2 * (1 + 2 * 8 + 4) and not any(map(np.any, found))


def test_half_precision_stays_what_it_is():
    """A group whose result has another type than what it is given could not run in place."""

    class Typed(OneByOne):
        def __call__(self, name, axis, operators, x, *others):
            out = PLAIN(name, axis, operators, x, *others)
            assert x.dtype == out.dtype == jnp.bfloat16, self.prefix + name
            return out

        def within(self, name):
            return Typed(1, f"{self.prefix}{name}/")

    x, noise_label, cond = inputs(3, (5, 6))
    network = functionalize(lambda rngs: SVDUNet(**SMALL, rngs=rngs))[0]
    given = params_of_small(), x.astype(jnp.bfloat16), noise_label, cond
    assert jax.eval_shape(functools.partial(network, run=Typed(1)), *given).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=None), "cond['image'] is missing"),
        (dict(image=(2, 1, 23)), "found cond['image'] of shape (2, 1, 23), expected (2, any, 24)"),
        (dict(image_latents=(2, 3, 5, 6, 4)), "expected (2, 5, 6, 4)"),
        (dict(control=(2, 6)), "expected (2, 3)"),
        (dict(x=(6, 5, 6, 4)), "expected (videos, frames, height, width, 4)"),
        (dict(x=(2, 3, 5, 6, 8)), "expected (videos, frames, height, width, 4)"),
        (dict(anchor="temporall"), "did you mean 'temporal'?"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    change = dict(change)
    x, noise_label, cond = inputs(3, (5, 6))
    anchor = change.pop("anchor", "literal")
    shaped = {name: shape and jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in change.items()}
    x, cond = shaped.pop("x", x), cond | shaped
    network = functionalize(lambda rngs: SVDUNet(**SMALL, rngs=rngs), "keep")[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(functools.partial(network, anchor=anchor), params_of_small(), x, noise_label, cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=(2,)), "found transformer_depth=(1, 0) and heads=(2,) for 2 levels"),
        (dict(transformer_depth=(2, 0)), "expected 0 or 1"),
        (dict(heads=(3, 4)), "found 3 heads for 64 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shapes_of(SMALL | options)
