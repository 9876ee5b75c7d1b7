"""Autoencoders against diffusers' classes under drawn weights, exact sizes, both sets of published names, errors."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.vae import PRESETS, AutoencoderKL, VQModel
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import vae as names

TINY = dict(width=32, channel_mult=(1, 2), num_blocks=1)
SMALLEST = dict(width=32, channel_mult=(1,), num_blocks=1)
KL = {
    "four": dict(width=32, channel_mult=(1, 2, 2), num_blocks=2, scale=0.18215),
    "sixteen": TINY | dict(latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609),
}
VQ = TINY | dict(codes=50, scale=0.5)
BOTH = pytest.mark.parametrize(("cls", "options"), [(AutoencoderKL, KL["four"]), (VQModel, VQ)])
OF_2022 = ("query", "key", "value", "proj_attn")
# against float32 sums in another order, at deviations of about 0.6: 1e-6 was measured
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def diffusers(transformers):
    del transformers  # which diffusers imports
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        package.AutoencoderKL, package.VQModel  # noqa: B018, each is imported when it is asked for
    return package


def theirs(cls, channels=3, latent_channels=4, width=128, channel_mult=(1, 2, 4, 4), num_blocks=2, **options):
    """Their network of our configuration, in the numbers that it gives by itself."""
    levels = len(channel_mult)
    return cls(
        in_channels=channels, out_channels=channels, latent_channels=latent_channels, layers_per_block=num_blocks,
        block_out_channels=tuple(width * mult for mult in channel_mult),
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **options,
    )  # fmt: skip


def their_kl(diffusers, quant_conv=True, scale=0.18215, shift=0.0, **options):
    return theirs(diffusers.AutoencoderKL, use_quant_conv=quant_conv, use_post_quant_conv=quant_conv, **options)


def draw(module, golden_weights):
    """Every weight drawn by its name; their names to arrays."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
    weights = {name: golden_weights(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return module.eval().requires_grad_(False), weights


def random_params(cls, options):
    """Parameters of deviation 1 / sqrt(inputs), normalisations near the identity."""
    random = np.random.default_rng(3)

    def leaf(path, shape):
        inputs = np.prod(shape.shape[:-1]) if path[-1].key in ("kernel", "embedding") else 100
        return (random.standard_normal(shape.shape) / np.sqrt(inputs) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes_of(cls, options))


def shapes_of(cls, options):
    return abstract(lambda rngs: cls(**options, rngs=rngs))


def method(cls, options, name):
    return _method(cls, tuple(options.items()), name)


@functools.cache
def _method(cls, options, name):
    return jax.jit(functionalize(lambda rngs: cls(**dict(options), rngs=rngs), name)[0])


def torch_image(x_BHWC):
    import torch

    return torch.from_numpy(np.array(x_BHWC).transpose(0, 3, 1, 2))


def assert_close(found_BHWC, expected):
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert 0.1 < expected.std() < 2 and found_BHWC.shape == expected.shape
    np.testing.assert_allclose(found_BHWC, expected, atol=TOLERANCE, rtol=0)


def images(shape):
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize("kind", KL)
def test_kl_equals_diffusers(diffusers, golden_weights, kind):
    options = KL[kind]
    module, weights = draw(their_kl(diffusers, **options), golden_weights)
    table = names.table(weights, len(options["channel_mult"]))
    params = keymap.to_params(table, weights, shapes_of(AutoencoderKL, options))
    x = images((2, 16, 24, 3))
    posterior = module.encode(torch_image(x)).latent_dist
    mean, logvar = method(AutoencoderKL, options, "moments")(params, x)
    assert_close(mean, posterior.mean)
    assert_close(logvar, posterior.logvar)
    z = images((2, 4, 6, options.get("latent_channels", 4)))
    scale, shift = options["scale"], options.get("shift", 0.0)
    found = method(AutoencoderKL, options, "decode")(params, (z - shift) * scale)
    assert_close(found, module.decode(torch_image(z)).sample)


def test_vq_equals_diffusers(diffusers, golden_weights):
    options = {name: value for name, value in VQ.items() if name not in ("codes", "scale")}
    module = theirs(diffusers.VQModel, **options, latent_channels=3, num_vq_embeddings=50)
    module, weights = draw(module, golden_weights)
    params = keymap.to_params(names.table(weights, 2), weights, shapes_of(VQModel, VQ))
    x, z = images((2, 16, 24, 3)), images((2, 4, 6, 3))
    assert_close(method(VQModel, VQ, "encode")(params, x) / 0.5, module.encode(torch_image(x)).latents)
    assert_close(method(VQModel, VQ, "decode")(params, z * 0.5), module.decode(torch_image(z)).sample)
    distances = np.linalg.norm(np.asarray(z)[..., None, :] - weights["quantize.embedding.weight"], axis=-1)
    nearest = method(VQModel, VQ, "nearest")(params, z * 0.5)
    assert nearest.dtype == jnp.int32 and len(np.unique(nearest)) > 10
    np.testing.assert_array_equal(nearest, distances.argmin(-1))


@pytest.mark.parametrize(
    ("preset", "count"), [("sd_v1", 83_653_863), ("sdxl", 83_653_863), ("sd3", 83_819_683), ("ldm_vq_f4", 55_322_782)]
)
def test_presets_are_the_published_networks(diffusers, fits, preset, count):
    import torch

    shapes = shapes_of(PRESETS[preset], {})
    assert trees.count(shapes) == count
    with torch.device("meta"):
        if preset == "ldm_vq_f4":
            module = theirs(diffusers.VQModel, latent_channels=3, channel_mult=(1, 2, 4), num_vq_embeddings=8192)
        else:
            module = their_kl(diffusers, **{"sd3": dict(latent_channels=16, quant_conv=False)}.get(preset, {}))
    assert sum(tensor.numel() for tensor in module.state_dict().values()) == count
    fits(names.table(module.state_dict(), 3 if preset == "ldm_vq_f4" else 4), module, shapes)


@BOTH
def test_files_of_the_original_code(diffusers, cls, options):
    """Their converter takes what we write by the names of the original code to what we write by theirs."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    params = random_params(cls, options)
    original = keymap.to_weights(names.original(), params)
    assert original["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    prefixed = {names.PREFIX + name: array for name, array in original.items()}
    levels = dict.fromkeys(("down_block_types", "up_block_types"), options["channel_mult"])
    converted = convert_ldm_vae_checkpoint(prefixed, levels)
    expected = keymap.to_weights(names.diffusers(len(options["channel_mult"])), params)
    if cls is VQModel:  # it does not know this one
        converted["quantize.embedding.weight"] = original["quantize.embedding.weight"]
    assert set(converted) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(converted[name], array)


def test_attention_of_the_folders_of_2022(diffusers):
    params = random_params(AutoencoderKL, KL["four"])
    written = keymap.to_weights(names.diffusers(3, OF_2022), params)
    module, expected = their_kl(diffusers, **KL["four"]), keymap.to_weights(names.diffusers(3), params)
    assert set(written) != set(expected)
    keymap.to_params(names.table(written, 3), written, params)
    module._fix_state_dict_keys_on_load(written)
    assert set(written) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.fast
@BOTH
@pytest.mark.parametrize("kind", ["original", "diffusers", "diffusers of 2022"])
def test_weights_there_and_back(kind, cls, options):
    levels = len(options["channel_mult"])
    table = names.original() if kind == "original" else names.diffusers(levels, *([OF_2022] if "2022" in kind else []))
    params = random_params(cls, options)
    weights = keymap.to_weights(table, params)
    # queries, keys and values of two attentions, weights and biases, are one array each here
    assert len(weights) == len(jax.tree.leaves(params)) + 2 * 4
    assert names.table(weights, levels) == table
    if kind == "original":  # what its files have beside
        weights |= {name: np.zeros(1) for name in ("loss.perceptual_loss.lin0.model.1.weight", "model_ema.decay")}
    back = keymap.to_params(table, weights, params)
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_latents_are_drawn_and_scaled_once():
    options = KL["sixteen"]
    params, x, key = random_params(AutoencoderKL, options), images((2, 8, 8, 3)), jax.random.key(5)
    (mean, logvar), scale, shift = method(AutoencoderKL, options, "moments")(params, x), 1.5305, 0.0609
    noise = jax.random.normal(key, mean.shape)
    found = method(AutoencoderKL, options, "encode")(params, x, key)
    np.testing.assert_allclose(found, (mean + jnp.exp(0.5 * logvar) * noise - shift) * scale, atol=1e-5)
    found = method(AutoencoderKL, options, "encode_mean")(params, x)
    np.testing.assert_allclose(found, (mean - shift) * scale, atol=1e-6)
    last = jax.tree.map(lambda a: 1000 * a, params["encoder"]["conv_out"])
    large = params | {"encoder": params["encoder"] | {"conv_out": last}}
    logvar = method(AutoencoderKL, options, "moments")(large, x)[1]
    assert logvar.min() == -30 and logvar.max() == 20


def test_decoding_in_parts_is_decoding():
    params, z = random_params(AutoencoderKL, SMALLEST), images((5, 4, 4, 4))
    decode = method(AutoencoderKL, SMALLEST, "decode")
    parts = jax.jit(lambda params, z: jax.lax.map(lambda one: decode(params, one[None])[0], z, batch_size=2))
    np.testing.assert_allclose(parts(params, z), decode(params, z), atol=1e-5)


def test_remat_keeps_values_and_gradients():
    params, x, found = random_params(AutoencoderKL, SMALLEST), images((1, 4, 4, 3)), []
    for policy in ("", "nothing"):
        encode = method(AutoencoderKL, SMALLEST | dict(remat=policy), "encode_mean")
        square = lambda params, encode=encode: jnp.mean(encode(params, x) ** 2)  # noqa: E731
        found.append(jax.jit(jax.value_and_grad(square))(params))
        # every block is computed again: two around the attention and one before them
        text = str(jax.make_jaxpr(encode)(params, x))
        assert len(re.findall(r"\b(checkpoint|remat2?)\[", text)) == (4 if policy else 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *found)


def test_bfloat16_products():
    half, params, z = SMALLEST | dict(dtype=jnp.bfloat16), random_params(AutoencoderKL, SMALLEST), images((1, 4, 4, 4))
    found, expected = (method(AutoencoderKL, options, "decode")(params, z) for options in (half, SMALLEST))
    assert found.dtype == jnp.float32
    # 8 bits a product, a dozen layers
    assert 0 < np.abs(found - expected).max() < 0.1
    moments = functionalize(lambda rngs: AutoencoderKL(**half, rngs=rngs), "moments")[0]
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.bfloat16)
    assert all(part.dtype == jnp.float32 for part in jax.eval_shape(moments, params, image))


@BOTH
def test_images_and_latents_of_another_shape_are_refused(cls, options):
    params = shapes_of(cls, options)
    encode = method(cls, options, "encode_mean" if cls is AutoencoderKL else "encode")
    decode = method(cls, options, "decode")
    for shape in ((1, 18, 17, 3), (1, 16, 16, 1), (16, 16, 3), (1, 3, 16, 16)):
        with pytest.raises(ValueError, match=r"expected \(B, H, W, 3\) with H and W multiples of"):
            jax.eval_shape(encode, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(ValueError, match="decode with the autoencoder that encoded them"):
        jax.eval_shape(decode, params, jax.ShapeDtypeStruct((1, 4, 4, 16), jnp.float32))


def test_names_of_something_else_are_refused():
    with pytest.raises(ValueError, match="load.under"):
        names.table(["first_stage_model.encoder.conv_in.weight"], 4)
    with pytest.raises(ValueError, match="expected an autoencoder's"):
        names.table(["conv_in.weight", "time_embed.0.weight"], 4)
    with pytest.raises(ValueError, match="model.remat"):
        shapes_of(AutoencoderKL, TINY | dict(remat="everything"))
