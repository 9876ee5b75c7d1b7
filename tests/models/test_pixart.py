"""PixArt against diffusers' network under random weights, its exact sizes, and both tables of published names."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.pixart import PixArt
from diffjax.nn import stack
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights.keymap import to_params, to_weights
from diffjax.weights.pixart import DIFFUSERS, ORIGINAL

TINY = dict(image_size=8, channels=4, out_channels=8, width=48, depth=2, heads=2, text_width=20, text_length=5)


@pytest.fixture(scope="module")
def reference(transformers):
    """(torch, diffusers' class)."""
    del transformers  # which diffusers imports
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return torch, package.PixArtTransformer2DModel


def make(**options):
    network, init = functionalize(lambda rngs: PixArt(**TINY | options, rngs=rngs))
    return jax.jit(network), init


def drawn(init):
    """Weights that are nowhere zero."""
    random = np.random.default_rng(5)

    def draw(a):
        return np.float32(random.standard_normal(a.shape) * (0.2 if len(a.shape) < 3 else a.shape[-2] ** -0.5))

    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def inputs(height=8, width=8):
    random = np.random.default_rng(1)
    x, text = (np.float32(random.standard_normal(shape)) for shape in ((2, height, width, 4), (2, 5, 20)))
    return x, np.array([3.0, 900.0], np.float32), text


MASK = np.array([[True, True, False, False, False], [True, True, True, True, False]])
SIZES = np.array([[512.0, 384.0, 4 / 3], [1024.0, 1024.0, 1.0]], np.float32)


@pytest.mark.parametrize(("controls", "masked", "scale"), [(0, True, 1), (3, True, 2), (0, False, 2)])
def test_equals_diffusers_under_random_weights(reference, controls, masked, scale):
    torch, model = reference
    net = model(
        num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, num_layers=3, sample_size=16,
        caption_channels=20, use_additional_conditions=bool(controls), interpolation_scale=scale,
    )  # fmt: skip
    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            deviation = 0.1 if parameter.ndim == 1 else 0.3 if "table" in name else parameter[0].numel() ** -0.5
            deviation *= 0.55 if name == "proj_out.weight" else 1
            parameter.copy_(torch.from_numpy(deviation * random.standard_normal(parameter.shape)))
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    network, init = make(depth=3, text_length=0, controls=controls, base_size=8 / scale)
    params = to_params(DIFFUSERS, weights, jax.eval_shape(init, jax.random.key(0)))
    x, label, text = inputs(height=16, width=12)  # not the size it was made for, nor a square
    cond = {"text": text, **({"control": SIZES} if controls else {}), **({"text_mask": MASK} if masked else {})}
    to_torch = lambda array: torch.from_numpy(np.array(array))  # noqa: E731
    with torch.no_grad():
        expected = net(
            to_torch(x).permute(0, 3, 1, 2), to_torch(text), to_torch(label),
            {"resolution": to_torch(SIZES[:, :2]), "aspect_ratio": to_torch(SIZES[:, 2:])} if controls else None,
            encoder_attention_mask=to_torch(MASK.astype(jnp.float32)) if masked else None,
        ).sample.permute(0, 2, 3, 1).numpy()  # fmt: skip
    assert 0.4 < expected.std() < 0.9
    # float32: angles of 900 are known to 5e-5. 2e-5 was measured, 1e-6 with labels of 0 and 1
    np.testing.assert_allclose(network(params, x, label, cond), expected, atol=3e-5, rtol=0)
    back = to_weights(DIFFUSERS, params)
    assert back.keys() == weights.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name])


@pytest.mark.parametrize(("size", "controls"), [(64, 0), (128, 3)])
def test_names_and_shapes_of_published_folders(reference, fits, size, controls):
    torch, model = reference
    with torch.device("meta"):
        net = model(sample_size=size, caption_channels=4096)
    fits(DIFFUSERS, net, abstract(lambda rngs: PixArt(size, 4, 8, text_length=0, controls=controls, rngs=rngs)))


