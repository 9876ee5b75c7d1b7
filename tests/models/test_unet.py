"""The latent U-Net against diffusers under drawn weights, sizes of the published networks, and its conditions."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffjax.core import trees
from diffjax.models import unet_blocks
from diffjax.models.unet import PRESETS, UNet
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import unet as weights

# 64 channels are 32 groups of two: what is added to a group of one channel is gone after its normalisation
TINY = dict(
    image_size=4, channels=2, out_channels=2, width=64, channel_mult=(1, 2), num_blocks=1, transformer_depth=(1, 0),
    heads=2, context_width=12,
)  # fmt: skip
MINI, BARE = (dict(channel_mult=(1,), transformer_depth=(depth,)) for depth in (1, 0))
# our options and those of the same network in diffusers
COMMON = dict(in_channels=2, out_channels=2, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=12)
DOWN, DOWN_ATTENDING, UP, UP_ATTENDING = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
KINDS = {
    # 1x1 convolutions around transformers, 8 heads whatever the width
    "sd_v1": (
        dict(num_blocks=2, heads=8),
        dict(layers_per_block=2, attention_head_dim=8, down_block_types=(DOWN_ATTENDING, DOWN),
             up_block_types=(UP, UP_ATTENDING)),
    ),
    # matrices, heads 16 wide
    "sd_v2": (
        dict(heads=0, head_dim=16),
        dict(attention_head_dim=(4, 8), use_linear_projection=True, down_block_types=(DOWN_ATTENDING, DOWN),
             up_block_types=(UP, UP_ATTENDING)),
    ),
    # deeper transformers below the first level, sizes and pooled text
    "sdxl": (
        dict(head_dim=16, transformer_depth=(0, 2), pooled_width=10, controls=6),
        dict(attention_head_dim=(4, 8), use_linear_projection=True, transformer_layers_per_block=(1, 2),
             addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=1546,
             down_block_types=(DOWN, DOWN_ATTENDING), up_block_types=(UP_ATTENDING, UP)),
    ),
    # one token, of a table that is not in diffusers' network
    "ldm": (
        dict(heads=1, num_classes=5, transformer_depth=(0, 1)),
        dict(attention_head_dim=1, down_block_types=(DOWN, DOWN_ATTENDING), up_block_types=(UP_ATTENDING, UP)),
    ),
}  # fmt: skip
# the whole networks, as their folders' config.json have them
V1 = dict(cross_attention_dim=768, attention_head_dim=8)
PUBLISHED = {
    "sd_v1": V1,
    "sd_v2": V1 | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
    "sdxl": KINDS["sdxl"][1] | dict(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), projection_class_embeddings_input_dim=2816,
        down_block_types=(DOWN, DOWN_ATTENDING, DOWN_ATTENDING), up_block_types=(UP_ATTENDING, UP_ATTENDING, UP),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def unet_class(transformers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return diffusers.UNet2DConditionModel


def make(method="__call__", **options):
    """The compiled network, and shapes of its parameters."""
    network, init = functionalize(lambda rngs: UNet(**TINY | options, rngs=rngs), method)
    return jax.jit(network), jax.eval_shape(init, jax.random.key(0))


@functools.cache
def published(preset):
    network, init = functionalize(lambda rngs: UNet(**PRESETS[preset], rngs=rngs))
    return network, jax.eval_shape(init, jax.random.key(0))


def same(some, others):
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in others)


def drawn(shapes):
    """Weights that are nowhere zero."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(random.standard_normal(a.shape) / np.sqrt(np.prod(a.shape[-4:-1])), jnp.float32), shapes
    )


def inputs(batch=2, size=(4, 4)):
    random = np.random.default_rng(1)
    x, context = random.standard_normal((batch, *size, 2)), random.standard_normal((batch, 3, 12))
    return jnp.asarray(x, jnp.float32), jnp.linspace(3.0, 999.0, batch), {"text": jnp.asarray(context, jnp.float32)}


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


