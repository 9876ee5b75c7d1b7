"""DiT against arrays of the original code and diffusers' class under random weights; sizes, identities, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import guidance, trees
from diffjax.models.dit import SIZES, Block, DiT
from diffjax.nn import stack
from diffjax.nn.embeddings import grid
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import dit as weights

# relative to the largest value; found 3e-6, since a frequency rounded otherwise moves an angle of 999 by 6e-5
TOLERANCE, TOLERANCE_GUIDED = 1e-5, 3e-5
TINY = dict(image_size=4, channels=2, out_channels=4, num_classes=3, width=16, depth=2, heads=2)


def make(**options):
    network, init = functionalize(lambda rngs: DiT(**(TINY | options), rngs=rngs))
    return jax.jit(network), init


def table(side, width):
    return grid(np.arange(side), np.arange(side), width)


def random_params(init, seed=0):
    """Nowhere zero, so that every path matters."""
    random = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(0.3 * random.standard_normal(a.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def inputs():
    return jax.random.normal(jax.random.key(1), (2, 4, 4, 2)), jnp.array([3.0, 700.0])


def load(tag, golden, golden_weights):
    """(network, params, arrays of the tag) with the weights that made the golden arrays."""
    arrays, meta = golden("dit")
    arrays = {name.removeprefix(f"{tag}|"): value for name, value in arrays.items() if name.startswith(f"{tag}|")}
    config = meta[tag]["config"]
    network, init = make(
        image_size=config["input_size"], channels=config["in_channels"], num_classes=config["num_classes"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1), patch=config["patch_size"],
        width=config["hidden_size"], depth=config["depth"], heads=config["num_heads"], mlp_ratio=config["mlp_ratio"],
    )  # fmt: skip
    named = {name: golden_weights(name, tuple(shape)) for name, shape in meta[tag]["param_shapes"].items()}
    named["pos_embed"] = arrays["pos_embed"]
    total = sum(np.abs(value, dtype=np.float64).sum() for value in named.values())
    np.testing.assert_allclose(total, meta[tag]["sum_abs_params"], rtol=1e-6)  # the weight rule itself
    positions = table(config["input_size"] // config["patch_size"], config["hidden_size"])
    params = weights.to_params(named, jax.eval_shape(init, jax.random.key(0)), positions)
    found = weights.to_weights(params, "official", positions)
    assert set(found) == set(named)
    for name in set(named) - {"pos_embed"}:
        np.testing.assert_array_equal(found[name], named[name])
    return network, params, arrays


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.parametrize("tag", ["p2", "p4_fixedvar"])
def test_equals_the_original(tag, golden, golden_weights):
    network, params, arrays = load(tag, golden, golden_weights)
    x, t = nhwc(arrays["x"]), jnp.asarray(arrays["t"], jnp.float32)
    found = network(params, x, t, {"label": jnp.asarray(arrays["y"], jnp.int32)})
    assert_close(found, nhwc(arrays["out"]), TOLERANCE)


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_equals_the_original(channels, golden, golden_weights):
    network, params, arrays = load("p2", golden, golden_weights)
    half = len(arrays["cfg_x"]) // 2
    x, t, label = nhwc(arrays["cfg_x"])[:half], jnp.asarray(arrays["cfg_t"], jnp.float32)[:half], arrays["cfg_y"][:half]
    uncond = functools.partial(guidance.null_label, num_classes=7)
    guided = guidance.cfg(network, float(arrays["cfg_scale"]), uncond, channels)
    expected = arrays["cfg_out_3ch" if channels == 3 else "cfg_out_all"]
    found = guided(params, x, t, {"label": jnp.asarray(label, jnp.int32)})
    # the second half is of the null class, whose variances are its own
    assert_close(found, nhwc(expected)[:half], TOLERANCE_GUIDED)


def torch_normals(module, seed=0):
    """A torch module's weights as seeded normals over sqrt(fan in)."""
    import torch

    random = np.random.default_rng(seed)
    draw = lambda v: random.standard_normal(v.shape) / np.sqrt(max(v[0].numel(), 4))  # noqa: E731
    return {name: torch.from_numpy(draw(v).astype(np.float32)) for name, v in module.state_dict().items()}


@pytest.fixture
def diffusers(transformers):
    """The package, after transformers, which it imports."""
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")


