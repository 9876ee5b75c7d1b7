"""Sizes, crops and flips as conditions of five networks, and the padding of texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models import dit, mdt, mmdit, pixart, unet
from diffjax.nn import control
from diffjax.nn.attention import attend
from diffjax.nn.functional import functionalize

# specification, 4.2: u -> gamma
U = np.array([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
GAMMA = {
    ("power_cosine", 1): [1, 0.97552826, 0.85355339, 0.5, 0.14644661, 0.02447174, 0],
    ("power_cosine", 2): [1, 0.91354029, 0.59754516, 0.14644661, 0.00960736, 0.00024672, 0],
    ("power_cosine", 4): [1, 0.73549054, 0.22733751, 0.00960736, 3.765e-5, 2e-8, 0],
    ("cosine_power", 1): [1, 0.97552826, 0.85355339, 0.5, 0.14644661, 0.02447174, 0],
    ("cosine_power", 2): [1, 0.95165538, 0.72855339, 0.25, 0.02144661, 0.00059887, 0],
    ("cosine_power", 4): [1, 0.90564797, 0.53079004, 0.0625, 0.00045996, 3.6e-7, 0],
}
HIGH, LOW = ("top", "left", "flip"), ("height", "width")
METADATA = {"high": HIGH, "low": LOW}
NETWORKS = {
    "dit": (dit.DiT, dict(width=32, depth=2, heads=2)),
    "mdt": (mdt.MDT, dict(width=32, depth=4, decoder_depth=2, heads=2)),
    "pixart": (pixart.PixArt, dict(width=48, depth=2, heads=2)),
    "mmdit": (mmdit.MMDiT, dict(width=32, depth=2, heads=2)),
    "unet": (unet.UNet, dict(width=32, channel_mult=(1, 2), transformer_depth=(0, 1), heads=2, context_width=16)),
}


@pytest.mark.fast
@pytest.mark.parametrize("kind, alpha", GAMMA)
def test_weights(kind, alpha, x64):
    found = control.WEIGHTS[kind](jnp.asarray(U), alpha)
    np.testing.assert_allclose(found, GAMMA[kind, alpha], atol=1e-7)  # as many digits as the table has
    dense = control.WEIGHTS[kind](jnp.linspace(0, 1, 101), alpha)
    assert (jnp.diff(dense) < 1e-12).all()


def told(batch=2, **changes):
    """Conditions of a batch: a label and metadata."""
    cond = {"label": jnp.arange(batch), "u": jnp.full(batch, 0.3)}
    cond |= {name: jnp.full(batch, value) for name, value in zip((*HIGH, *LOW), (3.0, 5.0, 1.0, 90.0, 70.0), strict=True)}
    return cond | {name: jnp.full(batch, float(value)) for name, value in changes.items()}


@functools.cache
def network(name, zero_init=True, plain=False):
    make, options = NETWORKS[name]
    metadata = {} if plain else {"metadata": {**METADATA, "zero_init": zero_init}}
    return functionalize(lambda rngs: make(8, 4, out_channels=4, num_classes=3, **options, **metadata, rngs=rngs))


def weights(init, seed=0):
    """Drawn everywhere, so that no gate or output is zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * random.standard_normal(leaf.shape), jnp.float32), jax.eval_shape(init, jax.random.key(0)))


X, T = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 8, 4)), jnp.float32), jnp.array([10.0, 700.0])


@pytest.mark.parametrize("name", NETWORKS)
def test_metadata_joins_each_network(name):
    """Fresh, it changes nothing, to the bit; trained, high-level metadata counts at all times, low-level not at u = 1,
    and what is dropped not at all."""
    apply, init = network(name)
    fresh = init(jax.random.key(0))
    drawn = weights(network(name, plain=True)[1])
    # every weight of the network drawn, those of metadata as they are when new
    params = _with(fresh, drawn)
    plain = network(name, plain=True)[0](drawn, X, T, {"label": jnp.arange(2)})
    run = jax.jit(apply)
    np.testing.assert_array_equal(run(params, X, T, told()), run(params, X, T, told(height=1000, flip=0)))
    np.testing.assert_allclose(run(params, X, T, told()), plain, atol=1e-5)  # two programs
    trained = weights(init, 5)
    base = run(trained, X, T, told())
    assert np.abs(run(trained, X, T, told(height=1000)) - base).max() > 1e-4
    noisy = run(trained, X, T, told(u=1.0))
    np.testing.assert_array_equal(run(trained, X, T, told(u=1.0, height=1000)), noisy)
    assert np.abs(run(trained, X, T, told(u=1.0, flip=0)) - noisy).max() > 1e-4
    dropped = told() | {"drop_control": jnp.ones(2, bool)}
    other = told(height=1, flip=0, left=9) | {"drop_control": jnp.ones(2, bool)}
    np.testing.assert_array_equal(run(trained, X, T, dropped), run(trained, X, T, other))
    half = run(trained, X, T, told() | {"drop_control": jnp.array([False, True])})
    np.testing.assert_allclose(half[0], base[0], atol=1e-5)
    np.testing.assert_allclose(half[1], run(trained, X, T, dropped)[1], atol=1e-5)


