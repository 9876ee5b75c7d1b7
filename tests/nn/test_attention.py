"""Attention against JAX's own, whole and in blocks of queries, with values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn import attention, stack

LENGTH, KEYS, HEADS = 12, 10, 2


def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, n, HEADS, 5)) for key, n in zip(keys, (LENGTH, KEYS, KEYS), strict=False))
    bias = jax.random.normal(keys[3], (1, HEADS, LENGTH, KEYS))
    mask = jax.random.bernoulli(keys[4], 0.7, (2, 1, 1, KEYS)).at[1].set(False)  # of the second image nothing
    return q, k, v, bias, mask


def value_and_gradients(f, *args):
    return jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), argnums=(0, 1, 2)))(*args)


def assert_close(found, expected):
    # sums of ten numbers in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


@pytest.mark.fast
@pytest.mark.parametrize("scores", [2**21, 2 * HEADS * KEYS * 5])  # the latter: blocks of four queries
@pytest.mark.parametrize("biased", [True, False])
def test_equals_that_of_jax(monkeypatch, scores, biased):
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", scores)
    q, k, v, bias, mask = inputs()
    bias, mask = (bias, mask) if biased else (None, None)
    found = value_and_gradients(lambda q, k, v: attention.attend(q, k, v, bias, mask), q, k, v)
    expected = value_and_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias, mask), q, k, v)
    assert_close(found, expected)


@pytest.mark.parametrize("biased", [True, False])
def test_a_prime_number_of_queries_is_cut_too(monkeypatch, biased):
    """13 queries in blocks of five, five and three, not in 13."""
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", 2 * HEADS * KEYS * 5)
    q, k, v, bias, mask = inputs()
    q, bias = (jnp.concatenate([x, x[:, :1] if axis == 1 else x[:, :, :1]], axis) for x, axis in ((q, 1), (bias, 2)))
    bias, mask = (bias, mask) if biased else (None, None)
    run = lambda q, k, v: attention.attend(q, k, v, bias, mask)  # noqa: E731
    expected = value_and_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias, mask), q, k, v)
    assert_close(value_and_gradients(run, q, k, v), expected)
    assert f"f32[2,{HEADS},5,{KEYS}]" in str(jax.make_jaxpr(run)(q, k, v))


def test_devices_of_a_mesh_hold_their_part(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", 2 * HEADS * LENGTH * KEYS // 4)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()[:3]]
    trace = lambda: str(jax.make_jaxpr(lambda *args: attention.attend(*args))(*shapes))  # noqa: E731
    assert "scan" in trace()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("data",))):
        assert "scan" not in trace()


def test_causal():
    q, k, v, *_ = inputs()
    found = value_and_gradients(lambda *args: attention.attend(*args, causal=True), q[:, :KEYS], k, v)
    expected = value_and_gradients(lambda *args: jax.nn.dot_product_attention(*args, is_causal=True), q[:, :KEYS], k, v)
    assert_close(found, expected)


def test_blocks_hold_fewer_scores_and_are_one_where_operations_are_counted(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", 2 * HEADS * KEYS * 5)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()[:3]]
    trace = lambda: str(jax.make_jaxpr(lambda *args: attention.attend(*args))(*shapes))  # noqa: E731
    whole = f"f32[2,{HEADS},{LENGTH},{KEYS}]"
    assert whole not in trace() and f"f32[2,{HEADS},4,{KEYS}]" in trace()
    with stack.unrolled():
        assert whole in trace() and "scan" not in trace()


def test_blocks_are_those_of_the_device_that_a_program_is_compiled_for(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES_CPU", 2 * HEADS * KEYS * 5)
    q, k, v, _, _ = inputs()

    def loops():
        return str(jax.make_jaxpr(lambda q, k, v: attention.attend(q, k, v))(q, k, v)).count("scan[")

    with attention.traced_for("tpu"):
        assert loops() == 0
    assert loops() == 1