# what the authors' PixArtMS of width 48, depth 1 and a caption of 5 tokens of 20 numbers has in its file
FILE = {
    "x_embedder.proj.weight": (48, 4, 2, 2), "x_embedder.proj.bias": (48,),
    "t_embedder.mlp.0.weight": (48, 256), "t_embedder.mlp.0.bias": (48,),
    "t_embedder.mlp.2.weight": (48, 48), "t_embedder.mlp.2.bias": (48,),
    "csize_embedder.mlp.0.weight": (16, 256), "csize_embedder.mlp.0.bias": (16,),
    "csize_embedder.mlp.2.weight": (16, 16), "csize_embedder.mlp.2.bias": (16,),
    "ar_embedder.mlp.0.weight": (16, 256), "ar_embedder.mlp.0.bias": (16,),
    "ar_embedder.mlp.2.weight": (16, 16), "ar_embedder.mlp.2.bias": (16,),
    "t_block.1.weight": (288, 48), "t_block.1.bias": (288,),
    "y_embedder.y_embedding": (5, 20),
    "y_embedder.y_proj.fc1.weight": (48, 20), "y_embedder.y_proj.fc1.bias": (48,),
    "y_embedder.y_proj.fc2.weight": (48, 48), "y_embedder.y_proj.fc2.bias": (48,),
    "blocks.0.scale_shift_table": (6, 48),
    "blocks.0.attn.qkv.weight": (144, 48), "blocks.0.attn.qkv.bias": (144,),
    "blocks.0.attn.proj.weight": (48, 48), "blocks.0.attn.proj.bias": (48,),
    "blocks.0.cross_attn.q_linear.weight": (48, 48), "blocks.0.cross_attn.q_linear.bias": (48,),
    "blocks.0.cross_attn.kv_linear.weight": (96, 48), "blocks.0.cross_attn.kv_linear.bias": (96,),
    "blocks.0.cross_attn.proj.weight": (48, 48), "blocks.0.cross_attn.proj.bias": (48,),
    "blocks.0.mlp.fc1.weight": (192, 48), "blocks.0.mlp.fc1.bias": (192,),
    "blocks.0.mlp.fc2.weight": (48, 192), "blocks.0.mlp.fc2.bias": (48,),
    "final_layer.scale_shift_table": (2, 48),
    "final_layer.linear.weight": (32, 48), "final_layer.linear.bias": (32,),
}  # fmt: skip


def test_the_authors_file():
    _, init = make(depth=1, controls=3)
    params = drawn(init)
    theirs = to_weights(ORIGINAL, params)
    assert {name: array.shape for name, array in theirs.items()} == FILE
    with_positions = theirs | {"pos_embed": np.zeros((1, 16, 48), np.float32)}  # the formula's, left out
    back = to_params(ORIGINAL, with_positions, jax.eval_shape(init, jax.random.key(0)))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True))
    other = to_weights(DIFFUSERS, params)
    # diffusers' parts are the authors' one after the other
    for end in ("weight", "bias"):
        for parts, whole in (("attn1.qkv", "attn.qkv"), ("attn2.kv", "cross_attn.kv_linear")):
            attention, letters = parts.split(".")
            pieces = [other[f"transformer_blocks.0.{attention}.to_{letter}.{end}"] for letter in letters]
            np.testing.assert_array_equal(np.concatenate(pieces), theirs[f"blocks.0.{whole}.{end}"])


T5, CLIP = dict(text_length=0), dict(text_length=0, text_width=768)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "count"),
    [(T5, 610_856_096), ({}, 610_856_096 + 120 * 4096), (T5 | {"controls": 3}, 611_349_152), (CLIP, 607_022_240)],
)
def test_parameter_counts(options, count):
    assert trees.count(abstract(lambda rngs: PixArt(32, 4, 8, **options, rngs=rngs))) == count


@pytest.mark.parametrize(
    ("size", "tokens", "text_width", "gigaflops"),
    [(32, 120, 4096, 298.1), (64, 120, 4096, 1236.0), (32, 77, 768, 289.2), (64, 77, 768, 1222.8)],
)
def test_flops_of_a_forward_pass(size, tokens, text_width, gigaflops):
    network, init = functionalize(lambda rngs: PixArt(size, 4, 8, text_width=text_width, text_length=0, rngs=rngs))
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    given = shape(1, size, size, 4), shape(1), {"text": shape(1, tokens, text_width)}
    with stack.unrolled():
        lowered = jax.jit(network).lower(jax.eval_shape(init, jax.random.key(0)), *given)
    # the table counts products alone, the compiler everything: 0.4 % more
    assert lowered.cost_analysis()["flops"] == pytest.approx(gigaflops * 1e9, rel=0.02)


@pytest.mark.fast
def test_a_fresh_network_is_zero_and_does_not_read_the_caption():
    network, init = make()
    params, (x, label, text) = jax.jit(init)(jax.random.key(0)), inputs()
    assert not np.any(network(params, x, label, {"text": text}))
    # with an output that is not zero: cross-attention still is
    params = params | {"head": params["head"] | {"out": drawn(init)["head"]["out"]}}
    found = [network(params, x, label, {"text": t}) for t in (text, 2 * text)]
    assert np.std(found[0]) > 0.1
    np.testing.assert_array_equal(*found)


def test_where_the_null_caption_is_used():
    network, init = make()
    params, (x, label, text) = drawn(init), inputs()
    null = np.broadcast_to(params["caption"]["null"], text.shape)
    call = lambda **cond: network(params, x, label, cond)  # noqa: E731
    np.testing.assert_array_equal(call(), call(text=null))
    np.testing.assert_array_equal(call(text_mask=MASK), call(text=null, text_mask=MASK))
    # a sample without a real token has the whole null caption
    dropped, whole = (np.stack([MASK[0], np.full(5, value)]) for value in (False, True))
    mixed = np.stack([text[0], null[1]])
    np.testing.assert_array_equal(call(text=text, text_mask=dropped), call(text=mixed, text_mask=whole))


