"""The autoencoder of Stable Video Diffusion against diffusers under drawn weights, whole, in chunks, and in groups."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_by_one import OneByOne, distance, draw, epsilons, from_torch, their_epsilons, to_torch

from diffjax.core import trees
from diffjax.models.vae_video import AutoencoderKLTemporalDecoder
from diffjax.nn.functional import abstract, functionalize
from diffjax.weights import keymap, svd

TINY = dict(width=32, channel_mult=(1, 2), num_blocks=2)
# float32 sums in another order; 1.4e-6 was measured
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def diffusers(transformers):
    del transformers  # which diffusers imports
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'diffjax[test]'")
        package.AutoencoderKLTemporalDecoder  # noqa: B018, imported when it is asked for
    return package


@pytest.fixture(scope="module")
def module(diffusers, golden_weights):
    """Their network and our parameters of its weights."""
    theirs = their_vae(diffusers, **TINY)
    weights = draw(theirs, golden_weights)
    return theirs, keymap.to_params(svd.vae(levels=2), weights, shapes_of(TINY)), weights


def their_vae(diffusers, width=128, channel_mult=(1, 2, 4, 4), num_blocks=2):
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=tuple(width * mult for mult in channel_mult), layers_per_block=num_blocks,
        down_block_types=("DownEncoderBlock2D",) * len(channel_mult),
    )  # fmt: skip


def shapes_of(options):
    return abstract(lambda rngs: AutoencoderKLTemporalDecoder(**options, rngs=rngs))


@functools.cache
def method(name, **static):
    network = functionalize(lambda rngs: AutoencoderKLTemporalDecoder(**TINY, rngs=rngs), name)[0]
    return jax.jit(functools.partial(network, **static))


def latents(videos, frames, size):
    return jax.random.normal(jax.random.key(frames), (videos, frames, *size, 4))


def their_frames(theirs, z_BTHWC):
    b, t, h, w, c = z_BTHWC.shape
    decoded = theirs.decode(to_torch(z_BTHWC.reshape(b * t, h, w, c)), num_frames=t).sample
    return from_torch(decoded).reshape(b, t, 2 * h, 2 * w, 3)


@pytest.mark.parametrize(("videos", "frames", "size"), [(2, 5, (6, 4)), (1, 3, (5, 7))])
def test_decoding_equals_diffusers(module, videos, frames, size):
    theirs, params, _ = module
    z = latents(videos, frames, size)
    found, expected = method("decode")(params, z * 0.18215), their_frames(theirs, z)
    assert 0.1 < expected.std() < 5 and found.dtype == z.dtype
    assert distance(found, expected) < TOLERANCE


def test_decoding_in_chunks_equals_diffusers(module):
    """Each chunk is a clip of its own, also to us: its frames are others than those of the whole."""
    theirs, params, _ = module
    z = latents(1, 5, (5, 7))
    whole = their_frames(theirs, z)
    for chunk in (slice(0, 3), slice(2, 5)):
        found = method("decode")(params, z[:, chunk] * 0.18215)
        assert distance(found, their_frames(theirs, z[:, chunk])) < TOLERANCE < 1e-2 < distance(found, whole[:, chunk])


def test_encoding_equals_diffusers(module):
    theirs, params, weights = module
    written = keymap.to_weights(svd.vae(levels=2), params)
    assert written.keys() == weights.keys() and all(np.array_equal(written[name], weights[name]) for name in weights)
    x = jax.random.normal(jax.random.key(1), (2, 12, 8, 3))
    posterior, found = theirs.encode(to_torch(x)).latent_dist, method("mode")(params, x)
    assert distance(found, from_torch(posterior.mode())) < TOLERANCE  # not scaled
    sample = method("encode")(params, x, jax.random.key(2))
    noise = jax.random.normal(jax.random.key(2), found.shape)
    assert distance(sample, (found + from_torch(posterior.std) * noise) * 0.18215) < TOLERANCE


@pytest.mark.fast
def test_groups_part_by_part():
    """No operator looks beyond its part."""
    run, z = OneByOne(2), latents(1, 3, (5, 7))
    random = np.random.default_rng(0)
    draw_leaf = lambda a: jnp.asarray(random.standard_normal(a.shape) / np.sqrt(np.prod(a.shape[:-1])))  # noqa: E731
    params = jax.tree.map(draw_leaf, shapes_of(TINY))
    found, expected = method("decode", run=run)(params, z), method("decode")(params, z)
    assert distance(found, expected) < 1e-5  # sums of products in another order: 2e-7 was measured
    operators = {name: (axis.name, length, operators) for name, (axis, length, operators) in run.seen.items()}
    assert operators["decoder/mid/blocks/0/spatial"] == ("frames", 3, ("conv_in", "block"))
    assert operators["decoder/mid/blocks/1/spatial"] == ("frames", 3, ("attention", "block"))
    assert operators["decoder/up/1/blocks/0/spatial"] == ("frames", 3, ("resample", "block"))
    assert operators["decoder/up/1/blocks/2/temporal/conv1"] == ("rows", 10, ("conv1",))
    assert operators["decoder/up/1/blocks/2/temporal/conv2"] == ("rows", 10, ("conv2", "blend"))
    assert operators["decoder/conv_out"] == ("frames", 3, ("norm_out", "conv_out"))
    assert operators["decoder/time_conv_out"] == ("rows", 10, ("time_conv_out",))
    assert len(operators) == 3 * 8 + 2


def test_has_the_weights_of_the_published_network(diffusers, fits):
    import torch

    shapes = shapes_of({})
    assert trees.count(shapes) == 97_742_847
    with torch.device("meta"):
        theirs = their_vae(diffusers)
    table = svd.vae(levels=4)
    fits(table, theirs, shapes)
    assert epsilons(lambda rngs: AutoencoderKLTemporalDecoder(rngs=rngs), table) == their_epsilons(theirs)


@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (1, 3, 5, 7, 3)])
def test_other_latents_are_refused(shape):
    message = f"found latents of shape {shape}, expected (videos, frames, h, w, 4)"
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(method("decode"), shapes_of(TINY), jnp.zeros(shape))