def _with(params, known):
    """`params` with the leaves of `known` in the place of theirs."""
    flat, have = trees.flatten(params), trees.flatten(known)
    return jax.tree.unflatten(jax.tree.structure(params), [have.get(path, leaf) for path, leaf in flat.items()])


@pytest.mark.parametrize("high, low, parameters", [(("flip",), (), 1_624_320), (("top", "left"), (), 1_919_232), ((), ("height", "width", "aspect"), 2_214_144)])
def test_parameters_of_published_width(high, low, parameters):
    """256 k d + d^2 + 2 d of k numbers at d = 1152 (specification, 2.6), and the vector of what is dropped."""
    init = functionalize(lambda rngs: control.Control(1152, high, low, rngs=rngs))[1]
    assert trees.count(jax.eval_shape(init, jax.random.key(0))) == parameters + 1152


@pytest.mark.parametrize(
    "options, message",
    [
        ({"high": ("colour",)}, r"found metadata high=\('colour',\)"),
        ({"high": ("flip",), "low": ("flip",)}, "each once"),
        ({}, "expected some of"),
        ({"low": ("height",), "weight": "cosine"}, "unknown model.metadata.weight 'cosine'"),
    ],
)
def test_metadata_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        functionalize(lambda rngs: control.Control(8, **options, rngs=rngs))


def test_missing_metadata_is_named():
    apply, init = functionalize(lambda rngs: control.Control(8, **METADATA, rngs=rngs))
    cond = {name: value for name, value in told().items() if name not in ("flip", "u")} | {"top": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"found cond of shapes \{'top': \(3,\), 'flip': None, 'u': None\}, expected \(2,\)"):
        apply(init(jax.random.key(0)), cond, 2)


# Text ----------------------------------------------------------------------------------------------------------

SLOTS, WIDTH = 12, 5
TEXT = jnp.asarray(np.random.default_rng(2).standard_normal((3, SLOTS, WIDTH)), jnp.float32)
LENGTH = jnp.array([4, 12, 2])


@pytest.mark.fast
def test_padding_copies_and_zeros():
    found = np.asarray(control.pad_text(TEXT, LENGTH, "replicate"))
    np.testing.assert_array_equal(found[0], np.tile(TEXT[0, :4], (3, 1)))
    np.testing.assert_array_equal(found[1], TEXT[1])  # nothing to pad
    np.testing.assert_array_equal(found[2], np.tile(TEXT[2, :2], (6, 1)))
    for same in (control.pad_text(TEXT, LENGTH), control.pad_text(TEXT, LENGTH, beta=0.0, key=jax.random.key(0))):
        np.testing.assert_array_equal(same, found)
    zero = np.asarray(control.pad_text(TEXT, LENGTH, "zero"))
    np.testing.assert_array_equal(zero[0, :4], TEXT[0, :4])
    assert not zero[0, 4:].any() and not zero[2, 2:].any()


def test_noise_of_the_padding():
    """Around the copies, with the deviation beta sqrt(S / n - 1) std_k; real tokens stay."""
    draw = jax.jit(jax.vmap(lambda key: control.pad_text(TEXT, LENGTH, "noisy_replicate", 0.1, key)))
    draws = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)), np.float64)
    copies = np.asarray(control.pad_text(TEXT, LENGTH, "replicate"))
    for row, real in enumerate(LENGTH.tolist()):
        np.testing.assert_array_equal(draws[:, row, :real], np.broadcast_to(copies[row, :real], draws[:, row, :real].shape))
        expected = 0.1 * np.sqrt(SLOTS / real - 1) * np.asarray(TEXT[row, :real]).std(axis=0)
        spread = (draws[:, row, real:] - copies[row, real:]).std(axis=0)
        # deviations of 4000 draws: within 5 %, which is 4.5 of their own
        np.testing.assert_allclose(spread, np.broadcast_to(expected, spread.shape), rtol=0.05)


def test_copies_are_attended_to_as_the_text_alone():
    """Without a mask, where the slots are a multiple of the length: each token has 3 copies of equal weight."""
    random = np.random.default_rng(3)
    q = jnp.asarray(random.standard_normal((1, 7, 1, WIDTH)), jnp.float32)
    padded = control.pad_text(TEXT[:1], LENGTH[:1], "replicate")[:, :, None]
    alone = TEXT[:1, :4, None]
    np.testing.assert_allclose(attend(q, padded, padded), attend(q, alone, alone), atol=1e-6)  # sums in another order


def test_paddings_that_cannot_be():
    with pytest.raises(ValueError, match="unknown text_padding 'repeat'"):
        control.pad_text(TEXT, LENGTH, "repeat")
    with pytest.raises(ValueError, match=r"found text_length \(2,\) for text \(3, 12, 5\)"):
        control.pad_text(TEXT, LENGTH[:2])
