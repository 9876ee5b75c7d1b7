"""Blocks that are computed again: the same network, values and gradients, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core import trees
from diffjax.models.edm_unet import DhariwalUNet, SongUNet
from diffjax.models.toy import ResidualMLP
from diffjax.nn import stack
from diffjax.nn.functional import functionalize

# small, since compiling a U-Net's gradient takes seconds; ADM's attention has heads of 64 channels
UNET = dict(image_size=4, in_channels=1, out_channels=1, channel_mult=(1,), num_blocks=1, attention_sizes=(), dropout=0.3)
# the compiler for CPUs undoes what it is told by these passes, those for accelerators do not
KEPT = {"xla_disable_hlo_passes": "cse,cse_barrier_expander"}
NETWORKS = {
    "mlp": lambda rngs, **options: ResidualMLP((4, 4, 1), 32, 4, dropout=0.3, rngs=rngs, **options),
    "song": lambda rngs, **options: SongUNet(**UNET, channels=8, rngs=rngs, **options),
    "adm": lambda rngs, **options: DhariwalUNet(**UNET, channels=64, rngs=rngs, **options),
}


def make(name, **options):
    return functionalize(lambda rngs: NETWORKS[name](rngs, **options))


def inputs(name, batch):
    """Weights that are nowhere zero, and the arguments of a call with dropout."""
    params = jax.eval_shape(make(name)[1], jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda a: 0.2 * jax.random.normal(next(keys), a.shape), params)
    return params, jax.random.normal(jax.random.key(1), (batch, 4, 4, 1)), jnp.linspace(-1, 1, batch)


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def gradient(network):
    """Of parameters and image: the latent's gradient is what the E-step of EMD needs."""

    def loss(params, x, noise_label):
        return jnp.mean(jnp.square(network(params, x, noise_label, {}, jax.random.key(7))))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize(("name", "policy"), [*(("mlp", policy) for policy in stack.POLICIES), ("song", "nothing")])
def test_the_same_parameters_values_and_gradients(name, policy):
    (plain, init), (network, again) = make(name), make(name, remat=policy)
    assert trees.compare(*(jax.eval_shape(f, jax.random.key(0)) for f in (init, again))) == []
    given = inputs(name, 2)
    (expected, (by_params, by_image)), (found, grads) = (
        gradient(f).lower(*given).compile()(*given) for f in (plain, network)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for want, have in zip(jax.tree.leaves((by_params, by_image)), jax.tree.leaves(grads), strict=True):
        # sums in another order, float32
        np.testing.assert_allclose(have, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["mlp", "song"])
def test_a_gradient_needs_less_memory(name):
    """By the compiler's own account."""
    given = abstract(inputs(name, 512))

    def memory(policy):
        step = gradient(make(name, remat=policy)[0]).lower(*given)
        return step.compile(compiler_options=KEPT).memory_analysis().temp_size_in_bytes

    assert memory("nothing") < 0.6 * memory("")


@pytest.mark.parametrize("name", [*NETWORKS])
def test_what_is_kept_for_a_gradient(name):
    """Bytes from the forward to the backward pass, beside the parameters: every policy keeps less, in this order."""
    params, *rest = abstract(inputs(name, 64))

    def kept(policy):
        network, _ = make(name, remat=policy)
        pull = jax.eval_shape(lambda p, *args: jax.vjp(network, p, *args, {}, jax.random.key(7))[1], params, *rest)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull) if leaf.ndim)

    nothing, no_batch, dots, everything = (kept(policy) for policy in ("nothing", "dots_no_batch", "dots", ""))
    assert nothing < no_batch <= dots < everything and nothing < 0.5 * everything


@pytest.mark.fast
def test_off_is_the_block_itself_and_an_unknown_policy_is_refused():
    def block(x):
        return x

    assert stack.remat(block, "") is block
    for name in NETWORKS:
        with pytest.raises(ValueError, match="unknown model.remat 'dot'; did you mean 'dots'"):
            jax.eval_shape(make(name, remat="dot")[1], jax.random.key(0))