def test_equals_diffusers_with_the_authors_frequencies_and_eps(diffusers):
    import torch

    config = dict(num_attention_heads=2, attention_head_dim=12, out_channels=8, num_layers=3, sample_size=8)
    theirs = diffusers.DiTTransformer2DModel(**config, num_embeds_ada_norm=5, norm_eps=1e-6).eval()
    state = torch_normals(theirs)
    for name in state:
        if ".norm1.emb." in name:
            state[name] = state["transformer_blocks.0." + name.split(".", 2)[2]]
    theirs.load_state_dict(state)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    options = dict(image_size=8, channels=4, out_channels=8, num_classes=5, width=24, depth=3, heads=2)
    network, init = make(**options)
    expected_params = jax.eval_shape(init, jax.random.key(0))
    named = {name: value.numpy() for name, value in state.items()}
    params = weights.to_params(named, expected_params, table(4, 24))
    back = weights.to_weights(params, "diffusers", table(4, 24))
    assert set(back) == set(named) and all(np.array_equal(back[name], named[name]) for name in named)

    random = np.random.default_rng(1)
    x, t, label = random.standard_normal((3, 8, 8, 4)).astype(np.float32), np.array([0, 500, 999]), np.array([0, 3, 5])
    with torch.no_grad():
        given = torch.from_numpy(x.transpose(0, 3, 1, 2))
        expected = theirs(given, torch.from_numpy(t), torch.from_numpy(label)).sample.numpy()
    found = network(params, jnp.asarray(x), jnp.asarray(t, jnp.float32), {"label": jnp.asarray(label, jnp.int32)})
    assert 0.3 < np.std(expected) < 3
    # float32 sums in another order: 24 to 96 terms, three blocks
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=3e-5)

    named["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"] = np.zeros((6, 24), np.float32)
    with pytest.raises(ValueError, match="transformer_blocks.2.norm1.emb.class_embedder.* is not that of block 0"):
        weights.to_params(named, expected_params, table(4, 24))


class FitsError(Exception):
    """Names and shapes were compared, and the first weight was asked for."""


class Shape:
    def __init__(self, *shape):
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        raise FitsError


XL = functools.partial(DiT, 32, 4, 8, 1000, **SIZES["XL"])


def test_names_and_shapes_of_the_published_file(golden):
    """Of the original class, its names from a small one and the sizes of DiT-XL/2 at 256."""
    full = {48: 1152, 96: 2304, 144: 3456, 192: 4608, 288: 6912, 36: 256, 8: 1001}
    shapes = {}
    for name, shape in golden("dit")[1]["p2"]["param_shapes"].items():
        for block in range(28) if name.startswith("blocks.0.") else [None]:
            if block is not None or not name.startswith("blocks."):
                shapes[name.replace(".0.", f".{block}.", 1)] = Shape(*(full.get(size, size) for size in shape))
    shapes["t_embedder.mlp.0.weight"], shapes["t_embedder.mlp.0.bias"] = Shape(1152, 256), Shape(1152)
    shapes = {name: shape for name, shape in shapes.items() if ".None." not in name}
    assert sum(np.prod(entry.shape) for entry in shapes.values()) == 675_129_632
    with pytest.raises(FitsError):
        weights.to_params(shapes, abstract(lambda rngs: XL(rngs=rngs)), table(16, 1152))


def test_names_and_shapes_of_diffusers_folder(diffusers):
    import torch

    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(out_channels=8)
    shapes = {name: Shape(*value.shape) for name, value in theirs.state_dict().items()}
    assert sum(np.prod(entry.shape) for entry in shapes.values()) == 749_826_464
    with pytest.raises(FitsError):
        weights.to_params(shapes, abstract(lambda rngs: XL(rngs=rngs)), table(16, 1152))


@pytest.mark.fast
def test_parameter_counts():
    count = lambda **options: trees.count(abstract(lambda rngs: DiT(**options, rngs=rngs)))  # noqa: E731
    latents = dict(channels=4, out_channels=8)
    parts = 28 * 23_905_152 + 1_624_320 + 1_153_152 + 19_584 + 2_693_408
    assert parts == 674_834_720 == trees.count(abstract(lambda rngs: XL(rngs=rngs)))
    assert count(image_size=64, num_classes=1000, **latents) == 674_834_720  # positions are no parameters
    cross, text, classes = 28 * (4 * 1152**2 + 4 * 1152), 768 * 1152 + 1152**2 + 2 * 1152, 1001 * 1152
    by_attention = dict(image_size=32, condition="attention", **latents)
    assert count(num_classes=1000, **by_attention) == 674_834_720 + cross == 674_834_720 + 148_764_672
    assert count(num_classes=0, text_width=768, **by_attention) == 674_834_720 + cross + text - classes
    assert count(num_classes=1000, qk_norm=True, **by_attention) == 674_834_720 + cross + 28 * 4 * 72
    # table 1 of the paper, in millions, with the 16 x 16 positions there
    for name, millions in {"S": 33, "B": 130, "L": 458, "XL": 675}.items():
        found = count(image_size=32, num_classes=1000, **latents, **SIZES[name]) + 256 * SIZES[name]["width"]
        assert round(found / 1e6 - 0.1) == millions


CLIP = {"text": jax.ShapeDtypeStruct((1, 77, 768), jnp.float32)}


