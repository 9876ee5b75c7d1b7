"""Predicted and compiled peaks: they fall with the number of slices, and a budget is kept or refused."""

import functools
import re

import blocks
import jax
import jax.numpy as jnp
import pytest

from diffjax.models.svd import SVDUNet
from diffjax.models.vae_video import AutoencoderKLTemporalDecoder
from diffjax.nn.functional import abstract, functionalize
from diffjax.nn.groups import FRAMES, PLAIN
from diffjax.video import memory, slicer, steps
from diffjax.video.grouping import Plan

SIZES = 8, 64, 64  # frames, height, width of the small network
Shape = jax.ShapeDtypeStruct


@functools.cache
def traced():
    return steps.trace(blocks.network, *blocks.shapes(*SIZES))


def test_a_prediction_by_hand():
    x = Shape((6, 32, 32, 8), jnp.float32)
    size = 6 * 32 * 32 * 8 * 4

    def network(x, run=PLAIN):
        wide = lambda x: (jnp.repeat(x, 4, axis=-1).reshape(-1, 32) @ jnp.ones((32, 8))).reshape(x.shape)  # noqa: E731
        return run("wide", FRAMES, {"wide": wide}, x) + x

    found = memory.peak(steps.trace(network, x), Plan())
    assert found.groups == ("wide",)
    # the argument, x four times over, and the product
    assert found.bytes == pytest.approx(size + 4 * size + size, rel=0.01)
    sliced = memory.peak(steps.trace(network, x), Plan(frames=6)).bytes
    # the argument, all products, and for a sixth of the frames x, x four times over and the product
    assert sliced == pytest.approx(size + size + (1 + 4 + 1) / 6 * size, rel=0.01)


@pytest.mark.fast
def test_predictions_fall_with_the_number_of_slices():
    peaks = [memory.peak(traced(), Plan(count, count)).bytes for count in (1, 2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True) and peaks[3] < 0.6 * peaks[0]
    # tokens are cut within the frames of a slice
    assert memory.peak(traced(), Plan(8, 8, 8)).bytes <= peaks[3]


def test_a_budget_is_kept_with_divisors_or_refused_with_the_floor():
    whole, finest = (memory.peak(traced(), Plan(count, count, count)).bytes for count in (1, 64))
    assert memory.fit(traced(), whole) == Plan()
    budget = (whole + 2 * finest) / 3
    plan = memory.fit(traced(), budget)
    assert finest <= memory.peak(traced(), plan).bytes <= budget
    assert plan.groups and all(64 % count == 0 for count in plan.groups.values())
    with pytest.raises(ValueError, match="the finest slices need.*weights and inputs.*fewer frames"):
        memory.fit(traced(), finest / 2)


def test_a_prime_number_of_parts_is_cut_with_a_rest_or_to_the_last():
    primes = steps.trace(blocks.network, *blocks.shapes(7, 31, 256))
    finest = memory.peak(primes, Plan(7, 31, 31)).bytes
    plan = memory.fit(primes, 1.001 * finest)
    assert {plan.groups[name] for name in ("down/0/spatial", "up")} == {7}
    assert memory.fit(primes, 0.99 * memory.peak(primes, Plan()).bytes).groups["down/0/spatial"] == 7


def work_of(name, run):
    """Bytes that the compiler needs for a group of level 0 beside its arguments, 28 frames of 16 x 16."""
    x, wide = Shape((28, 16, 16, 32), jnp.float32), Shape((32, 256), jnp.float32)

    def mlp(x, wide):
        def operator(x):
            h = jax.nn.gelu(x.reshape(-1, 32) @ wide)
            return x + (h @ wide.T).reshape(x.shape)

        return run("mlp", FRAMES, {"mlp": operator}, x)

    return memory.compile_for(mlp, x, wide, donate=(0,))


def test_compiled_memory_of_a_group_falls_and_its_slices_are_written_in_place():
    found = {count: work_of("mlp", slicer.Sliced(Plan(frames=count))) for count in (1, 2, 4, 7, 14)}
    works = [each.work for each in found.values()]
    assert works == sorted(works, reverse=True)
    for count, each in found.items():
        # 0.2 for what does not shrink: indices, a slice of x
        assert each.work <= 1.2 / count * works[0]
        assert each.aliases == 28 * 16 * 16 * 32 * 4


@functools.cache
def compiled_unet(count):
    """A tiny U-Net of SVD on 8 frames of 48 x 48, all groups in `count` slices."""
    options = dict(width=32, channel_mult=(1,), num_blocks=1, transformer_depth=(1,), heads=(1,), context_width=8)
    make = lambda rngs: SVDUNet(**options, rngs=rngs)  # noqa: E731
    network, run = functionalize(make)[0], slicer.Sliced(Plan(count, count, count))
    cond = {"image": Shape((1, 1, 8), jnp.float32), "image_latents": Shape((1, 48, 48, 4), jnp.float32)}
    cond["control"] = Shape((1, 3), jnp.float32)
    shapes = abstract(make), Shape((1, 8, 48, 48, 4), jnp.float32), Shape((1,), jnp.float32), cond
    return memory.compile_for(lambda *arrays: network(*arrays, run=run), *shapes)


def test_a_whole_unet_in_four_slices_needs_seven_tenths():
    assert compiled_unet(4).peak <= 0.7 * compiled_unet(1).peak


def test_no_program_holds_the_scores_of_all_pairs_of_tokens():
    """As arrays: what is inside of a fusion is never in memory."""
    inside, found = False, []
    for line in compiled_unet(4).text.splitlines():
        if line.endswith("{"):
            inside = "fused" in line.split("(")[0]
        if not inside:
            found += [shape for shape in re.findall(r"f32\[([\d,]+)\]", line) if shape.split(",").count("2304") > 1]
    assert not found


def test_decoding_in_slices_needs_six_tenths():
    options = dict(width=32, channel_mult=(1, 2), num_blocks=1)
    make = lambda rngs: AutoencoderKLTemporalDecoder(**options, rngs=rngs)  # noqa: E731
    decode = functionalize(make, "decode")[0]
    shapes = abstract(make), Shape((1, 14, 64, 128, 4), jnp.float32)
    whole, sliced = (
        memory.compile_for(lambda *arrays, run=run: decode(*arrays, run=run), *shapes).peak
        for run in (PLAIN, slicer.Sliced(Plan(frames=14, rows=8)))
    )
    assert sliced <= 0.6 * whole
