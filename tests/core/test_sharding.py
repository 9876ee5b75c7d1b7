"""Rules by path, and weights that are put together where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.core import sharding
from diffjax.runtime import mesh, xla

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks/attention/qkv/kernel", (28, 64, 192), P(None, "fsdp", "tensor")),
        ("method/opt_state/0/mu/blocks/attention/qkv/kernel", (28, 64, 192), P(None, "fsdp", "tensor")),
        ("ema_params/blocks/attention/out/kernel", (28, 64, 64), P(None, "tensor", "fsdp")),
        ("blocks/cross_attention/kv/kernel", (64, 128), P("fsdp", "tensor")),
        ("blocks/mlp/expand/kernel", (64, 256), P("fsdp", "tensor")),
        ("blocks/mlp/contract/kernel", (256, 64), P("tensor", "fsdp")),
        ("blocks/mlp/contract/kernel", (255, 64), P(None, "fsdp")),  # 255 has no two parts
        ("conv_in/kernel", (3, 3, 3, 32), P(None, None, None, "fsdp")),
        ("enc/conv0/kernel", (3, 3, 64, 256), P(None, None, "fsdp", None)),
        ("classes/embedding", (1000, 64), P(None, "fsdp")),
        ("conv_out/kernel", (3, 3, 6, 3), P(None, None, None, None)),
        ("blocks/attention/qkv/bias", (28, 192), P()),
        ("step", (), P()),
    ],
)
def test_rules(path, shape, spec):
    assert sharding.spec(path, shape, SIZES) == spec
    assert sharding.spec(path, shape, {"data": 16}) in (P(), P(*[None] * len(shape)))


def test_without_a_mesh_nothing_happens():
    kernel = jnp.ones((8, 8))
    assert sharding.sizes() == {}
    tree = {"x": kernel}
    assert sharding.spread(tree) is tree and sharding.everywhere(tree) is tree
    traced = jax.make_jaxpr(lambda x: sharding.weight(x, jnp.float32))(kernel)
    assert "sharding_constraint" not in str(traced)


def test_a_weight_is_gathered_and_its_gradient_left_in_parts():
    """In the smaller type one way, added up in the larger the other way, and values as without a mesh."""
    devices = mesh.make_mesh(layout="data:2,fsdp:4")
    kernel, x = jnp.arange(64.0).reshape(16, 4) / 64, jnp.arange(128.0).reshape(8, 16) / 128

    def loss(kernel, x):
        return jnp.sum((x.astype(jnp.bfloat16) @ sharding.weight(kernel, jnp.bfloat16)).astype(jnp.float32) ** 2)

    expected = jax.grad(loss)(kernel, x)
    where = mesh.shardings({"kernel": kernel}, devices)["kernel"]
    assert where.spec == P("fsdp", None)
    placed = jax.device_put(kernel, where), jax.device_put(x, mesh.batch_sharding(devices))
    with jax.set_mesh(devices):
        program = jax.jit(jax.grad(loss), out_shardings=where).lower(*placed).compile()
    found = program(*placed)
    assert found.addressable_shards[0].data.shape == (4, 4) and found.dtype == jnp.float32
    # products of bfloat16 on parts of the batch: each part's is rounded to 8 bits
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)
    assert "all-gather" in {one.kind for one in xla.collectives(program.as_text())}


@pytest.mark.parametrize(("heads", "axis"), [(4, 2), (3, 1)])
def test_attention_is_split_by_heads_or_along_the_sequence(heads, axis):
    devices = mesh.make_mesh(layout="data:4,tensor:2")
    q = jnp.zeros((4, 6, heads, 8))
    with jax.set_mesh(devices):
        found = jax.jit(lambda q: sharding.split_heads_or_queries(q, q, q))(q)
    sizes = [found[0].addressable_shards[0].data.shape[i] * 2 == q.shape[i] for i in (1, 2)]
    assert sizes == [axis == 1, axis == 2]
