"""pair(): what it keeps, in every program and on any number of devices, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from diffjax.assign import costs, exact, fields, pair

KEY = jax.random.key(0)
SMALL = jnp.asarray(fields.images(32, size=8))
GROUP = jnp.arange(32, dtype=jnp.int32) % 3


def run(method, x=SMALL, key=KEY, **options):
    return jax.jit(functools.partial(pair.pair, method=method, **options))(key, x)


@pytest.mark.fast
@pytest.mark.parametrize("method", pair.METHODS)
def test_noise_is_what_was_drawn_in_another_order(method):
    """Row i of the noise is row perm[i] of the draw, made of (key, row) alone; `none` leaves all in place."""
    noise, perm, found = run(method)
    row = jax.jit(lambda i: jax.random.normal(jax.random.fold_in(KEY, i), SMALL.shape[1:]))
    drawn = np.stack([row(i) for i in range(32)])
    assert noise.dtype == jnp.float32 and perm.dtype == jnp.int32 and found["assign_nonfinite"] == 0
    if method.startswith("knn"):
        np.testing.assert_array_equal(perm, np.arange(32))
        assert found["assign_dot"] > 0.01
        return
    np.testing.assert_array_equal(np.sort(perm), np.arange(32))
    np.testing.assert_array_equal(noise, drawn[perm])
    before = np.linalg.norm((SMALL - drawn).reshape(32, -1), axis=1).mean()
    after = np.linalg.norm((SMALL - noise).reshape(32, -1), axis=1).mean()
    assert float(found["assign_distance"]) == pytest.approx(after, rel=1e-5)  # float32 sums
    assert float(found["assign_reduction"]) == pytest.approx(100 * (1 - after / before), abs=1e-3)
    if method == "none":
        np.testing.assert_array_equal(noise, drawn)
    else:
        assert found["assign_reduction"] > 1


def test_linear_is_the_exact_plan():
    noise, perm, _ = run("linear")
    drawn = np.asarray(run("none")[0])
    np.testing.assert_array_equal(perm, exact.solve(costs.cost_matrix(SMALL, jnp.asarray(drawn))))


@pytest.mark.parametrize(("num", "reduction"), [(128, 1.94), (256, 2.11), (512, 2.28), (1024, 2.36)])
def test_reduction_without_data(num, reduction):
    """Spec check 4, as measured there on such fields, within 0.15."""
    found = run("linear", jnp.asarray(fields.images(num)))[2]
    assert float(found["assign_reduction"]) == pytest.approx(reduction, abs=0.15)


def test_marginals_stay_normal():
    """Spec check 3, nine batches of 1,024: variance, a thinned sample, and the images' first component."""
    x = jnp.asarray(fields.images(9 * 1024, size=8)).reshape(9, 1024, 8, 8, 3)
    batches = jax.jit(lambda *both: jax.lax.map(lambda this: pair.pair(*this, "linear")[0], both))
    noise = np.asarray(batches(jax.random.split(KEY, 9), x))
    assert np.var(noise) == pytest.approx(1, abs=4 * np.sqrt(2 / noise.size))  # four standard errors
    flat = noise.reshape(9 * 1024, -1)
    assert stats.kstest(flat.ravel()[::97], "norm").pvalue > 0.01
    images = np.asarray(x).reshape(len(flat), -1)
    component = np.linalg.svd(images - images.mean(0), full_matrices=False)[2][0]
    assert stats.kstest(flat @ component, "norm").pvalue > 0.01
    assert np.corrcoef(flat @ component, images @ component)[0, 1] > 0.5  # yet it knows its image


def test_terminal_variance():
    """Along the first component: alpha^2 var + 2 alpha sigma cov + sigma^2, by NumPy; 1 + small for independent noise."""
    x = jnp.asarray(fields.images(512, size=8))
    noise, _, _ = run("linear", x)
    found = float(costs.terminal_variance(x, noise, 1.0, 80.0))
    images = np.asarray(x).reshape(512, -1)
    component = np.linalg.svd(images - images.mean(0), full_matrices=False)[2][0]
    expected = np.var((images + 80 * np.asarray(noise).reshape(512, -1)) @ component) / 80**2
    assert found == pytest.approx(expected, rel=1e-3)  # power iteration, 16 steps
    assert found > float(costs.terminal_variance(x, run("none", x)[0], 1.0, 80.0)) + 0.05


