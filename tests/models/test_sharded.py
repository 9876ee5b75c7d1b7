"""Five latent networks on eight devices give what they give on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffjax.models import dit, mdt, mmdit, pixart, unet
from diffjax.nn.functional import functionalize

METADATA = {"high": ("flip",), "low": ("height",)}
NETWORKS = {
    "dit": (dit.DiT, dict(width=32, depth=2, heads=2)),
    "mdt": (mdt.MDT, dict(width=32, depth=3, decoder_depth=1, heads=2)),
    "pixart": (pixart.PixArt, dict(width=48, depth=2, heads=2)),
    "mmdit": (mmdit.MMDiT, dict(width=32, depth=2, heads=2)),
    "unet": (unet.UNet, dict(width=32, channel_mult=(1,), transformer_depth=(1,), heads=2, context_width=16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_devices(name):
    """The batch split, and each weight cut along an axis that divides: fully sharded data parallelism."""
    make, options = NETWORKS[name]
    apply, init = functionalize(
        lambda rngs: make(8, 4, out_channels=4, num_classes=3, metadata=METADATA, **options, rngs=rngs)
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), jax.eval_shape(init, jax.random.key(0))
    )
    x, t = np.float32(random.standard_normal((8, 8, 8, 4))), np.linspace(10, 900, 8, dtype=np.float32)
    cond = {"label": np.arange(8) % 3, "flip": np.float32(np.arange(8) % 2), "height": np.full(8, 90, np.float32)}
    cond |= {"u": t / 999}
    expected = jax.jit(apply)(params, x, t, cond)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def cut(leaf):
        fits = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0]
        axes = ["fsdp" if fits and axis == fits[-1] else None for axis in range(leaf.ndim)]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    split = jax.device_put((x, t, cond), NamedSharding(mesh, PartitionSpec("fsdp")))
    found = jax.jit(apply)(jax.tree.map(cut, params), *split)
    # float32, sums over parts in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, float(jnp.abs(expected).max())))
