"""The U-Nets against arrays of the original PyTorch code under random weights, and exact sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import prediction, trees
from diffjax.methods import edm
from diffjax.models.edm_unet import DhariwalUNet, SongUNet
from diffjax.nn import embeddings
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import edm as weights

DENOISERS = {"edm": prediction.edm_denoiser, "vp": prediction.vp_denoiser, "ve": prediction.ve_denoiser}

# relative to the largest value of an array; float32 against float64 was measured at a twentieth of these
TOLERANCE = {"edm": 2e-5, "ve": 2e-5, "vp": 3e-4}  # vp: the time of sigma is ill-conditioned, and multiplied by 999
TOLERANCE_FOURIER = 1e-4  # cosines of arguments of order 1000


def _constructor(config, step_condition=False):
    options = dict(
        image_size=config["img_resolution"], in_channels=config["img_channels"], out_channels=config["img_channels"],
        num_classes=config["label_dim"], augment_dim=config["augment_dim"], channels=config["model_channels"],
        channel_mult=config["channel_mult"], num_blocks=config["num_blocks"], dropout=config["dropout"],
        attention_sizes=config["attn_resolutions"], step_condition=step_condition,
    )  # fmt: skip
    if config["model_type"] == "DhariwalUNet":
        return lambda rngs: DhariwalUNet(**options, rngs=rngs)
    options |= dict(
        embedding=config["embedding_type"], encoder=config["encoder_type"], taps=config["resample_filter"],
        noise_channels_mult=config["channel_mult_noise"],
    )  # fmt: skip
    return lambda rngs: SongUNet(**options, rngs=rngs)


def _load(meta, golden_weights, buffers=None, step_condition=False):
    """(network, params) with the weights that made the golden arrays."""
    network, init = functionalize(_constructor(meta["config"], step_condition))
    named = {name: golden_weights(name, tuple(shape)) for name, shape in meta["param_shapes"].items()}
    total = sum(np.abs(value, dtype=np.float64).sum() for value in named.values())
    np.testing.assert_allclose(total, meta["sum_abs_params"], rtol=1e-6)  # the weight rule itself
    named |= buffers or {}
    return network, weights.to_params(named, jax.eval_shape(init, jax.random.key(0)))


def _nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def _cond(arrays, prefix, augment=False):
    cond = {}
    if f"{prefix}|labels" in arrays:
        cond["label"] = jnp.asarray(arrays[f"{prefix}|labels"].argmax(1), jnp.int32)
    if augment:
        cond["augment"] = jnp.asarray(arrays[f"{prefix}|augment_labels"])
    return cond


def _assert_close(found, expected, tolerance):
    expected = expected.transpose(0, 2, 3, 1)
    assert np.max(np.abs(found - expected)) <= tolerance * np.max(np.abs(expected))


@pytest.mark.parametrize("config", ["r16", "r8c"])
@pytest.mark.parametrize("file", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
def test_networks_equal_the_originals(file, config, golden, golden_weights):
    arrays, meta = golden(file)
    buffer = f"{config}|buffer|model.map_noise.freqs"
    buffers = {"model.map_noise.freqs": arrays[buffer]} if buffer in arrays else {}
    network, params = _load(meta[config], golden_weights, buffers)
    for precondition in (entry["name"] for entry in meta[config]["preconds"]):
        prefix = f"{config}|{precondition}"
        tolerance = TOLERANCE_FOURIER if buffers else TOLERANCE[precondition]
        x, sigma = _nhwc(arrays[f"{prefix}|x"]), jnp.asarray(arrays[f"{prefix}|sigma"])
        seen = {}

        def raw(*args, seen=seen):
            seen["noise_label"], seen["F"] = args[2], network(*args)
            return seen["F"]

        cases = {"plain": _cond(arrays, prefix), "aug": _cond(arrays, prefix, augment=True), "nolabel": {}}
        for case, cond in cases.items():
            if f"{prefix}|D|{case}" not in arrays:
                continue
            found = DENOISERS[precondition](raw)(params, x, sigma, cond)
            _assert_close(found, arrays[f"{prefix}|D|{case}"], tolerance)
            _assert_close(seen["F"], arrays[f"{prefix}|F|{case}"], tolerance)
        np.testing.assert_allclose(seen["noise_label"], arrays[f"{prefix}|c_noise"].reshape(-1), rtol=tolerance)


@pytest.mark.parametrize("tag", ["song_r16", "song_r8c", "adm_r16", "adm_r8c"])
def test_step_condition_equals_the_original(tag, golden, golden_weights):
    arrays, meta = golden("sfd_nets")
    network, params = _load(meta[tag], golden_weights, step_condition=True)
    denoise = jax.jit(prediction.edm_denoiser(network))
    x, sigma = _nhwc(arrays[f"{tag}|x"]), jnp.asarray(arrays[f"{tag}|sigma"])
    for step in (None, 4, 6):
        cond = _cond(arrays, tag) | ({} if step is None else {"step": jnp.float32(step)})
        _assert_close(denoise(params, x, sigma, cond), arrays[f"{tag}|D|step={step}"], 2e-5)


def test_loss_and_gradients_equal_the_original(golden, golden_weights):
    arrays, meta = golden("edm_loss")
    # the network is configuration r8c of DDPM++
    meta = golden("edm_ddpmpp")[1]["r8c"] | {"grad_norms": meta["net"]["grad_norms"]}
    arrays = {name.removeprefix("net|"): value for name, value in arrays.items() if name.startswith("net|")}
    network, params = _load(meta, golden_weights)
    image, noise = _nhwc(arrays["images"]), _nhwc(arrays["noise"])
    sigma = jnp.asarray(arrays["sigma"].reshape(-1))
    cond = {"label": jnp.asarray(arrays["labels"].argmax(1), jnp.int32)}
    denoise = prediction.edm_denoiser(network)

    def objective(params):
        loss = edm.loss(edm.Settings(), denoise, params, image, sigma, noise, cond)
        return jnp.sum(loss) / image.shape[0], loss

    (total, loss), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    _assert_close(loss, arrays["loss"], 2e-5)
    np.testing.assert_allclose(total, arrays["loss_sum_over_batch"], rtol=2e-5)
    grads = trees.flatten(grads)
    for name, norm in meta["grad_norms"].items():
        found = grads[weights.path(name, len(meta["param_shapes"][name]))]
        # float32 against float64 was measured at 1.3e-6
        np.testing.assert_allclose(jnp.linalg.norm(found), norm or 0.0, rtol=5e-5, atol=1e-12)
        if f"grad|{name}" in arrays:
            expected = weights.layout(arrays[f"grad|{name}"])
            assert np.max(np.abs(found - expected)) <= 5e-5 * np.max(np.abs(expected))


CIFAR10 = functools.partial(SongUNet, 32, 3, 3, augment_dim=9, channels=128, channel_mult=(2, 2, 2))
FFHQ = functools.partial(SongUNet, 64, 3, 3, augment_dim=9, channels=128, channel_mult=(1, 2, 2, 2))
IMAGENET = functools.partial(DhariwalUNet, 64, 3, 3, num_classes=1000)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("constructor", "base", "branch"),
    [(CIFAR10, 55_733_891, 4_662_528), (FFHQ, 61_805_571, 5_450_496), (IMAGENET, 295_899_267, 28_201_344)],
)
def test_parameter_counts(constructor, base, branch):
    assert trees.count(abstract(lambda rngs: constructor(rngs=rngs))) == base
    assert trees.count(abstract(lambda rngs: constructor(step_condition=True, rngs=rngs))) == base + branch


@pytest.mark.fast
def test_step_embeddings():
    song = embeddings.swap_halves(embeddings.positional(jnp.array([4.0]), 128, endpoint=True))[0]
    # printed to 7 digits
    np.testing.assert_allclose(song[:3], [-0.7568025, -0.3092090, 0.1550603], atol=2e-6)
    np.testing.assert_allclose(song[64:67], [-0.6536436, -0.9509941, -0.9879050], atol=2e-6)
    adm = embeddings.positional(jnp.array([4.0]), 192)[0]
    np.testing.assert_allclose(adm[:3], [-0.6536436, -0.8811641, -0.9872235], atol=2e-6)
    np.testing.assert_allclose(adm[96:99], [-0.7568025, -0.4728106, -0.1593420], atol=2e-6)


TINY = dict(image_size=8, in_channels=1, out_channels=1, channels=16, channel_mult=(1,), num_blocks=1)


def test_zero_initialised_step_branch_is_the_base_network():
    make = lambda rngs: SongUNet(**TINY, step_condition=True, zero_init_step=True, rngs=rngs)  # noqa: E731
    network, init = functionalize(make)
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    plain = network(params, x, jnp.zeros(2), {})
    np.testing.assert_array_equal(plain, network(params, x, jnp.zeros(2), {"step": jnp.float32(4)}))


@pytest.mark.parametrize("network", [SongUNet, DhariwalUNet])
def test_guidance_condition_starts_as_the_base_network_and_then_matters(network):
    options = TINY | {"channels": 64 if network is DhariwalUNet else 16}
    apply, init = functionalize(lambda rngs: network(**options, guidance_condition=True, rngs=rngs))
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    told = {"guidance_scale": jnp.array([1.0, 4.0])}
    np.testing.assert_array_equal(apply(params, x, jnp.zeros(2), {}), apply(params, x, jnp.zeros(2), told))
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape) * 0.2, params)
    found = [apply(params, x[:1].repeat(2, 0), jnp.zeros(2), c) for c in ({}, told)]
    assert np.abs(found[1][0] - found[1][1]).max() > 1e-3 and np.abs(found[0] - found[1]).max() > 1e-3
    base, _ = functionalize(lambda rngs: network(**options, rngs=rngs))
    with pytest.raises(ValueError, match="set model.guidance_condition=True"):
        base({name: value for name, value in params.items() if name != "map_guidance"}, x, jnp.zeros(2), told)


@pytest.mark.parametrize("network", [SongUNet, DhariwalUNet])
def test_bottleneck_is_the_channel_mean_of_the_encoders_last_state(network):
    options = TINY | {"channels": 64 if network is DhariwalUNet else 16, "channel_mult": (1, 1)}
    constructor = lambda rngs: network(**options, rngs=rngs)  # noqa: E731
    (bottleneck, init), (apply, _) = functionalize(constructor, "bottleneck"), functionalize(constructor)
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    found = bottleneck(params, x, jnp.zeros(2))
    assert found.shape == (2, 4 * 4)
    # what the decoder does cannot change it; what the encoder's last block does must
    assert "4x4_block0" in params["enc"] and apply(params, x, jnp.zeros(2)).shape == x.shape
    other = params | {"dec": jax.tree.map(jnp.zeros_like, params["dec"])}
    np.testing.assert_array_equal(found, bottleneck(other, x, jnp.zeros(2)))
    last = jax.tree.map(lambda a: a + 0.1, params["enc"]["4x4_block0"])
    assert np.abs(found - bottleneck(params | {"enc": params["enc"] | {"4x4_block0": last}}, x, jnp.zeros(2))).max() > 1e-3


def test_dropout_needs_a_key_and_changes_with_it():
    network, init = functionalize(lambda rngs: SongUNet(**TINY, dropout=0.5, rngs=rngs))
    # the last layers start near zero: random weights instead
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape) * 0.2, init(jax.random.key(0)))
    x, label = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.zeros(2)
    outputs = [network(params, x, label, {}, key) for key in (None, jax.random.key(0), jax.random.key(1))]
    assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[1], outputs[2])
    np.testing.assert_array_equal(outputs[1], network(params, x, label, {}, jax.random.key(0)))


def test_bfloat16_products_keep_float32_weights():
    network, init = functionalize(lambda rngs: SongUNet(**TINY, dtype=jnp.bfloat16, rngs=rngs))
    reference, _ = functionalize(lambda rngs: SongUNet(**TINY, rngs=rngs))
    params, x = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape) * 0.2, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    denoise, exact = prediction.edm_denoiser(network), prediction.edm_denoiser(reference)
    found, expected = (d(params, x, jnp.float32(0.5)) for d in (denoise, exact))
    assert found.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % a product, and a dozen layers
    assert 0 < np.max(np.abs(found - expected)) < 0.05 * np.max(np.abs(expected))


def test_wrong_input_is_refused():
    network, init = functionalize(lambda rngs: SongUNet(**TINY, rngs=rngs))
    params = init(jax.random.key(0))
    with pytest.raises(ValueError, match="found images of shape"):
        network(params, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="step_condition"):
        network(params, jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), {"step": jnp.float32(4)})
    with pytest.raises(ValueError, match="positional or fourier"):
        abstract(lambda rngs: SongUNet(**TINY, embedding="learned", rngs=rngs))
