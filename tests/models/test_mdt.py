"""MDTv2 against arrays of the original PyTorch code under random weights, masked and not; sizes, identities, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import guidance, trees
from diffjax.models import mdt
from diffjax.models.dit import SIZES
from diffjax.nn import stack
from diffjax.nn.embeddings import grid
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights.mdt import OFFICIAL

# relative to the largest value; found 4e-6, since a frequency rounded otherwise moves an angle of 999 by 6e-5
TOLERANCE, TOLERANCE_GUIDED = 1e-5, 3e-5
TINY = dict(image_size=6, channels=2, out_channels=4, num_classes=3, width=8, depth=6, decoder_depth=2, heads=2)


def make(**options):
    network, init = functionalize(lambda rngs: mdt.MDT(**(TINY | options), rngs=rngs))
    return jax.jit(network, static_argnames="keep"), init


def random_params(init):
    """Nowhere zero, so that every path matters."""
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.3 * random.standard_normal(a.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def inputs():
    return jax.random.normal(jax.random.key(1), (2, 6, 6, 2)), jnp.array([3.0, 700.0])


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.fixture(scope="module")
def original(golden, golden_weights):
    """(network, params, arrays) with the weights that made the golden arrays."""
    arrays, meta = golden("mdtv2")
    config = meta["config"]
    network, init = make(
        image_size=config["input_size"], channels=config["in_channels"], out_channels=2 * config["in_channels"],
        num_classes=config["num_classes"], patch=config["patch_size"], width=config["hidden_size"],
        depth=config["depth"], decoder_depth=config["decode_layer"], heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
    )  # fmt: skip
    named = {name: golden_weights(name, tuple(shape)) for name, shape in meta["param_shapes"].items()}
    named |= {name: arrays[name] for name in meta["kept_at_init"]}
    total = sum(np.abs(value, dtype=np.float64).sum() for value in named.values())
    np.testing.assert_allclose(total, meta["sum_abs_params"], rtol=1e-6)  # the weight rule itself
    params = keymap.to_params(OFFICIAL, named, jax.eval_shape(init, jax.random.key(0)))
    found = keymap.to_weights(OFFICIAL, params)
    assert set(found) == set(named) and all(np.array_equal(found[name], named[name]) for name in named)
    positions = grid(np.arange(6), np.arange(6), config["hidden_size"])
    np.testing.assert_allclose(positions, arrays["pos_embed"][0], atol=1e-6)  # sines of float32 and float64
    return network, params, arrays


def given(arrays):
    return nhwc(arrays["x"]), jnp.asarray(arrays["t"], jnp.float32), {"label": jnp.asarray(arrays["y"], jnp.int32)}


def test_equals_the_original(original):
    network, params, arrays = original
    assert_close(network(params, *given(arrays)), nhwc(arrays["out_full"]), TOLERANCE)


@pytest.mark.parametrize("case", ["mask0", "mask1", "mask2"])
def test_masked_pass_equals_the_original(case, original):
    network, params, arrays = original
    x, t, cond = given(arrays)
    cond["mask_noise"] = jnp.asarray(arrays[f"{case}|noise"])
    found = network(params, x, t, cond, keep=int(arrays[f"{case}|len_keep"]))
    assert_close(found, nhwc(arrays[f"{case}|out"]), TOLERANCE)
    assert np.abs(found - nhwc(arrays["out_full"])).max() > 1


@pytest.mark.parametrize("case", ["cfg_a", "cfg_b"])
def test_guidance_equals_the_original(case, original):
    network, params, arrays = original
    half = len(arrays["cfg_x"]) // 2
    x, t, label = nhwc(arrays["cfg_x"])[:half], jnp.asarray(arrays["cfg_t"], jnp.float32)[:half], arrays["cfg_y"][:half]
    top, power = float(arrays[f"{case}|scale"]), float(arrays[f"{case}|pow"])
    uncond = functools.partial(guidance.null_label, num_classes=7)
    guided = guidance.cfg(network, lambda t: guidance.power_cosine(t / 1000, top, power), uncond, channels=3)
    found = guided(params, x, t, {"label": jnp.asarray(label, jnp.int32)})
    assert_close(found, nhwc(arrays[f"{case}|out"])[:half], TOLERANCE_GUIDED)


def test_distances_equal_the_original(original):
    found = mdt.distances(jnp.arange(36)[None], 6)
    np.testing.assert_array_equal(found[0], original[2]["relative_position_index"])


def test_all_tokens_kept_is_the_unmasked_pass():
    network, init = make()
    params, (x, t) = random_params(init), inputs()
    found = network(params, x, t, {}, jax.random.key(3), keep=9)
    np.testing.assert_allclose(found, network(params, x, t), rtol=1e-5, atol=1e-5)  # tokens in another order
    other = jax.tree.map(lambda a: a + 1, params["interpolate"])
    changed = network(params | {"interpolate": other}, x, t, {}, jax.random.key(3), keep=9)
    np.testing.assert_array_equal(changed, found)  # the side block has no part


def test_the_key_chooses_tokens():
    network, init = make()
    params, (x, t) = random_params(init), inputs()
    key = jax.random.key(3)
    found = network(params, x, t, {}, key, keep=5)
    noise = jax.random.uniform(key, (2, 9))
    np.testing.assert_array_equal(found, network(params, x, t, {"mask_noise": noise}, keep=5))
    assert np.abs(found - network(params, x, t, {}, jax.random.key(4), keep=5)).max() > 1e-3
    np.testing.assert_array_equal(network(params, x, t, {}, key), network(params, x, t))
    # a sample's tokens are its own choice
    other = network(params, x, t, {"mask_noise": noise.at[1].set(noise[1, ::-1])}, keep=5)
    np.testing.assert_array_equal(found[0], other[0])
    assert np.abs(found[1] - other[1]).max() > 1e-3


def test_text_by_attention():
    network, init = make(num_classes=0, condition="attention", text_width=4, qk_norm=True)
    params, (x, t) = random_params(init), inputs()
    text = jax.random.normal(jax.random.key(2), (2, 3, 4))
    mask = jnp.array([[True] * 3, [True, False, False]])
    for keep in (None, 5):

        def run(text, keep=keep):
            return network(params, x, t, {"text": text, "text_mask": mask}, jax.random.key(0), keep=keep)

        found = run(text)
        np.testing.assert_array_equal(found, run(text.at[1, 1:].set(9.0)))
        assert np.abs(found - run(text.at[1, 0].set(9.0)))[1].max() > 1e-3


@pytest.mark.fast
def test_buckets():
    assert mdt.buckets(256) == (174, 163, 153, 143, 133)
    assert mdt.buckets(1024, count=1) == (614,)
    assert mdt.buckets(100, spread=0.0, count=1) == (70,)
    draws = np.floor(1024 * (0.7 - 0.2 * np.random.default_rng(0).random(100_000)))
    # the mean of the published draw; a token at most is lost to rounding
    assert abs(np.mean(mdt.buckets(1024)) - draws.mean()) < 1
    for options in (dict(ratio=0.9), dict(count=0), dict(ratio=-0.1)):
        with pytest.raises(ValueError, match="expected 0 <= ratio, ratio . spread < 1, count >= 1"):
            mdt.buckets(256, **options)
    with pytest.raises(ValueError, match="found 1 tokens of which 0 are kept, expected 1 or more"):
        mdt.buckets(1)


@pytest.mark.fast
def test_parameter_counts():
    for size, expected in {32: 742_263_904, 64: 745_429_088}.items():
        shapes = abstract(lambda rngs, size=size: mdt.MDT(size, 4, 8, 1000, **SIZES["XL"], rngs=rngs))
        assert trees.count(shapes) == expected


# inference; and what a training step has on top, a third of 1310 or 5688 without its full pass, at the mean of keep
@pytest.mark.parametrize(
    ("size", "gflop", "keep"), [(32, 259.0, None), (64, 1136.1, None), (32, 177.7, 153), (64, 759.9, 614)]
)
def test_flops_of_one_image(size, gflop, keep):
    network, init = make(image_size=size, channels=4, out_channels=8, num_classes=1000, decoder_depth=4, **SIZES["XL"])
    arguments = jax.eval_shape(lambda: (jnp.zeros((1, size, size, 4)), jnp.zeros(1), {}, jax.random.key(0)))
    with stack.unrolled():
        lowered = network.lower(jax.eval_shape(init, jax.random.key(0)), *arguments, keep=keep)
    # theirs count products alone; softmax, norms and GELU are 0.4 % more
    assert lowered.cost_analysis()["flops"] == pytest.approx(gflop * 1e9, rel=0.02)


def test_a_fresh_network_is_zero():
    network, init = make()
    params, (x, t) = init(jax.random.key(0)), inputs()
    for keep in (None, 5):
        np.testing.assert_array_equal(network(params, x, t, {}, jax.random.key(0), keep=keep), np.zeros((2, 6, 6, 4)))
    np.testing.assert_allclose(np.std(params["in_blocks"]["bias_by_distance"]), 0.02, rtol=0.2)  # 112 draws
    assert not np.any(params["interpolate"]["block"]["modulation"]["kernel"])
    for table in (params["positions"], params["decoder_positions"]):
        np.testing.assert_array_equal(table[0], grid(np.arange(3), np.arange(3), 8))


def test_remat_gives_the_same_gradients():
    params, (x, t) = random_params(make(depth=4)[1]), inputs()

    def gradient(**options):
        network, _ = make(depth=4, **options)
        run = lambda params: network(params, x, t, {}, jax.random.key(0), keep=5)  # noqa: E731
        return jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(run(params)))))(params)

    expected, found = gradient(), trees.flatten(gradient(remat="nothing"))
    for path, want in trees.flatten(expected).items():
        assert np.any(want), path  # the masked pass trains everything
        np.testing.assert_allclose(found[path], want, atol=3e-5 * np.abs(want).max())  # sums in another order, float32


def test_names_and_shapes_of_the_published_file(golden):
    """Of the original class, its names from a small one and the sizes of MDTv2-XL/2 at 256."""

    class FitsError(Exception):
        pass

    class Shape:
        def __init__(self, *shape):
            self.shape = shape

        def __array__(self, dtype=None, copy=None):
            raise FitsError  # names and shapes were compared, and the first weight was asked for

    full = {32: 1152, 64: 2304, 96: 3456, 128: 4608, 192: 6912, 36: 256, 8: 1001}
    special = {
        "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
        "t_embedder.mlp.0.weight": (1152, 256), "x_embedder.proj.weight": (1152, 4, 2, 2),
    }  # fmt: skip
    depths, shapes = {"en_inblocks": 12, "en_outblocks": 12, "de_blocks": 4, "sideblocks": 1}, {}
    for name, shape in golden("mdtv2")[1]["param_shapes"].items():
        first, _, rest = name.partition(".0.")
        if "_table" in name and "embedding" not in name:
            shape = (31**2 + 3, 16)
        else:
            shape = special.get(name, tuple(full.get(size, size) for size in shape))
        if first in depths:
            shapes |= {f"{first}.{block}.{rest}": Shape(*shape) for block in range(depths[first])}
        elif not name.startswith(tuple(depths)):
            shapes[name] = Shape(*shape)
    assert sum(np.prod(entry.shape) for entry in shapes.values()) == 742_263_904
    buffers = {f"de_blocks.{block}.attn.rel_pos_bias.relative_position_index": Shape(256, 256) for block in range(4)}
    expected = abstract(lambda rngs: mdt.MDT(32, 4, 8, 1000, **SIZES["XL"], rngs=rngs))
    with pytest.raises(FitsError):
        keymap.to_params(OFFICIAL, shapes | buffers, expected)


def test_wrong_input_is_refused():
    network, init = make()
    params, (x, t) = random_params(init), inputs()
    with pytest.raises(ValueError, match="found images of shape"):
        network(params, x[:, :4], t)
    with pytest.raises(ValueError, match="chooses tokens by key"):
        network(params, x, t, {}, keep=5)
    with pytest.raises(ValueError, match=r"found mask_noise of shape \(2, 8\)"):
        network(params, x, t, {"mask_noise": jnp.zeros((2, 8))}, keep=5)
    for keep in (0, 10, 4.5):
        with pytest.raises(ValueError, match=f"found keep={keep}, expected a Python int in 1..9"):
            network(params, x, t, {}, jax.random.key(0), keep=keep)
    for options in (dict(depth=7), dict(decoder_depth=6), dict(decoder_depth=0)):
        with pytest.raises(ValueError, match="even number of blocks before the decoder"):
            abstract(lambda rngs, options=options: mdt.MDT(**(TINY | options), rngs=rngs))