def test_masked_tokens_do_not_matter():
    network, init = make(text_length=0)
    params, (x, label, text) = drawn(init), inputs()
    mask = np.tile(np.arange(5) < 3, (2, 1))
    found = network(params, x, label, {"text": np.where(mask[..., None], text, 100), "text_mask": mask})
    expected = network(params, x, label, {"text": text[:, :3]})
    # float32: sums of 3 terms, and of 5 with 2 zeros
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_any_size_has_the_positions_of_one_grid():
    """Twice as many tokens a side stand half as far apart: without attention every second one is what it was."""
    network, init = make(base_size=4)
    params, (_, label, _) = drawn(init), inputs()
    silent = {name: jax.tree.map(jnp.zeros_like, params["blocks"][name]) for name in ("attention", "cross")}
    params = params | {"blocks": params["blocks"] | silent}
    large, small = (network(params, np.ones((2, n, 2 * n, 4), np.float32), label) for n in (16, 8))
    patches = lambda x, n: x.reshape(2, n, 2, 2 * n, 2, 8)  # noqa: E731
    found, expected = patches(large, 8)[:, ::2, :, ::2], patches(small, 4)
    assert np.std(expected - expected[:, :1]) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32


def test_classes_in_place_of_text():
    network, init = make(num_classes=10)
    params, (x, label, text) = drawn(init), inputs()
    assert params["label"]["embedding"].shape == (11, 48) and "caption" not in params
    call = lambda *classes: network(params, x, label, {"label": np.array(classes)})  # noqa: E731
    np.testing.assert_array_equal(network(params, x, label), call(10, 10))
    assert np.abs(call(3, 3) - call(4, 4)).max() > 1e-3 and np.isnan(call(0, 11)[1]).all()
    with pytest.raises(ValueError, match="given to a network of classes"):
        network(params, x, label, {"text": text})
    with pytest.raises(ValueError, match=r"found labels of shape \(1,\)"):
        call(3)


def test_gradients_with_remat_and_without_and_of_what_is_not_trained():
    (plain, init), (again, _) = (make(remat=policy) for policy in ("", "nothing"))
    params, (x, label, _) = drawn(init), inputs()
    loss = lambda network: lambda p: jnp.mean(jnp.square(network(p, x, label)))  # noqa: E731
    expected, found = (jax.jit(jax.grad(loss(network)))(params) for network in (plain, again))
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # sums in another order, float32
        np.testing.assert_allclose(have, want, atol=3e-5 * np.abs(want).max())
    assert {path for path, leaf in trees.flatten(expected).items() if not np.any(leaf)} == {"caption/null"}


def test_bfloat16_products_keep_float32_weights():
    (plain, init), (half, _) = make(), make(dtype=jnp.bfloat16)
    params, (x, label, text) = drawn(init), inputs()
    exact, rough = (network(params, x, label, {"text": text}) for network in (plain, half))
    assert rough.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    # 8 bits, 0.4 % a product
    assert 0 < np.abs(rough.astype(jnp.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_wrong_input_is_refused():
    x, label, text = inputs()

    def call(cond=None, image=x, **options):
        network, init = make(**options)
        return jax.eval_shape(network, jax.eval_shape(init, jax.random.key(0)), image, label, cond)

    for message, arguments in {
        "found images of shape .2, 8, 8, 3., expected .batch, height, width, 4.": dict(image=x[..., :3]),
        "found images of 7 x 8, expected a whole number of patches": dict(image=x[:, :7]),
        "this network needs cond..text.. .B, tokens, 20.": dict(text_length=0),
        "found text of shape .2, 4, 20., expected .2, 5, 20.: pad it": dict(cond={"text": text[:, :4]}),
        "found text of shape .2, 5, 19., expected .2, 5, 20.": dict(cond={"text": text[..., :19]}, text_length=0),
        "found text_mask float32 .2, 5., expected bool .2, 5.": dict(cond={"text": text, "text_mask": MASK * 1.0}),
        "found text_mask bool .2, 4., expected bool .2, 5.": dict(cond={"text_mask": MASK[:, :4]}),
        "found cond..control.. None, expected .2, 3.: height, width": dict(controls=3),
        "cond..control.. is given to a network without it: set controls=3": dict(cond={"control": SIZES}),
        "cond..label.. is given to a network without classes": dict(cond={"label": jnp.zeros(2, int)}),
        "found controls=2 and width=48, expected 0, or 3": dict(controls=2),
        "found width=50 and heads=4": dict(width=50, heads=4),
        "unknown model.remat 'dot'; did you mean 'dots'": dict(remat="dot"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
