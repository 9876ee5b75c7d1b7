"""MM-DiT against diffusers' SD3 network under random weights, its exact sizes, and both tables of published names."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.mmdit import SIZES, JointBlock, MMDiT
from diffjax.nn import embeddings, stack
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights.keymap import to_params, to_weights
from diffjax.weights.mmdit import diffusers, original

TINY = dict(image_size=8, channels=4, width=32, depth=3, heads=2, text_width=20, pooled_width=12, max_grid=10)


@pytest.fixture(scope="module")
def reference(transformers):
    """(torch, diffusers' class)."""
    del transformers  # which diffusers imports
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        return torch, package.SD3Transformer2DModel


def make(**options):
    network, init = functionalize(lambda rngs: MMDiT(**TINY | options, rngs=rngs))
    return jax.jit(network), init


def drawn(init):
    """Weights that are nowhere zero."""
    random = np.random.default_rng(5)

    def draw(a):
        return np.float32(random.standard_normal(a.shape) * (0.2 if len(a.shape) < 2 else a.shape[-2] ** -0.5))

    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def inputs(height=8, width=8):
    random = np.random.default_rng(1)
    shapes = (2, height, width, 4), (2, 5, 20), (2, 12)
    x, text, pooled = (np.float32(random.standard_normal(shape)) for shape in shapes)
    return x, np.array([3.0, 900.0], np.float32), {"text": text, "pooled": pooled}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_equals_diffusers_under_random_weights(reference, qk_norm):
    torch, model = reference
    net = model(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12, pos_embed_max_size=10,
        qk_norm="rms_norm" if qk_norm else None,
    )  # fmt: skip
    random = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            deviation *= 0.4 if name == "proj_out.weight" else 1
            values = deviation * random.standard_normal(parameter.shape)
            parameter.copy_(torch.from_numpy(values + ("norm_" in name and "attn" in name)))
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    network, init = make(qk_norm=qk_norm, stored_positions=True)
    table = diffusers(depth=3)
    params = to_params(table, weights, jax.eval_shape(init, jax.random.key(0)))
    x, label, cond = inputs(height=12, width=16)  # not the size it was made for, nor a square
    with torch.no_grad():
        expected = net(
            torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(cond["text"]), torch.from_numpy(cond["pooled"]),
            torch.from_numpy(label),
        ).sample.permute(0, 2, 3, 1).numpy()  # fmt: skip
    assert 0.4 < expected.std() < 0.9
    # float32: angles of 900 are known to 5e-5. 8e-6 was measured, 1e-6 with labels of 0 and 1
    np.testing.assert_allclose(network(params, x, label, cond), expected, atol=3e-5, rtol=0)
    back = to_weights(table, params)
    assert back.keys() == weights.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_original_file_converts_to_diffusers(reference, qk_norm):
    """diffusers' own conversion of Stability's file gives what our second table gives."""
    torch, _ = reference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert
    _, init = make(qk_norm=qk_norm, stored_positions=True)
    params = drawn(init)
    file = to_weights(original(depth=3), params)
    whole = {f"model.diffusion_model.{name}": torch.from_numpy(array) for name, array in file.items()}
    expected, found = convert(whole), to_weights(diffusers(depth=3), params)
    assert whole == {} and expected.keys() == found.keys()  # every name of the file was used
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name].numpy())
    back = to_params(original(depth=3), file, jax.eval_shape(init, jax.random.key(0)))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True))


def test_names_and_shapes_of_the_published_folder(reference, fits):
    torch, model = reference
    with torch.device("meta"):
        net = model(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
    fits(diffusers(depth=24), net, abstract(lambda rngs: MMDiT(128, 16, **SIZES["SD3-medium"], rngs=rngs)))


CASES = {
    "XL/2-A": (4, (77, 768, 768), 1_328_851_600, {32: 310.5, 64: 1137.6}),
    "XL/2-B": (4, (77, 768, 768), 850_745_104, {32: 199.0, 64: 730.7}),
    "SD3-medium": (16, (154, 4096, 2048), 2_028_328_000, {64: 1802.6}),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", [*CASES])
def test_parameter_counts(name):
    channels, _, count, _ = CASES[name]
    shapes = abstract(lambda rngs: MMDiT(32, channels, **SIZES[name], rngs=rngs))
    stored = 192**2 * 1536 if name == "SD3-medium" else 0  # the table of positions, which is not trained
    assert trees.count(shapes) == count + stored == count + trees.count(shapes.get("positions"))


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case[3]])
def test_flops_of_a_forward_pass(name, size):
    channels, (tokens, text_width, pooled_width), _, gigaflops = CASES[name]
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    cond = {"text": shape(1, tokens, text_width), "pooled": shape(1, pooled_width)}
    found = _flops(name, size, channels, cond)
    # the table counts products alone, the compiler everything: 0.5 % more
    assert found == pytest.approx(gigaflops[size] * 1e9, rel=0.02)