@pytest.mark.parametrize(
    ("size", "gflop", "options", "cond"),
    [
        (32, 237.2, dict(num_classes=1000), {}),
        (64, 1049.1, dict(num_classes=1000), {}),
        (32, 289.2, dict(num_classes=0, condition="attention", text_width=768), CLIP),
        (64, 1222.8, dict(num_classes=0, condition="attention", text_width=768), CLIP),
    ],
)
def test_flops_of_one_image(size, gflop, options, cond):
    network, init = make(image_size=size, channels=4, out_channels=8, **SIZES["XL"], **options)
    given = jax.eval_shape(lambda: (jnp.zeros((1, size, size, 4)), jnp.zeros(1)))
    with stack.unrolled():
        lowered = network.lower(jax.eval_shape(init, jax.random.key(0)), *given, cond)
    # theirs count products alone; softmax, norms and GELU are 0.4 % more
    assert lowered.cost_analysis()["flops"] == pytest.approx(gflop * 1e9, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"condition": "attention", "qk_norm": True}])
def test_a_fresh_network_is_zero(options):
    network, init = make(**options)
    x, t = inputs()
    np.testing.assert_array_equal(network(jax.jit(init)(jax.random.key(0)), x, t, {}), np.zeros((2, 4, 4, 4)))


def test_start():
    """Tables and time embedding of deviation 0.02, everything else by its fans, biases zero."""
    params = make(width=128, num_classes=100)[1](jax.random.key(0))
    time, blocks = params["conditions"]["time"], params["blocks"]
    for kernel in (time["expand"]["kernel"], time["contract"]["kernel"], params["conditions"]["label"]["embedding"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)  # 16k draws
    assert np.abs(blocks["attention"]["qkv"]["kernel"]).max() <= np.sqrt(6 / (128 + 384))
    np.testing.assert_allclose(np.std(blocks["attention"]["qkv"]["kernel"]), np.sqrt(2 / (128 + 384)), rtol=0.02)
    np.testing.assert_allclose(np.std(params["embed"]["kernel"]), np.sqrt(2 / (8 + 128)), rtol=0.1)  # 1024 draws
    biases = [leaf for path, leaf in trees.flatten(params).items() if path.endswith("bias")]
    assert not any(np.any(bias) for bias in biases)
    # each block its own draw
    assert np.abs(np.diff(blocks["mlp"]["expand"]["kernel"], axis=0)).max() > 0.01


def by_hand(params, x, c, context, mask, heads):
    """A block on one sample in NumPy: x (L, D), c (D,), context (S, D), mask (S,)."""

    def linear(params, x):
        return x @ params["kernel"] + params["bias"]

    def norm(x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)

    def attend(params, q, k, v, mask):
        out = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in (q, k, v)), strict=True):
            q, k = (
                part / np.sqrt((part**2).mean(1, keepdims=True) + 1e-6) * params[name]["scale"]
                for part, name in ((q, "norm_q"), (k, "norm_k"))
            )
            scores = np.where(mask, np.exp(q @ k.T / np.sqrt(q.shape[1])), 0)
            out.append(scores / scores.sum(1, keepdims=True) @ v)
        return linear(params["out"], np.concatenate(out, axis=1))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(params["modulation"], c), 6)
    own, cross, mlp = params["attention"], params["cross"], params["mlp"]
    x = x + gate1 * attend(own, *np.split(linear(own["qkv"], norm(x) * (1 + scale1) + shift1), 3, axis=1), True)
    x = x + attend(cross, linear(cross["q"], x), *np.split(linear(cross["kv"], context), 2, axis=1), mask)
    return x + gate2 * linear(mlp["contract"], gelu(linear(mlp["expand"], norm(x) * (1 + scale2) + shift2)))


def test_block_that_attends_to_its_condition():
    block, init = functionalize(lambda rngs: Block(8, 2, 16, cross=True, qk_norm=True, rngs=rngs))
    params = random_params(init)
    random = np.random.default_rng(0)
    x, c, text = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 8), (2, 8), (2, 3, 8)))
    mask = np.array([[True, True, False], [True, False, False]])
    found = jax.jit(block)(params, *map(jnp.asarray, (x, c)), (jnp.asarray(text), jnp.asarray(mask)))
    for i in range(2):
        exact = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        # float32 against float64
        np.testing.assert_allclose(found[i], by_hand(exact, x[i], c[i], text[i], mask[i], 2), atol=1e-5, rtol=1e-5)


