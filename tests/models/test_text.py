"""CLIP's text encoders against transformers' classes, with drawn weights and at the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.text import CLIP_L, OPEN_CLIP_BIG_G, OPEN_CLIP_H, ClipText
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap
from diffjax.weights import text as tables

# float32 in another order of sums; the texts below have a deviation of about 0.9
TOLERANCE = 3e-5

VOCABULARY, END, LENGTH = 50, 49, 12
TINY = dict(width=32, depth=3, heads=4, hidden=48, vocabulary=VOCABULARY, length=LENGTH)
THEIRS = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=VOCABULARY,
    max_position_embeddings=LENGTH, bos_token_id=48,
)  # fmt: skip
# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act and parameters as published
FULL = {
    "clip-vit-large-patch14": (CLIP_L, 768, 3072, 12, 12, "quick_gelu", 123_060_480),
    "stable-diffusion-2": (OPEN_CLIP_H, 1024, 4096, 23, 16, "gelu", 340_387_840),
    "stable-diffusion-xl, second": (OPEN_CLIP_BIG_G, 1280, 5120, 32, 20, "gelu", 694_659_840),
}


def ids():
    """Texts as tokenisers pad them: with the end token, and with 0."""
    found = np.random.default_rng(1).integers(1, END - 1, (3, LENGTH)).astype(np.int32)
    found[:, 0] = END - 1
    found[0, 5:], found[1, -1], found[2, 3], found[2, 4:] = END, END, END, 0
    return found


def arrays(module):
    return {name: parameter.detach().numpy() for name, parameter in module.state_dict().items()}


def load(module, constructor):
    """(network, parameters) of ours with the weights of a torch module."""
    weights = arrays(module)
    network = jax.jit(functionalize(constructor)[0], static_argnames="skip")
    return network, keymap.to_params(tables.clip_text(weights), weights, abstract(constructor))


def made(**options):
    """(jitted network, drawn parameters) of a tiny encoder."""
    constructor = lambda rngs: ClipText(**TINY | options, rngs=rngs)  # noqa: E731
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.2 * random.standard_normal(a.shape, np.float32))  # noqa: E731
    params = jax.tree.map(draw, abstract(constructor))
    return jax.jit(functionalize(constructor)[0], static_argnames="skip"), params


def torch_states(module, ids):
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(ids).long(), output_hidden_states=True)


@pytest.mark.fast
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", END), ("gelu", 2)])
def test_states_equal_transformers(transformers, drawn, activation, eos):
    config = transformers.CLIPTextConfig(**THEIRS, hidden_act=activation, eos_token_id=eos)
    module = drawn(transformers.CLIPTextModel, config)
    options = tables.clip_text_options(config.to_dict())
    assert options == TINY | {"activation": activation, "projection": 0, "end": None if eos == 2 else END}
    network, params = load(module, lambda rngs: ClipText(**options, rngs=rngs))
    expected = torch_states(module, ids())
    for skip in range(3):
        found = network(params, ids(), skip=skip)
        np.testing.assert_allclose(found.hidden, expected.hidden_states[-1 - skip].numpy(), atol=TOLERANCE)
        np.testing.assert_allclose(found.pooled, expected.pooler_output.numpy(), atol=TOLERANCE)
        if not skip:
            np.testing.assert_allclose(found.text, expected.last_hidden_state.numpy(), atol=TOLERANCE)
            assert 0.5 < np.std(found.text) < 1.5
        else:  # "clip skip": the last norm on an earlier state
            norm = module.final_layer_norm(expected.hidden_states[-1 - skip]).detach().numpy()
            np.testing.assert_allclose(found.text, norm, atol=TOLERANCE)


def test_projection_equals_transformers(transformers, drawn):
    config = transformers.CLIPTextConfig(**THEIRS, hidden_act="gelu", eos_token_id=2, projection_dim=20)
    config.architectures = ["CLIPTextModelWithProjection"]
    module = drawn(transformers.CLIPTextModelWithProjection, config)
    options = tables.clip_text_options(config.to_dict())
    network, params = load(module, lambda rngs: ClipText(**options, rngs=rngs))
    found, expected = network(params, ids(), skip=1), torch_states(module, ids())
    assert found.pooled.shape == (3, 20)
    np.testing.assert_allclose(found.pooled, expected.text_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(found.hidden, expected.hidden_states[-2].numpy(), atol=TOLERANCE)
    # without the projection the same file loads too
    _, plain = load(module, lambda rngs: ClipText(**options | {"projection": 0}, rngs=rngs))
    assert trees.compare(plain, {name: leaf for name, leaf in params.items() if name != "projection"}) == []


def test_open_clip_names_equal_diffusers_conversion(transformers, drawn):
    """Single files of Stable Diffusion 2 and XL: fused projections, and a matrix that is not transposed."""
    single_file = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="diffusers is not installed: pip install 'diffjax[test]'"
    )
    import torch

    config = transformers.CLIPTextConfig(**THEIRS, hidden_act="gelu", eos_token_id=2, projection_dim=32)
    module = drawn(transformers.CLIPTextModelWithProjection, config)
    constructor = lambda rngs: ClipText(**TINY, activation="gelu", projection=32, rngs=rngs)  # noqa: E731
    _, expected = load(module, constructor)
    theirs = keymap.to_weights(tables.OPEN_CLIP_TEXT, expected)
    assert theirs["transformer.resblocks.2.attn.in_proj_weight"].shape == (96, 32) and len(theirs) == 5 + 3 * 12
    extra = {"logit_scale": np.float32(4.6), "transformer.resblocks.23.ln_1.bias": np.zeros(32, np.float32)}
    back = keymap.to_params(tables.clip_text(theirs), theirs | extra, abstract(constructor))
    jax.tree.map(np.testing.assert_array_equal, back, expected)
    converted = single_file.convert_open_clip_checkpoint(
        module, {"model." + name: torch.from_numpy(array) for name, array in theirs.items()}, prefix="model."
    )
    assert set(converted) == set(arrays(module))
    for name, array in arrays(module).items():
        np.testing.assert_array_equal(converted[name].numpy(), array, err_msg=name)


@pytest.mark.parametrize("name", FULL)
def test_published_sizes(transformers, fits, name):
    import torch

    preset, width, hidden, depth, heads, activation, count = FULL[name]
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads,
        hidden_act=activation, projection_dim=1280, eos_token_id=2,
    )  # fmt: skip
    config.architectures = ["CLIPTextModelWithProjection" if "projection" in preset else "CLIPTextModel"]
    with torch.device("meta"):
        module = getattr(transformers, config.architectures[0])(config)
    defaults = dict(hidden=4 * width, vocabulary=49408, length=77, end=None, projection=0)
    assert tables.clip_text_options(config.to_dict()) == defaults | preset
    ours = abstract(lambda rngs: ClipText(**preset, rngs=rngs))
    assert trees.count(ours) == sum(tensor.numel() for tensor in module.parameters()) == count
    fits(tables.clip_text(module.state_dict()), module, ours)


@pytest.mark.fast
def test_tokens_see_those_before_them_only():
    (network, params), text = made(), ids()
    other = text.copy()
    other[:, 4] = 7
    found, changed = network(params, text), network(params, other)
    np.testing.assert_array_equal(found.text[:, :4], changed.text[:, :4])
    assert np.abs(found.text[:, 4:] - changed.text[:, 4:]).max(axis=(1, 2)).min() > 1e-4
    short = network(params, text[:, :6])
    # other lengths are summed in another order
    np.testing.assert_allclose(short.text, found.text[:, :6], atol=1e-5)


def test_the_first_end_token_is_pooled():
    (network, params), text = made(end=END), ids()
    found = network(params, text)
    # the compiler may write a norm into each of the places that use it, and round the last bit there as it likes
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(found.pooled, found.text[np.arange(3), [5, LENGTH - 1, 3]])
    close(found.pooled, made(end=None)[0](params, text).pooled)
    text[0] = 1
    assert np.isnan(network(params, text).pooled[0]).all() and np.isfinite(network(params, text).pooled[1:]).all()


def test_policies_keep_values_and_gradients():
    text = ids()

    def gradient(remat):
        network, params = made(remat=remat)
        objective = lambda params: jnp.sum(jnp.square(network(params, text, skip=1).text))  # noqa: E731
        return jax.jit(jax.value_and_grad(objective))(params)

    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in ("", "nothing")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_products():
    (network, params), (reference, _) = made(dtype=jnp.bfloat16), made()
    found, expected = network(params, ids(), skip=1), reference(params, ids(), skip=1)
    assert found.text.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4 % a product, and a dozen layers
    assert 0 < np.abs(found.text - expected.text).max() < 0.05 * np.abs(expected.text).max()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert reference(half, ids()).text.dtype == jnp.bfloat16


def test_wrong_input_is_refused():
    network, params = made()
    with pytest.raises(ValueError, match="found 13 tokens, expected 12 at most"):
        network(params, np.zeros((1, 13), np.int32))
    with pytest.raises(ValueError, match="expected integers"):
        network(params, jnp.zeros((1, 12)))
    with pytest.raises(ValueError, match=r"found skip=3, expected 0..2"):
        network(params, ids(), skip=3)
    with pytest.raises(ValueError, match="did you mean 'quick_gelu'"):
        abstract(lambda rngs: ClipText(**TINY | {"activation": "quickgelu"}, rngs=rngs))
    with pytest.raises(ValueError, match="expected a multiple"):
        abstract(lambda rngs: ClipText(**TINY | {"heads": 5}, rngs=rngs))
    assert np.isnan(network(params, np.full((1, 12), VOCABULARY)).text).all()


def test_what_is_no_text_encoder_is_refused():
    with pytest.raises(ValueError, match="no weights of a CLIP text encoder.*begin with .'model'.*load.under"):
        tables.clip_text(["model.diffusion_model.out.weight"])
    with pytest.raises(ValueError, match="config.json lacks .*intermediate_size"):
        tables.clip_text_options({"hidden_size": 3})
    with pytest.raises(ValueError, match="layer_norm_eps"):
        tables.clip_text_options({"layer_norm_eps": 1e-6})