@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(unet_class, kind):
    import torch

    options, config = KINDS[kind]
    theirs = unet_class(**COMMON | config).eval()
    named = torch_weights(theirs)
    (network, shapes), (x, t, cond) = make(**options), inputs(size=(8, 12))
    given = dict(encoder_hidden_states=cond["text"])
    if kind == "ldm":
        table = np.random.default_rng(2).standard_normal((6, 12)).astype(np.float32)
        named |= {"classes.weight": table}
        cond, given = {"label": jnp.array([3, 5])}, dict(encoder_hidden_states=table[[3, 5], None])
    if kind == "sdxl":
        pooled, control = np.linspace(-1, 1, 20, dtype=np.float32).reshape(2, 10), np.arange(12, dtype=np.float32)
        cond |= {"pooled": jnp.asarray(pooled), "control": jnp.asarray(control.reshape(2, 6))}
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": control.reshape(2, 6)}
    table = weights.keymap_of(named, (1,))
    params = keymap.to_params(table, named, shapes)
    assert same(keymap.to_weights(table, params), named)
    with torch.no_grad():
        to_torch = functools.partial(jax.tree.map, lambda a: torch.from_numpy(np.array(a)))
        expected = theirs(to_torch(x).permute(0, 3, 1, 2), to_torch(t), **to_torch(given)).sample
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert 0.3 < np.std(expected) < 1.5
    # float32 sums of up to a thousand products in another order, measured at a sixth of this
    np.testing.assert_allclose(network(params, x, t, cond), expected, atol=3e-5)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_has_the_weights_of_the_published_network(unet_class, fits, preset):
    import torch

    with torch.device("meta"):
        theirs = unet_class(**PUBLISHED[preset])
    fits(weights.diffusers(preset != "sd_v1"), theirs, published(preset)[1])


# with the products of a convolution and the zeros around, which the compiler's own account leaves out
SIZES = {  # parameters without the table of classes, GFLOP by size of the latent
    "sdxl": (2_567_463_684, {32: 427.8, 64: 1588.8}),
    "ldm4g": (400_920_579, {64: 208.5}),
    "default": (612_114_564, {32: 151.6, 64: 610.0}),
    "sgm_imagenet": (407_307_012, {}),
}


