"""Groups in slices: values and gradients of the whole, and a lossy way that is told from them."""

import functools

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.motion_unet import MotionUNet
from diffjax.models.svd import SVDUNet
from diffjax.models.vae_video import AutoencoderKLTemporalDecoder
from diffjax.nn.functional import functionalize
from diffjax.nn.groups import FRAMES, PLAIN, ROWS, TOKENS
from diffjax.nn.norms import GroupNorm
from diffjax.video import slicer
from diffjax.video.grouping import Plan

# float32 sums in another order: 3e-7 was measured
TOLERANCE = 1e-5
LENGTH = 100  # more slices than any axis has parts


def distance(found, expected):
    """Relative in L2, of trees as one vector."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    squares = [(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in pairs]
    return float(jnp.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def results(network, run, *arrays):
    """Output, and gradients of a loss to parameters and x."""

    def loss(params, x, *rest):
        out = network(params, x, *rest, run=run)
        return jnp.sum(jnp.sin(3 * out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
    return out, gradients


SIZE = FRAMES_OF, HEIGHT, WIDTH = 5, 5, 3


@functools.cache
def whole():
    return results(blocks.network, PLAIN, *blocks.arrays(*SIZE))


@functools.cache
def sliced(*sizes):
    """With slices of so many frames, rows and tokens: counts that give the same ones share a program."""
    counts = (-(-length // size) for length, size in zip((FRAMES_OF, HEIGHT, HEIGHT * WIDTH), sizes, strict=True))
    return results(blocks.network, slicer.Sliced(Plan(*counts)), *blocks.arrays(*SIZE))


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.fast), 4, 5, 7, LENGTH])
def test_slices_have_the_values_and_gradients_of_the_whole(count):
    # 5 frames, 5 rows, 15 tokens: 2 to 4 leave a rest behind full slices on one axis or another
    plan = Plan(count, count, count)
    lengths = ((FRAMES, FRAMES_OF), (ROWS, HEIGHT), (TOKENS, HEIGHT * WIDTH))
    out, gradients = sliced(*(plan.size("", axis, length) for axis, length in lengths))
    assert distance(out, whole()[0]) < TOLERANCE
    assert distance(gradients, whole()[1]) < TOLERANCE


@pytest.mark.parametrize(("compat", "same"), [("alone", True), ("official", False)])
def test_ways_of_comparison(compat, same):
    run = slicer.runner(Plan(6, 6, 6), compat)
    error = distance(jax.jit(functools.partial(blocks.network, run=run))(*blocks.arrays(*SIZE)), whole()[0])
    assert error < TOLERANCE if same else error > 1e-2, error


LATENTS = (1, 5, 9, 6, 4)  # 5 frames and 9 rows in slices of 2 and 3, and a rest
TEXT = {"text": jnp.ones((1, 3, 8))}
PICTURE = {"image": jnp.ones((1, 1, 8)), "image_latents": jnp.ones((1, 9, 6, 4)), "control": jnp.ones((1, 3))}
SMALL = dict(channel_mult=(1,), num_blocks=1, transformer_depth=(1,), context_width=8)
MOTION = dict(image_size=8, channels=4, out_channels=4, width=64, heads=2, motion_heads=2)
DECODER = dict(width=32, channel_mult=(1, 2), num_blocks=1)
MODELS = {
    "svd": (functools.partial(SVDUNet, width=64, heads=(2,), **SMALL), "__call__", (jnp.ones(1), PICTURE)),
    "motion": (functools.partial(MotionUNet, **MOTION, **SMALL), "__call__", (jnp.ones(1), TEXT)),
    "decoder": (functools.partial(AutoencoderKLTemporalDecoder, **DECODER), "decode", ()),
}


def made(name):
    """(network, parameters, x, what else it is given)."""
    make, method, rest = MODELS[name]
    network, init = functionalize(lambda rngs: make(rngs=rngs), method)
    random = np.random.default_rng(0)

    def draw(leaf):  # nowhere zero, as new networks are
        return jnp.asarray(random.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    params = jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))
    return network, params, jnp.asarray(random.standard_normal(LATENTS), jnp.float32), *rest


def test_values_and_gradients_of_svd_in_slices():
    network, *arrays = made("svd")
    whole, sliced = (results(network, run, *arrays) for run in (PLAIN, slicer.Sliced(Plan(3, 4, 4))))
    assert distance(sliced[0], whole[0]) < TOLERANCE
    assert distance(sliced[1], whole[1]) < TOLERANCE


@pytest.mark.parametrize("name", ["motion", "decoder"])
def test_networks_of_video_in_slices(name):
    network, *arrays = made(name)
    runs = PLAIN, slicer.Sliced(Plan(3, 4, 4)), slicer.runner(Plan(3, 12), "official")
    whole, sliced, official = jax.jit(lambda *arrays: [network(*arrays, run=run) for run in runs])(*arrays)
    assert distance(sliced, whole) < TOLERANCE
    # statistics of a slice are not those of the whole
    assert distance(official, whole) > 1e-2


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_moments_of_slices_are_those_of_the_whole(size):
    norm = GroupNorm(8, 1e-5, 4, rngs=None)
    # a mean far above the deviation: sums of squares would lose it
    x = 100 + jax.random.normal(jax.random.key(0), (2, 3, 7, 2, 8))
    found = slicer.Sliced(Plan(rows=-(-7 // size))).moments("norm", ROWS, norm, x)
    wide = np.asarray(x, np.float64).reshape(2, -1, 4, 2)
    np.testing.assert_allclose(found.mean, wide.mean(axis=(1, 3)), rtol=1e-6)
    # float32 keeps 5 digits of a deviation of 1 around 100
    np.testing.assert_allclose(found.squares / found.count, wide.var(axis=(1, 3)), rtol=2e-5)


def test_groups_that_cannot_be_cut_are_refused():
    run, x = slicer.Sliced(Plan(frames=2)).within("up"), jnp.ones((4, 2, 2, 3))
    with pytest.raises(ValueError, match="up/a: found arrays of shapes .*expected one number of frames along axis 0"):
        run("a", FRAMES, {"add": lambda x, y: x + y}, x, jnp.ones((2, 2, 2, 3)))
    with pytest.raises(ValueError, match="up/a: found a result of shape"):
        run("a", FRAMES, {"sum": lambda x: x[:1]}, x)
    with pytest.raises(ValueError, match="unknown compat 'offical'; did you mean 'official'"):
        slicer.runner(Plan(), "offical")
