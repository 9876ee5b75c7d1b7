"""BERT against transformers' class, with drawn weights, at published sizes, and with weights that a package ships."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.build import companions
from diffjax.core import trees
from diffjax.models.bert import BERT_BASE, MINILM_L6, Bert
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap, load
from diffjax.weights import text as tables

# float32 in another order of sums; the states below have a deviation of about 1
TOLERANCE = 3e-5

TINY = dict(width=24, depth=2, heads=3, hidden=40, activation="gelu", vocabulary=30, length=24)


def theirs(transformers, preset):
    return transformers.BertConfig(
        hidden_size=preset["width"], num_hidden_layers=preset["depth"], num_attention_heads=preset["heads"],
        intermediate_size=preset["hidden"], vocab_size=preset.get("vocabulary", 30522),
        max_position_embeddings=preset.get("length", 512), attn_implementation="eager",
    )  # fmt: skip


def inputs(length=20, vocabulary=30):
    random = np.random.default_rng(1)
    mask = np.arange(length) < np.array([[length], [7], [1]])
    return np.where(mask, random.integers(1, vocabulary, (3, length)), 0).astype(np.int32), mask


def made(**options):
    constructor = lambda rngs: Bert(**TINY | options, rngs=rngs)  # noqa: E731
    random = np.random.default_rng(0)
    draw = lambda a: jnp.asarray(0.3 * random.standard_normal(a.shape, np.float32))  # noqa: E731
    params = jax.tree.map(draw, abstract(constructor))
    return jax.jit(functionalize(constructor)[0]), params


def converted(module, options):
    """(network, params, weights) of a torch module."""
    constructor = lambda rngs: Bert(**options, rngs=rngs)  # noqa: E731
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    params = keymap.to_params(tables.BERT, weights, abstract(constructor))
    return jax.jit(functionalize(constructor)[0]), params, weights


def assert_same_states(module, network, params, ids, mask):
    import torch

    for given in (None, mask):
        with torch.no_grad():
            expected = module(torch.from_numpy(ids).long(), None if given is None else torch.from_numpy(mask).long())
        found, shown = network(params, ids, given), np.ones_like(mask) if given is None else mask
        np.testing.assert_allclose(found[shown], expected.last_hidden_state.numpy()[shown], atol=TOLERANCE)
    return found


@pytest.mark.fast
def test_states_equal_transformers(transformers, drawn):
    config = theirs(transformers, TINY)
    module = drawn(transformers.BertModel, config)
    options = tables.bert_options(config.to_dict())
    assert options == TINY
    network, params, weights = converted(module, options)
    assert 0.5 < np.std(assert_same_states(module, network, params, *inputs())) < 1.5
    back = keymap.to_weights(tables.BERT, params)
    for name, array in back.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    assert set(weights) - set(back) <= {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}


@pytest.mark.parametrize(("preset", "count"), [(MINILM_L6, 22_565_376), (BERT_BASE, 108_891_648)])
def test_published_sizes(transformers, fits, preset, count):
    import torch

    with torch.device("meta"):
        module = transformers.BertModel(theirs(transformers, preset), add_pooling_layer=False)
    ours = abstract(lambda rngs: Bert(**preset, rngs=rngs))
    assert trees.count(ours) == sum(tensor.numel() for tensor in module.parameters()) == count
    fits(tables.BERT, module, ours)


def test_the_packaged_weights_equal_transformers(transformers):
    """all-MiniLM-L6-v2 itself; its states have a deviation of about 0.5."""
    try:
        folder = companions.packaged("minilm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    module = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    options = tables.bert_options(load.config(folder))
    assert {name: options[name] for name in MINILM_L6} == MINILM_L6
    network, params, _ = converted(module, options)
    assert_same_states(module, network, params, *inputs(vocabulary=30522))


def test_padding_changes_nothing():
    network, params = made()
    ids, mask = inputs()
    found = network(params, ids, mask)
    other = network(params, np.where(mask, ids, 5), mask)
    np.testing.assert_array_equal(np.where(mask[..., None], found, 0), np.where(mask[..., None], other, 0))
    short = network(params, ids[:, :7], mask[:, :7])
    # other lengths are summed in another order
    np.testing.assert_allclose(short[1], found[1, :7], atol=1e-5)
    assert np.abs(network(params, ids)[1, :7] - found[1, :7]).max() > 1e-3


def test_tokens_see_both_sides_and_their_places():
    network, params = made()
    ids, _ = inputs()
    last, first = ids.copy(), ids.copy()
    last[:, -1], first[:, 0] = 1 + ids[:, -1] % 28, 1 + ids[:, 0] % 28
    found = network(params, ids)
    assert np.abs(network(params, last) - found)[:, 0].max() > 1e-3
    assert np.abs(network(params, first) - found)[:, -1].max() > 1e-3
    assert np.abs(network(params, ids[:, ::-1])[:, ::-1] - found).max() > 1e-3


def test_policies_keep_values_and_gradients():
    ids, mask = inputs()

    def gradient(remat):
        network, params = made(remat=remat)
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.square(network(params, ids, mask)))))(params)

    # sums in another order, of terms as large as the largest gradient
    for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in ("", "nothing")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * np.abs(a).max())


def test_wrong_input_is_refused():
    network, params = made()
    ids, mask = inputs()
    with pytest.raises(ValueError, match=r"expected bool\[3, 20\], of the shape"):
        network(params, ids, mask[:, :5])
    with pytest.raises(ValueError, match="found 25 tokens, expected 24 at most"):
        network(params, np.ones((1, 25), np.int32))
    with pytest.raises(ValueError, match="found width 24 with 5 heads"):
        abstract(lambda rngs: Bert(**TINY | {"heads": 5}, rngs=rngs))
    config = {"hidden_size": 24, "position_embedding_type": "relative_key"}
    with pytest.raises(ValueError, match="position_embedding_type=relative_key in config.json, expected absolute"):
        tables.bert_options(config)
    with pytest.raises(ValueError, match="config.json lacks num_hidden_layers"):
        tables.bert_options({"hidden_size": 24})