@pytest.mark.parametrize("preset", [pytest.param("default", marks=pytest.mark.fast), "sdxl", "ldm4g", "sgm_imagenet"])
def test_parameters_and_flops(preset):
    options, (network, params), (parameters, flops) = PRESETS[preset], published(preset), SIZES[preset]
    classes = trees.count(params.get("classes", {}))
    assert trees.count(params) - classes == parameters
    assert classes == (1001 * options["context_width"] if "num_classes" in options else 0)
    pooled = options.get("pooled_width", 0)
    shapes = {"text": (1, 77, options["context_width"]), "pooled": (1, pooled), "control": (1, 6)}
    cond = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    cond["label"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    for size, expected in flops.items():
        x = jax.ShapeDtypeStruct((1, size, size, options["channels"]), jnp.float32)
        traced = jax.make_jaxpr(network)(params, x, jax.ShapeDtypeStruct((1,), jnp.float32), cond)
        assert abs(products(traced.jaxpr) / 1e9 - expected) < 0.06  # the table has one digit


def products(jaxpr):
    """FLOPs of all products of matrices and convolutions, those of loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        outputs, name = equation.outvars[0].aval, equation.primitive.name
        if name == "dot_general":
            (over, _), _ = equation.params["dimension_numbers"]
            total += 2 * outputs.size * int(np.prod([equation.invars[0].aval.shape[axis] for axis in over]))
        elif name == "conv_general_dilated":
            total += 2 * outputs.size * int(np.prod(equation.invars[1].aval.shape[:3]))
        else:
            inner = [p.jaxpr if hasattr(p, "jaxpr") else p for p in equation.params.values()]
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(products(p) for p in inner if hasattr(p, "eqns"))
    return total


@pytest.mark.fast
def test_a_new_network_gives_zero():
    init = functionalize(lambda rngs: UNet(**TINY | MINI, step_condition=True, guidance_condition=True, rngs=rngs))[1]

    def zeros(key):  # only what is asked for is computed
        names = ("conv_out", "conv2", "proj_out", "map_guidance")
        return [leaf for path, leaf in trees.flatten(init(key)).items() if any(name in path for name in names)]

    found = jax.jit(zeros)(jax.random.key(0))
    assert len(found) == 2 * (1 + 5 + 4) + 1 and not any(map(np.any, found))


def test_no_label_is_the_last_row():
    network, shapes = make(**MINI, num_classes=5)
    params, (x, t, _) = drawn(shapes), inputs()
    found = [network(params, x, t, cond) for cond in ({}, {"label": jnp.array([5, 5])}, {"label": jnp.array([5, 4])})]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_step_condition():
    network, shapes = make(**BARE, step_condition=True)
    params, (x, t, cond) = drawn(shapes), inputs()
    plain, told = network(params, x, t, cond), network(params, x, t, cond | {"step": jnp.float32(4)})
    assert np.abs(plain - told).max() > 1e-3

    flat = trees.flatten(params)

    def changed(leaf_of):
        return jax.tree.map_with_path(lambda path, _: leaf_of("/".join(str(entry.key) for entry in path)), params)

    zeroed = changed(lambda name: flat[name] * ("step_shift" not in name))
    np.testing.assert_array_equal(plain, network(zeroed, x, t, cond | {"step": jnp.float32(4)}))
    # with the noise's weights in the step's layers everywhere, noise level and step can change places
    same = changed(lambda name: flat[name.replace("step_shift", "shift").replace("step/", "time/")])
    found = [network(same, x, jnp.full(2, a), cond | {"step": jnp.float32(b)}) for a, b in ((7.0, 11), (11.0, 7))]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert np.abs(found[0] - network(same, x, jnp.full(2, 7.0), cond | {"step": jnp.float32(7)})).max() > 1e-3


def test_step_parameters():
    style = unet_blocks.Style(8, step_condition=True, zero_init_step=True)
    zero = unet_blocks.ResBlock(32, 32, style, rngs=nnx.Rngs(0))
    assert not np.any(zero.step_shift.kernel) and not np.any(zero.step_shift.bias) and np.any(zero.shift.kernel)
    # of Zhou 2024's released network for Stable Diffusion 1.5
    told = trees.flatten(abstract(lambda rngs: UNet(**PRESETS["sd_v1"], step_condition=True, rngs=rngs)))
    branch = {path: leaf for path, leaf in told.items() if "step" in path}
    assert (trees.count(branch), trees.count(told)) == (27_875_520, 859_520_964 + 27_875_520)


def test_guidance_condition_starts_as_the_base_network_and_then_matters():
    network, shapes = make(**BARE, guidance_condition=True)
    params, (x, t, cond) = drawn(shapes), inputs()
    told = cond | {"guidance_scale": jnp.array([1.0, 4.0])}
    zeroed = params | {"map_guidance": jax.tree.map(jnp.zeros_like, params["map_guidance"])}
    plain = network(params, x, t, cond)
    np.testing.assert_array_equal(plain, network(zeroed, x, t, told))
    assert np.abs(plain - network(params, x, t, told)).max() > 1e-3


def test_bottleneck_is_before_the_way_up():
    bottleneck, shapes = make("bottleneck", **BARE)
    params, (x, t, cond) = drawn(shapes), inputs()
    found = bottleneck(params, x, t, cond)
    assert found.shape == (2, 4 * 4)
    other = params | {"up_blocks": jax.tree.map(jnp.zeros_like, params["up_blocks"])}
    np.testing.assert_array_equal(found, bottleneck(other, x, t, cond))
    other = params | {"mid_block": jax.tree.map(lambda a: a + 0.1, params["mid_block"])}
    assert np.abs(found - bottleneck(other, x, t, cond)).max() > 1e-3


def test_a_stack_of_transformers_equals_a_loop():
    def transformer(policy):
        return functionalize(lambda rngs: unet_blocks.SpatialTransformer(32, 12, 2, depth=2, remat=policy, rngs=rngs))

    (stacked, init), (again, _) = transformer(""), transformer("nothing")
    block, _ = functionalize(lambda rngs: unet_blocks.TransformerBlock(32, 12, 2, rngs=rngs))
    params, text = drawn(jax.eval_shape(init, jax.random.key(0))), inputs(1)[2]["text"]
    x = jax.random.normal(jax.random.key(1), (1, 2, 3, 32))

    def loop(params, x, text):
        def project(name, tokens):
            return tokens @ params[name]["kernel"] + params[name]["bias"][None, None]

        norm = params["norm"]
        tokens = jax.nn.standardize(x, axis=(1, 2), epsilon=1e-6).reshape(1, 6, 32)  # 32 groups of one channel
        tokens = project("proj_in", tokens * norm["scale"][None, None] + norm["bias"][None, None])
        for layer in range(2):
            tokens = block(jax.tree.map(lambda a: a[layer], params["blocks"]), tokens, text)  # noqa: B023
        return x + project("proj_out", tokens).reshape(x.shape)

    def gradient(f):
        return jax.jit(jax.value_and_grad(lambda params: jnp.mean(jnp.square(f(params, x, text)))))(params)

    (value, grads), (same_value, same_grads) = gradient(stacked), gradient(again)
    np.testing.assert_allclose([value, same_value], jnp.mean(jnp.square(jax.jit(loop)(params, x, text))), rtol=1e-5)
    # the same sums in another order, float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, same_grads)


def test_remat_keeps_less_for_a_gradient():
    def kept(policy):
        network, shapes = make(**MINI, remat=policy)
        args = shapes, *inputs(8)
        pull = jax.eval_shape(lambda *args: jax.vjp(network, *args)[1], *args)
        return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.ndim and leaf.shape[0] == 8)

    assert kept("nothing") < 0.5 * kept("")


def test_dropout_needs_a_key_and_changes_with_it():
    network, shapes = make(**BARE, dropout=0.5)
    params, (x, t, cond) = drawn(shapes), inputs()
    outputs = [network(params, x, t, cond, key) for key in (None, jax.random.key(0), jax.random.key(1))]
    assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[1], outputs[2])
    np.testing.assert_array_equal(outputs[1], network(params, x, t, cond, jax.random.key(0)))


def test_bfloat16_products_keep_float32_weights():
    (exact, shapes), (network, same) = make(**MINI), make(**MINI, dtype=jnp.bfloat16)
    assert shapes == same
    params, (x, t, cond) = drawn(shapes), inputs()
    found, expected = network(params, x, t, cond), exact(params, x, t, cond)
    assert found.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: 0.4 % a product, and some twenty layers
    assert 0 < np.max(np.abs(found - expected)) < 0.1 * np.max(np.abs(expected))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, dict(x=jnp.zeros((2, 5, 4, 2))), "latents of 5 x 4, which cannot be halved 1 times; expected multiples"),
        ({}, dict(x=jnp.zeros((2, 4, 4, 3))), r"expected \(batch, height, width, 2\)"),
        ({}, dict(text=None), r"cond\['text'\] is missing; expected \(2, any, 12\)"),
        ({}, dict(text=jnp.zeros((2, 3, 16))), r"shape \(2, 3, 16\), expected \(2, any, 12\).*model.context_width"),
        ({}, dict(text=jnp.zeros((2, 12))), r"shape \(2, 12\), expected"),
        ({}, dict(text=jnp.zeros((1, 3, 12))), r"shape \(1, 3, 12\), expected \(2, any, 12\)"),
        (dict(pooled_width=4), {}, r"cond\['pooled'\] is missing; expected \(2, 4\)"),
        (dict(controls=6), dict(control=jnp.zeros((2, 4))), r"shape \(2, 4\), expected \(2, 6\)"),
        ({}, dict(step=jnp.float32(4)), "no step condition: set model.step_condition=True"),
        ({}, dict(guidance_scale=jnp.ones(2)), "without it: set model.guidance_condition=True"),
    ],
)
def test_wrong_input_is_refused(options, change, message):
    network, shapes = make(**dict(channel_mult=(1, 1), transformer_depth=(0, 0)) | options)
    x, t, cond = inputs()
    given = {"x": x} | cond | change
    cond = {name: value for name, value in given.items() if name != "x" and value is not None}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network, shapes, given["x"], t, cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(transformer_depth=(1, 1, 0)), "found transformer_depth=.* for 2 levels"),
        (dict(image_size=7), "latents of 7 x 7"),
        (dict(heads=5), "found 5 heads for 64 channels"),
        (dict(head_dim=48), "found heads of 48 for 64 channels"),
        (dict(width=40), "found 40 channels in 32 groups"),
        (dict(remat="dot"), "did you mean 'dots'"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