@pytest.mark.parametrize(("name", "gigaflops"), [("XL/2-A", 238.6), ("XL/2-B", 153.4)])
def test_flops_with_one_class_token(name, gigaflops):
    cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    assert _flops(name, 32, 4, cond, num_classes=1000) == pytest.approx(gigaflops * 1e9, rel=0.02)


def _flops(name, size, channels, cond, **options):
    network, init = functionalize(lambda rngs: MMDiT(size, channels, **SIZES[name], **options, rngs=rngs))
    x, label = (jax.ShapeDtypeStruct(axes, jnp.float32) for axes in ((1, size, size, channels), (1,)))
    with stack.unrolled():
        lowered = jax.jit(network).lower(jax.eval_shape(init, jax.random.key(0)), x, label, cond)
    return lowered.cost_analysis()["flops"]


@pytest.mark.fast
def test_a_fresh_network_is_zero():
    network, init = make()
    params = jax.jit(init)(jax.random.key(0))
    assert not np.any(network(params, *inputs()))
    zero = {path for path, leaf in trees.flatten(params).items() if path.endswith("kernel") and not np.any(leaf)}
    parts = [f"{block}/{stream}/modulation" for block in ("blocks", "last") for stream in ("image", "text")]
    assert zero == {f"{part}/kernel" for part in (*parts, "head/modulation", "head/out")}


def test_text_has_no_order():
    network, init = make()
    params, (x, label, cond) = drawn(init), inputs()
    expected = network(params, x, label, cond)
    shuffled = cond | {"text": cond["text"][:, [3, 1, 4, 0, 2]]}
    tolerance = 1e-5 * np.abs(expected).max()  # float32, sums in another order
    np.testing.assert_allclose(network(params, x, label, shuffled), expected, atol=tolerance)


def test_tokens_of_the_image_have_no_order_but_their_positions():
    """With a table of zeros, patches in another order are the same patches of the output in that order."""
    network, init = make(stored_positions=True)
    x, label, cond = inputs()
    order = np.random.default_rng(2).permutation(16)

    def moved(x):
        patches = x.reshape(2, 4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 2, 2, 4)[:, order]
        return patches.reshape(2, 4, 4, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)

    params = drawn(init)
    told = np.abs(network(params, moved(x), label, cond) - moved(np.asarray(network(params, x, label, cond)))).max()
    params = params | {"positions": np.zeros_like(params["positions"])}
    expected = moved(np.asarray(network(params, x, label, cond)))
    tolerance = 1e-5 * np.abs(expected).max()  # float32, sums in another order
    np.testing.assert_allclose(network(params, moved(x), label, cond), expected, atol=tolerance)
    assert told > 100 * tolerance


def test_either_stream_may_come_first():
    """What is put side by side for attention has no order: with the streams' weights swapped, so are their results."""
    block, init = functionalize(lambda rngs: JointBlock(16, 2, True, rngs=rngs))
    params, random = drawn(init), np.random.default_rng(3)
    image, text, c = (np.float32(random.standard_normal(shape)) for shape in ((2, 6, 16), (2, 5, 16), (2, 16)))
    expected = block(params, image, text, c)
    found = block({"image": params["text"], "text": params["image"]}, text, image, c)
    for have, want in zip(found, reversed(expected), strict=True):
        # float32, sums in another order
        np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("stored", [True, False])
