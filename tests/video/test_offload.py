"""Skips and weights that wait in the host's memory: the same bits, fewer bytes predicted for the device."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn.groups import FRAMES, PLAIN
from diffjax.video import grouping, memory, offload, steps
from diffjax.video.grouping import Plan
from diffjax.video.slicer import Sliced

FRAMES_OF, SIDE, CHANNELS, LEVELS = 5, 6, 8, 3
X = FRAMES_OF * SIDE**2 * CHANNELS * 4  # bytes of a state
DOWN, UP = CHANNELS**2 * 4, 2 * CHANNELS**2 * 4  # and of matrices


def network(weights, x, run=PLAIN):
    """What each step down leaves is joined on the way up."""
    weights, skips = offload.on_device(weights), []
    for index, matrix in enumerate(weights["down"]):
        x = run(f"down/{index}", FRAMES, {"mix": lambda x, matrix=matrix: jnp.tanh(x @ matrix)}, x)
        x, skip = run.stow(x)
        skips.append(skip)
    for index, matrix in enumerate(weights["up"]):
        operators = {
            "join": lambda x, skip: jnp.concatenate([x, skip], axis=-1),
            "mix": lambda x, skip, matrix=matrix: jnp.tanh(x @ matrix),
        }
        x = run(f"up/{index}", FRAMES, operators, x, skips.pop())
    return x


def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 2 * LEVELS + 1))
    down = [jax.random.normal(next(keys), (CHANNELS, CHANNELS)) for _ in range(LEVELS)]
    up = [jax.random.normal(next(keys), (2 * CHANNELS, CHANNELS)) for _ in range(LEVELS)]
    return {"down": down, "up": up}, jax.random.normal(next(keys), (FRAMES_OF, SIDE, SIDE, CHANNELS))


@pytest.mark.fast
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_waits_comes_back_as_it_was(count):
    weights, x = arrays()
    expected = jax.jit(lambda *arrays: network(*arrays, run=Sliced(Plan(count))))(weights, x)
    run = Sliced(Plan(count, offload=("skips", "weights")))
    waiting, program = offload.to_host(weights), jax.jit(lambda *arrays: network(*arrays, run=run))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(waiting)} == {"pinned_host"}
    found = program(waiting, x)
    # the same bits, but for whole groups: they are fused with what is around them, and rounded elsewhere
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 if count == 1 else 0)
    # arrays of the shape of a skip in the host's memory
    shape = f"<host>[{FRAMES_OF},{SIDE},{SIDE},{CHANNELS}]"
    assert shape in str(jax.make_jaxpr(program)(waiting, x))
    assert shape not in str(jax.make_jaxpr(lambda *arrays: network(*arrays, run=Sliced(Plan(count))))(weights, x))


def predicted(what, count, halves=False):
    both = lambda weights, x, run: jax.lax.map(lambda x: network(weights, x, run), x)  # noqa: E731
    weights, x = arrays()
    given = (both, weights, jnp.stack([x, x])) if halves else (network, weights, x)
    return memory.peak(steps.trace(*given, offload=what), Plan(count)).bytes


def test_predictions_by_hand():
    weights = LEVELS * (DOWN + UP)
    # x, two skips, and all of the third with what is joined and its product, which is the first of the way up
    assert predicted((), 1) == weights + X + 3 * X + 2 * X + X
    # x, and the state beside a whole skip, what is joined and the product
    assert predicted(("skips",), 1) == weights + X + 2 * X + 2 * X + X
    assert predicted(("skips", "weights"), 1) == predicted(("skips",), 1) - weights + UP


def test_predictions_fall_in_slices_and_in_loops():
    weights = LEVELS * (DOWN + UP)
    for halves in (False, True):
        found = [predicted(what, 5, halves) for what in ((), ("weights",), ("skips",), ("skips", "weights"))]
        assert found[0] - found[1] == found[2] - found[3] == weights - UP
        # the last skip is read as it is made: two are spared, and the part of it that is brought is counted anyway
        assert found[0] - found[2] == 2 * X


def test_fit_counts_what_waits_and_says_what_would():
    weights, x = arrays()
    traced = steps.trace(network, weights, x, offload=("skips",))
    assert memory.fit(traced, predicted(("skips",), 1)) == Plan(offload=("skips",))
    with pytest.raises(ValueError, match=r"or weights in the host's memory \(offload\)"):
        memory.fit(traced, 1000)


def test_a_skip_that_waits_has_no_gradient():
    weights, x = arrays()
    with pytest.raises(ValueError, match="no gradient: leave 'skips' out"):
        jax.grad(lambda x: jnp.sum(network(weights, x, run=Sliced(Plan(offload=("skips",))))))(x)


def test_backends_without_such_memory_are_refused():
    device = SimpleNamespace(platform="metal", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(ValueError, match=r"'metal' has the memories \['device'\].*leave offload=skips out"):
        offload.check(("skips",), device)
    offload.check((), device)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"offload": ["skip"]}', "unknown 'skip' to offload; did you mean 'skips'"), ('{"offload": "skips"}', "a list")],
)
def test_plans(text, message):
    plan = Plan(2, offload=("skips", "weights"))
    assert grouping.loads(plan.dumps()) == plan
    with pytest.raises(ValueError, match=message):
        grouping.loads(text)
