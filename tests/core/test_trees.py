"""Trees by path: names, differences in words, interpolation, the first bad leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees


def _tree():
    return {
        "enc": {"conv0": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.zeros(4)}},
        "blocks": [{"scale": jnp.ones(2, jnp.bfloat16)}, {"scale": jnp.ones(2, jnp.bfloat16)}],
    }


PATHS = ["blocks/0/scale", "blocks/1/scale", "enc/conv0/bias", "enc/conv0/kernel"]


@pytest.mark.fast
def test_paths_are_in_the_order_of_leaves():
    assert trees.paths(_tree()) == PATHS
    leaves = jax.tree.leaves(_tree())
    assert [leaf.shape for leaf in trees.flatten(_tree()).values()] == [leaf.shape for leaf in leaves]


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trees.flatten({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_count_takes_abstract_trees():
    assert trees.count(_tree()) == trees.count(jax.eval_shape(_tree)) == 36 + 4 + 2 + 2


def test_equal_trees_have_no_differences():
    assert trees.compare(_tree(), _tree()) == []
    assert trees.compare(jax.eval_shape(_tree), _tree()) == []
    trees.check(_tree(), jax.eval_shape(_tree), "the checkpoint")


def test_every_difference_is_named_with_both_sides():
    found = _tree()
    del found["enc"]["conv0"]["bias"]
    found["enc"]["extra"] = jax.random.key(0)
    found["enc"]["conv0"]["kernel"] = jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)
    found["blocks"][1]["scale"] = np.ones(2, np.float32)
    found["blocks"][0]["scale"] = "text"
    assert trees.compare(_tree(), found) == [
        "different: blocks/0/scale, expected bfloat16[2], found 'text', which is no array",
        "different: blocks/1/scale, expected bfloat16[2], found float32[2]",
        "different: enc/conv0/kernel, expected float32[3,3,1,4], found float32[3,3,2,4]",
        "extra: enc/extra key<fry>[]",
        "missing: enc/conv0/bias float32[4]",
    ]
    with pytest.raises(ValueError) as error:
        trees.check(_tree(), found, "the checkpoint runs/a")
    lines = str(error.value).splitlines()
    assert lines[0] == "the checkpoint runs/a does not fit, 5 differences:"
    assert [line.strip() for line in lines[1:]] == trees.compare(_tree(), found)


def test_a_long_list_is_cut_and_counted():
    many = {f"layer{i:03d}": jnp.ones(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"50 differences:(\n  missing: .*){20}\n  and 30 more$"):
        trees.check(many, {}, "the weights")
    with pytest.raises(ValueError, match="does not fit, 1 difference:"):
        trees.check({"a": jnp.ones(1)}, {}, "the weights")


def test_lerp_hits_both_ends_and_keeps_types():
    a, b = _tree(), jax.tree.map(lambda leaf: 3 * leaf - 1, _tree())
    for t, expected in ((0.0, a), (1.0, b), (0.25, jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, a, b))):
        moved = trees.lerp(a, b, jnp.float32(t))
        assert trees.compare(a, moved) == []
        # small multiples of 1/4: exact in bfloat16 too
        jax.tree.map(np.testing.assert_array_equal, moved, expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("index", range(4))
def test_first_nonfinite_is_an_index_into_paths(bad, index):
    leaves, treedef = jax.tree.flatten(_tree())
    leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(bad)
    leaves[3] = leaves[3].at[0, 0, 0, 0].set(bad)  # a later one must not hide it
    found = jax.jit(trees.first_nonfinite)(jax.tree.unflatten(treedef, leaves))
    assert int(found) == index and found.dtype == jnp.int32 and found.shape == ()


def test_first_nonfinite_of_finite_trees_is_minus_one():
    assert int(trees.first_nonfinite(_tree())) == -1
    assert int(trees.first_nonfinite({"count": jnp.int32(3)})) == -1
    assert int(trees.first_nonfinite({})) == -1


def test_nest_is_the_inverse_of_flatten():
    tree = {"a": {"b": {"kernel": 1, "bias": 2}, "c": 3}, "d": 4}
    assert trees.nest(trees.flatten(tree)) == tree
    assert trees.nest({}) == {}