# In every program ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "auction", "knn"])
def test_the_same_bits_eager_jitted_scanned_and_mapped(method):
    x = jnp.stack([SMALL, SMALL[::-1] * 0.5])
    keys = jax.random.split(KEY, 2)
    each = [run(method, a, key)[0] for a, key in zip(x, keys, strict=True)]
    eager, perm, _ = pair.pair(keys[0], x[0], method)
    np.testing.assert_array_equal(perm, run(method, x[0], keys[0])[1])
    np.testing.assert_allclose(eager, each[0], rtol=1e-6, atol=1e-6)  # optimised code rounds the draws otherwise
    body = lambda carry, this: (carry, pair.pair(*this, method)[0])  # noqa: E731
    np.testing.assert_array_equal(jax.jit(lambda: jax.lax.scan(body, 0, (keys, x))[1])(), np.stack(each))
    mapped = jax.jit(jax.vmap(lambda key, x: pair.pair(key, x, method)[0]))(keys, x)
    np.testing.assert_array_equal(mapped, np.stack(each))


@pytest.mark.parametrize("method", ["linear", "auction", "knn"])
def test_no_gradient_passes(method):
    """Of E |w x - n_s|^2 in w and in x: as if the noise were given."""

    def loss(w, x, noise=None):
        noise = pair.pair(KEY, w * x, method)[0] if noise is None else noise
        return jnp.mean((w * x - noise) ** 2)

    noise = pair.pair(KEY, 0.7 * SMALL, method)[0]
    for found, expected in zip(
        jax.jit(jax.grad(loss, (0, 1)))(0.7, SMALL), jax.grad(loss, (0, 1))(0.7, SMALL, noise), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)  # float32


def test_images_that_are_not_finite_are_counted_and_disturb_nobody():
    bad = SMALL.at[3, 0, 0, 0].set(jnp.nan).at[9].set(jnp.inf)
    for method in ("linear", "auction", "knn"):
        noise, perm, found = run(method, bad)
        assert found["assign_nonfinite"] == 2 and np.isfinite(noise).all()
        assert all(np.isfinite(value) for value in found.values())
        kept = run(method, SMALL.at[3].set(0).at[9].set(0))
        np.testing.assert_array_equal(noise, kept[0])
    assert pair.pair(KEY, SMALL.astype(jnp.bfloat16), "linear")[0].dtype == jnp.float32


# On several devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "auction", "knn"])
@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_shard_map_over_the_global_batch_is_one_device(method, num):
    """One solve over all shards, by collectives; with and without groups."""
    mesh = Mesh(np.array(jax.devices()[:num]), ("batch",))
    spec = PartitionSpec("batch")
    for group in (None, GROUP) if method != "knn" else (None,):
        inside = functools.partial(pair.pair, method=method, axis_name="batch")
        program = jax.shard_map(
            lambda x, group: inside(KEY, x, group=group)[:2],  # noqa: B023
            mesh=mesh, in_specs=(spec, None if group is None else spec), out_specs=spec, check_vma=False,
        )  # fmt: skip
        noise, perm = jax.jit(program)(SMALL, group)
        one = run(method, group=group)
        np.testing.assert_array_equal(perm, one[1])
        np.testing.assert_array_equal(noise, one[0])


def test_local_scope_stays_within_a_shard():
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    spec = PartitionSpec("batch")
    inside = functools.partial(pair.pair, KEY, method="linear", axis_name="batch", scope="local")
    program = jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=(spec, spec, PartitionSpec()), check_vma=False)
    noise, perm, found = jax.jit(program)(SMALL)
    np.testing.assert_array_equal(np.asarray(perm) // 8, np.arange(32) // 8)
    np.testing.assert_array_equal(noise, run("none")[0][perm])  # no two shards drew the same noise
    assert 0 < found["assign_reduction"] < run("linear")[2]["assign_reduction"]


@pytest.mark.parametrize("method", ["linear", "auction"])
def test_a_sharded_batch_under_jit_is_assigned_globally(method):
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    x = jax.device_put(SMALL, NamedSharding(mesh, PartitionSpec("batch")))
    np.testing.assert_array_equal(run(method, x)[0], run(method)[0])


# Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hungarian"}, "the assignment must be one of .*found 'hungarian'"),
        ({"cost": "cosine"}, "the cost must be one of .*found 'cosine'"),
        ({"method": "knn", "k": 0}, "at least 1, found 0"),
        ({"method": "knn", "cost": "l1"}, "found cost='l1' with method 'knn', which has its own"),
        ({"method": "knn", "group": GROUP}, "only 'linear' and 'auction' keep noise within groups"),
        ({"scope": "host"}, "the scope must be one of .*found 'host'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        pair.pair(KEY, SMALL, **options)
