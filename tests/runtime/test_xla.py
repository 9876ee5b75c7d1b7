"""Compiler flags: set once, before JAX, and never against the user; what compiled programs move between devices."""

import os
import subprocess
import sys

import pytest

from diffjax.runtime import xla

CODE = """
import os, sys
{before}
from diffjax.runtime import xla
xla.set_flags()
import jax
jax.numpy.ones(3).block_until_ready()  # an unknown flag would end the process here
print(os.environ.get("XLA_FLAGS", ""))
"""
OWN = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


def moved(program):
    """Kind -> (how often it runs, bytes of all its results)."""
    found = {}
    for one in xla.collectives(program):
        number, total = found.get(one.kind, (0, 0))
        found[one.kind] = number + one.turns, total + one.num_bytes
    return found


@pytest.mark.fast
@pytest.mark.parametrize(
    ("before", "flags", "expected"),
    [
        ("", "", "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"),
        ("", OWN, OWN),
        ("import jax", "", ""),
    ],
    ids=["default", "the user's", "too late"],
)
def test_flags(before, flags, expected):
    import jaxlib

    if expected and flags == "" and tuple(map(int, jaxlib.__version__.split(".")[:2])) >= (0, 12):
        expected = ""  # that XLA is as fast without
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", CODE.format(before=before)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_collectives_of_a_program():
    """Counted by hand: eight devices, float32, a loop of five turns around two of them."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def body(x, _):
        summed = jax.lax.psum(x, "data")
        return x + jax.lax.ppermute(summed, "data", [(i, (i + 1) % 8) for i in range(8)]), None

    def program(x):
        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.psum_scatter(x, "data", tiled=True) + jax.lax.all_gather(x, "data", tiled=True).sum()

    spec = PartitionSpec("data")
    sharded = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(sharded).lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
    own = 8 * 16 * 4  # bytes of a device's part
    assert moved(compiled.as_text()) == {
        "all-gather": (1, 8 * own), "all-reduce": (5, 5 * own), "collective-permute": (5, 5 * own),
        "reduce-scatter": (1, own // 8),
    }  # fmt: skip


@pytest.mark.fast
def test_collectives_as_the_tpu_compiler_writes_them():
    """Started and waited for; loops whose turns are in their condition alone; tuples; nested calls."""
    text = """
%cond.1 (p: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(17)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body.1 (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %start = (bf16[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %done = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%start)
  ROOT %f = (s32[], bf16[8,128]) fusion(%done), kind=kCustom, calls=%inner
}

%inner (p: bf16[8,128]) -> f32[4] {
  ROOT %r = (f32[4]{0}, /*index=1*/pred[16]{0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (p: bf16[8,128]) -> bf16[64,128] {
  %w = (s32[], bf16[8,128]) while(%t), condition=%cond.1, body=%body.1, metadata={op_name="scan"}
  ROOT %g = bf16[64,128]{1,0} all-gather(%y), dimensions={0}
}
"""
    assert moved(text) == {
        "all-gather": (1, 64 * 128 * 2), "all-reduce": (17, 17 * (4 * 4 + 16)),
        "collective-permute": (17, 17 * 8 * 128 * 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match="a loop's condition says no number of turns"):
        moved(text.replace("constant(17)", "parameter(0)"))


@pytest.mark.fast
def test_of_branches_the_one_that_moves_most_counts():
    text = """
%small (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add
}

%large (p: f32[8]) -> f32[8] {
  ROOT %g = f32[64]{0} all-gather(%p), dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8] conditional(%i, %p, %p), CHOICES
}
"""
    for choices in ("branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"):
        assert moved(text.replace("CHOICES", choices)) == {"all-gather": (1, 64 * 4)}


@pytest.mark.fast
def test_what_the_tpu_compiler_fuses_counts_once():
    """As libtpu 0.0.52 writes it: an all-gather three times, around the products that run beside it; a reduce-scatter as a
    fusion of an all-reduce and a slice; a ring with two of its turns in one."""
    text = """
%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}
}

%done (p: bf16[8,16]) -> bf16[32,16] {
  %all-gather.2 = bf16[1,32,16]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.7 (input: f32[32,16]) -> f32[8,16] {
  %all-reduce.1 = f32[32,16]{1,0} all-reduce(%pad), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[8,16]{1,0} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={8,16}
}

%ring_cond (p: (f32[8], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %turn = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%turn, %limit), direction=LT
}

%ring_body (p: (f32[8], u32[])) -> (f32[8], u32[]) {
  %turn = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%turn, %two)
  %one = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %other = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (f32[8]{0}, u32[]{:T(128)}) tuple(%z, %next)
}

ENTRY %main (p: bf16[8,16]) -> f32[8,16] {
  %s = (bf16[8,16], bf16[32,16]) fusion(%p), kind=kCustom, calls=%start
  %d = bf16[32,16] fusion(%s), kind=kCustom, calls=%done
  %w = (f32[8]{0}, u32[]) while(%t), condition=%ring_cond, body=%ring_body
  ROOT %r = f32[8,16]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.7
}
"""
    assert moved(text) == {
        "all-gather": (1, 32 * 16 * 2), "collective-permute": (8, 8 * 8 * 4), "reduce-scatter": (1, 8 * 16 * 4),
    }  # fmt: skip
    found = {one.kind: one for one in xla.collectives(text)}
    assert found["all-gather"].devices == found["reduce-scatter"].devices == 4
    # a ring of four sends three of its four parts on; each of the three is a quarter
    assert found["all-gather"].sent == 3 / 4 * 32 * 16 * 2 and found["reduce-scatter"].sent == 3 * 8 * 16 * 4
    assert found["reduce-scatter"].arrays == ((8 * 16 * 4, (8, 16)),)