def test_text_by_attention():
    network, init = make(num_classes=0, condition="attention", text_width=6, qk_norm=True)
    params, (x, t) = random_params(init), inputs()
    text = jax.random.normal(jax.random.key(2), (2, 5, 6))
    mask = jnp.array([[True] * 5, [True, True, False, False, False]])
    found = network(params, x, t, {"text": text, "text_mask": mask})
    # no positions of text, and what is masked has no part; sums in another order
    flipped = network(params, x, t, {"text": text[:, ::-1], "text_mask": mask[:, ::-1]})
    np.testing.assert_allclose(found, flipped, rtol=1e-4, atol=1e-5)
    other = network(params, x, t, {"text": text.at[1, 2:].set(9.0), "text_mask": mask})
    np.testing.assert_array_equal(found, other)
    every = network(params, x, t, {"text": text, "text_mask": jnp.ones_like(mask)})
    np.testing.assert_allclose(found[0], every[0], rtol=1e-5, atol=1e-6)
    assert np.abs(found - every)[1].max() > 1e-3


@pytest.mark.parametrize("condition", ["norm", "attention"])
def test_classes(condition):
    network, init = make(condition=condition)
    params, (x, t) = random_params(init), inputs()
    null = network(params, x, t, {"label": jnp.array([3, 3])})
    np.testing.assert_array_equal(null, network(params, x, t))
    found = network(params, x, t, {"label": jnp.array([3, 1])})
    np.testing.assert_array_equal(found[0], null[0])
    assert np.abs(found[1] - null[1]).max() > 1e-3
    # an integer that is no class stops a run
    assert np.isnan(network(params, x, t, {"label": jnp.array([4, 1])})[0]).all()


def test_scan_is_a_loop():
    params, (x, t) = random_params(make()[1]), inputs()
    with stack.unrolled():
        loop = make()[0](params, x, t)
    np.testing.assert_allclose(make()[0](params, x, t), loop, rtol=1e-5, atol=1e-5)  # sums in another order, float32


def test_remat_gives_the_same_gradients():
    params, (x, t) = random_params(make()[1]), inputs()

    def gradient(**options):
        network, _ = make(**options)
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(network(p, x, t)))))(params)

    expected, found = gradient(), gradient(remat="dots_no_batch")
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(have, want, atol=3e-5 * np.abs(want).max())  # sums in another order, float32


def test_bfloat16_products_keep_float32_weights():
    (network, init), (exact, _) = make(dtype=jnp.bfloat16), make()
    params, (x, t) = random_params(init), inputs()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    found, expected = network(params, x, t), exact(params, x, t)
    assert found.dtype == jnp.bfloat16
    # 8 bits: 0.4 % a product, and a dozen layers
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_wrong_input_is_refused():
    network, init = make()
    params, (x, t) = random_params(init), inputs()
    with pytest.raises(ValueError, match="found images of shape"):
        network(params, x[:, :2], t)
    with pytest.raises(ValueError, match="found labels of shape"):
        network(params, x, t, {"label": jnp.array([1])})
    with pytest.raises(ValueError, match="set model.text_width"):
        network(params, x, t, {"text": jnp.zeros((2, 3, 6))})
    textual, init = make(num_classes=0, condition="attention", text_width=6)
    params = random_params(init)
    with pytest.raises(ValueError, match=r"needs cond\['text'\]"):
        textual(params, x, t, {"label": jnp.array([1, 2])})
    with pytest.raises(ValueError, match="found text of shape"):
        textual(params, x, t, {"text": jnp.zeros((2, 3, 5))})
    unconditional, init = make(num_classes=0)
    with pytest.raises(ValueError, match="without classes"):
        unconditional(random_params(init), x, t, {"label": jnp.array([1, 2])})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "expected a multiple of the patch"),
        ({"heads": 3}, "expected a multiple of heads"),
        ({"width": 18}, "of 4 for positions"),
        ({"condition": "atention"}, "did you mean 'attention'"),
        ({"text_width": 6}, "set condition='attention' and num_classes=0"),
        ({"num_classes": 0, "condition": "attention"}, "nothing to attend to"),
        ({"remat": "dot"}, "unknown model.remat"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        abstract(lambda rngs: DiT(**(TINY | options), rngs=rngs))


def test_wrong_weights_are_refused():
    _, init = make()
    params = random_params(init)
    found = weights.to_weights(params, "official", table(2, 16))
    with pytest.raises(ValueError, match="pos_embed .* is not this network's table"):
        weights.to_params(found | {"pos_embed": 0.5 * found["pos_embed"]}, params, table(2, 16))
    with pytest.raises(ValueError, match="extra: blocks.0.extra"):
        weights.to_params(found | {"blocks.0.extra": np.zeros(3)}, params, table(2, 16))
    attending = random_params(make(condition="attention")[1])
    with pytest.raises(ValueError, match="no published file has them"):
        weights.to_weights(attending, "official", table(2, 16))
    with pytest.raises(ValueError, match="unknown layout 'diffuser'"):
        weights.to_weights(params, "diffuser", table(2, 16))