def test_positions_are_the_centre_of_one_grid(stored):
    """Through a network that does nothing but add them."""

    def positions(height, width, **options):
        network, init = make(width=16, depth=2, stored_positions=stored, **options)
        fresh = jax.jit(init)(jax.random.key(0))
        params = jax.tree.map(np.zeros_like, fresh) | {name: fresh[name] for name in fresh if name == "positions"}
        params["head"] = params["head"] | {"out": {"kernel": np.eye(16, dtype=np.float32), "bias": np.zeros(16)}}
        x, label, cond = inputs(height, width)
        found = network(params, x, label, cond).reshape(2, height // 2, 2, width // 2, 2, 4).swapaxes(2, 3)
        return found.reshape(2, height // 2, width // 2, 16)[0]

    def normalised(rows, columns):
        table = embeddings.grid(np.asarray(rows), np.asarray(columns), 16).reshape(len(rows), len(columns), 16)
        return (table - table.mean(-1, keepdims=True)) / np.sqrt(table.var(-1, keepdims=True) + 1e-6)

    # 3 tokens a side of training, in steps of 4 / 3; 5 tokens reach one further on each side
    found = positions(6, 10, image_size=6, base_size=4, max_grid=11)
    np.testing.assert_allclose(found, normalised(np.arange(3) * 4 / 3, np.arange(-1, 4) * 4 / 3), atol=1e-5)


def test_classes_in_place_of_text():
    network, init = make(num_classes=10)
    params, (x, label, cond) = drawn(init), inputs()
    assert params["conditions"]["label"]["embedding"].shape == (11, 32) and "text" not in params["conditions"]
    call = lambda *classes: network(params, x, label, {"label": np.array(classes)})  # noqa: E731
    np.testing.assert_array_equal(network(params, x, label), call(10, 10))
    assert np.abs(call(3, 3) - call(4, 4)).max() > 1e-3 and np.isnan(call(0, 11)[1]).all()
    with pytest.raises(ValueError, match=r"found \['text', 'pooled'\] for a network of classes"):
        network(params, x, label, cond)
    with pytest.raises(ValueError, match=r"found labels of shape \(1,\)"):
        call(3)


def test_gradients_with_remat_and_without_and_of_what_is_not_trained():
    (plain, init), (again, _) = (make(stored_positions=True, remat=policy) for policy in ("", "nothing"))
    loss = lambda network: lambda p: jnp.mean(jnp.square(network(p, *inputs())))  # noqa: E731
    expected, found = (jax.jit(jax.grad(loss(network)))(drawn(init)) for network in (plain, again))
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # sums in another order, float32
        np.testing.assert_allclose(have, want, atol=3e-5 * np.abs(want).max())
    # the last text has no output, so its queries are not read either
    zero = {path for path, leaf in trees.flatten(expected).items() if not np.any(leaf)}
    assert zero == {"positions", "last/text/attention/norm_q/scale"}


def test_bfloat16_products_keep_float32_weights():
    (plain, init), (half, _) = make(), make(dtype=jnp.bfloat16)
    exact, rough = (network(drawn(init), *inputs()) for network in (plain, half))
    assert rough.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(drawn(init))} == {np.dtype(np.float32)}
    # 8 bits, 0.4 % a product
    assert 0 < np.abs(rough.astype(jnp.float32) - exact).max() < 0.1 * np.abs(exact).max()


def test_wrong_input_is_refused():
    x, label, cond = inputs()

    def call(cond=cond, image=x, **options):
        network, init = make(**options)
        return jax.eval_shape(network, jax.eval_shape(init, jax.random.key(0)), image, label, cond)

    for message, arguments in {
        "found images of shape .2, 8, 8, 3., expected .batch, height, width, 4.": dict(image=x[..., :3]),
        "found images of 7 x 8, expected a whole number of patches": dict(image=x[:, :7]),
        "found images of 4 x 12 patches, expected 10 or fewer": dict(image=x.repeat(3, axis=2)),
        "shapes .None, None., expected ..2, 'tokens', 20., .2, 12..: give what": dict(cond=None),
        "shapes ..2, 5, 20., None., expected ..2, 5, 20., .2, 12..": dict(cond={"text": cond["text"]}),
        "shapes ..2, 5, 19., .2, 12..,": dict(cond=cond | {"text": cond["text"][..., 1:]}),
        "cond..label.. is given to a network without classes": dict(cond=cond | {"label": np.zeros(2, int)}),
        "found max_grid=3 and depth=3 for images of 4 patches": dict(max_grid=3),
        "found max_grid=10 and depth=1": dict(depth=1),
        "found width=34 and heads=4": dict(width=34, heads=4),
        "unknown model.remat 'dot'; did you mean 'dots'": dict(remat="dot"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
