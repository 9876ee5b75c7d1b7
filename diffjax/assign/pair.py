"""Immiscible diffusion (Li et al., NeurIPS 2024): noise for a batch of images, each near its image.

Noise is drawn as ever, one unit normal a row, and then dealt out: image i gets noise s(i), where the permutation s makes
the sum of costs small (`costs`). All that uses the noise afterwards, input and target alike, uses the noise returned.

    none       s is the identity
    linear     the best s, exactly (`exact`, scipy on the host)
    auction    a permutation within about 1 % of it, on the device (`approx`)
    sinkhorn   the same by entropic transport and rounding: a reference, slower
    knn        no permutation: the nearest of k noises drawn for each image (Li et al. 2025); its noise is a little short
    knn_dot    the same by x . n, which leaves the length alone

Any statistic of a permuted batch that does not look at the images is that of independent unit noise. What changes: noise
and image are dependent, so that E[n | x_t] is no score, and samplers that add noise (ancestral, SDE, eta > 0) are biased;
the deterministic ones are not. With labels, noise is dealt across classes unless `group` keeps it within them.

    noise, perm, stats = pair(key, x, "linear")                              # x (B, ...); under jit, scan, vmap, grad
    noise, perm, stats = pair(key, x, "linear", axis_name="batch")           # inside shard_map: over the global batch
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffjax.assign import approx, costs, exact
from diffjax.core import names, sharding
from diffjax.core.broadcast import per_sample, squared_norm
from diffjax.core.types import Array, Batch, Key

NOISE_KEY = "noise_key"  # what `host` adds to a batch
METHODS = ("none", "linear", "auction", "sinkhorn", "knn", "knn_dot")
SCOPES = ("global", "local")
ROUTES = ("device", "host")
PERMUTING = ("linear", "auction", "sinkhorn")
_EPS = 0.2  # smallest bid of the auction, temperature of Sinkhorn; in standard deviations of the costs, rounded


def pair(
    key: Key, x: Array, method: str = "linear", group: Array | None = None, cost: str = "dot", *, k: int = 8,
    axis_name: str | None = None, scope: str = "global",
) -> tuple[Array, Array, dict[str, Array]]:  # fmt: skip
    """(noise, perm, stats) for images x (B, ...): unit noise of their shape in float32; perm (B,) int32, the row whose
    noise each image has (its own for knn); stats as in `costs.statistics`, and assign_nonfinite, the number of
    images that are not finite: the assignment takes them for zeros.

    key: of these rows at this step; noise i is made of (key, i) alone. group (B,) int: only rows of the same group
    exchange noise. cost: see `costs`. k: candidates of knn. axis_name, inside `shard_map`: the axis that the batch is
    split over; scope "global" assigns over all of it in one solve, "local" within each shard; rows are numbered over
    the global batch either way. Raises ValueError for names that do not exist, and options that do not fit.
    """
    check(method, cost, group is not None, k, scope)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(x)
    x, finite = usable(x)
    rows = start + jnp.arange(len(x), dtype=jnp.int32)
    keys = row_keys(key, len(x), start)
    drawn = draw(keys, x.shape[1:])
    if method in ("knn", "knn_dot"):
        noise, perm = approx.nearest(keys, x, drawn, k, dot=method == "knn_dot"), rows
    elif method == "none":
        noise, perm = drawn, rows
    elif scope == "local" or shards == 1:
        perm = assign(x, drawn, method, group, cost)
        noise, perm = drawn[perm], start + perm
    else:
        everything = (x, drawn) if group is None else (x, drawn, group)
        everything = jax.lax.all_gather(everything, axis_name, tiled=True)
        solve = lambda: assign(*everything[:2], method, *everything[2:], cost=cost)  # noqa: E731
        perm = _once(solve, axis_name) if method == "linear" else solve()
        perm = jax.lax.dynamic_slice_in_dim(perm, start, len(x))
        noise = everything[1][perm]
    found = statistics(x, finite, drawn, noise)
    return noise, perm, found if axis_name is None else jax.lax.pmean(found, axis_name)


def training_noise(
    key: Key, x: Array, batch: dict[str, Array], method: str, *, group_by: str = "", cost: str = "dot", k: int = 8,
    route: str = "device", pool: int = 1, terminal_sigma: float = 0.0,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """(noise, stats) for the images x (B, ...) of a training batch: `pair` as its config says it. "none" is one draw of
    the whole batch, without stats.

    group_by: an entry of the batch by whose values noise is kept apart, for example "label". route "host": the plan was
    made by `host.Assigned`, over `pool` batches at once; what it added is taken out of `batch`. terminal_sigma: the level
    that sampling starts from, for `costs.terminal_variance` among the stats; 0 = not wanted. With a "label" in the batch
    the stats have `costs.label_leak` too. Raises ValueError as `pair`, and where the batch lacks something.
    """
    if method == "none":
        return jax.random.normal(key, x.shape, x.dtype), {}
    if group_by:
        check_group(group_by, batch)
    if route == "host":
        if NOISE_KEY not in batch:
            raise ValueError(f"route='host' needs {NOISE_KEY!r} in the batch, found {sorted(batch)}: see assign.host")
        usual = draw(row_keys(key, len(x)), x.shape[1:])
        noise = draw(jax.random.wrap_key_data(batch.pop(NOISE_KEY)), x.shape[1:])
        seen, finite = usable(x)
        stats = statistics(seen, finite, usual, noise)
    else:
        noise, _, stats = pair(key, x, method, batch[group_by] if group_by else None, cost, k=k)
        seen, _ = usable(x)
    if terminal_sigma:
        stats["assign_terminal_variance"] = costs.terminal_variance(seen, noise, 1.0, terminal_sigma)
    if "label" in batch:
        stats["assign_label_leak"] = costs.label_leak(seen, noise, batch["label"])
    return noise.astype(x.dtype), stats


def row_keys(key: Key, num: int, start: Array | int = 0) -> Key:
    """The keys (num,) from which rows start, start + 1, ... of a batch draw their noise."""
    rows = start + jnp.arange(num, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def draw(keys: Key, shape: tuple[int, ...]) -> Array:
    """Unit noise (B, *shape) float32, each row from its key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def usable(x: Array) -> tuple[Array, Array]:
    """(x in float32 with images that are not finite set to zero, which are finite (B,)). No gradient passes."""
    finite = jnp.isfinite(squared_norm(costs.flat(x)))
    return jax.lax.stop_gradient(jnp.where(per_sample(finite, x), x, 0)).astype(jnp.float32), finite


def statistics(x: Array, finite: Array, before: Array, after: Array) -> dict[str, Array]:
    """`costs.statistics`, and assign_nonfinite."""
    return costs.statistics(x, before, after) | {"assign_nonfinite": jnp.sum(~finite).astype(jnp.float32)}


def check_group(group_by: str, batch: Batch) -> None:
    """Raises ValueError where the batch does not hold what noise is to be kept apart by."""
    if group_by not in batch:
        raise ValueError(
            f"assign_options.group_by={group_by!r} needs that condition in the batch, found {sorted(batch)}: leave it out"
        )


def assign(x: Array, noise: Array, method: str, group: Array | None = None, cost: str = "dot") -> Array:
    """The permutation (B,) int32 of noise (B, ...) for finite x (B, ...), by a method that permutes."""
    # on each device all of it, so that their number does not change a bit
    return sharding.everywhere(permute(costs.cost_matrix(*sharding.everywhere((x, noise)), cost), method, group))


def permute(matrix: Array, method: str, group: Array | None = None) -> Array:
    """The same from the costs (B, B)."""
    if method == "linear":
        return exact.linear(matrix, group)
    # what is the same for a whole row or column says nothing about the assignment
    centred = matrix - jnp.mean(matrix, axis=1, keepdims=True) - jnp.mean(matrix, axis=0, keepdims=True)
    # a power of two, which another order of summation does not change: the same bits in every program
    eps = _EPS * jnp.exp2(jnp.round(jnp.log2(jnp.std(centred))))
    return approx.auction(matrix, eps, group) if method == "auction" else approx.sinkhorn(matrix, eps)


def check_options(method: str, options: Mapping[str, str | int | float]) -> None:
    """Raises ValueError for the name and the options of `training_noise` that cannot be."""
    names.check_options(training_noise, options, "assign_options")
    own = {name: options[name] for name in ("cost", "k") if name in options}
    check(method, group=bool(options.get("group_by")), **own)
    route, pool = options.get("route", "device"), options.get("pool", 1)
    if route not in ROUTES:
        raise ValueError(f"assign_options.route must be one of {ROUTES}, found {route!r}")
    if route == "host" and method != "linear":
        raise ValueError(f"route='host' is for the exact assignment, found {method!r}: set assign = 'linear', or leave it out")
    if pool < 1 or (pool > 1 and route != "host"):
        raise ValueError(
            f"pool={pool} batches at once are assigned on the host: set assign_options.route = 'host' and a pool of 1 or more"
        )


def check(method: str, cost: str = "dot", group: bool = False, k: int = 8, scope: str = "global") -> None:
    """Raises ValueError for names that do not exist, and for options that the method does not have."""
    if method not in METHODS:
        raise ValueError(f"the assignment must be one of {METHODS}, found {method!r}")
    costs.check_cost(cost)
    if scope not in SCOPES:
        raise ValueError(f"the scope must be one of {SCOPES}, found {scope!r}")
    if k < 1:
        raise ValueError(f"k is the number of noises that are drawn for an image, at least 1, found {k}")
    if cost != "dot" and method not in PERMUTING:
        raise ValueError(f"found cost={cost!r} with method {method!r}, which has its own: leave it out")
    if group and method not in ("linear", "auction"):
        raise ValueError(f"only 'linear' and 'auction' keep noise within groups, found {method!r}: leave the group out")


def _once(solve: Callable[[], Array], axis_name: str) -> Array:
    """A host's answer, asked for by the first device alone. `shard_map` needs check_vma=False for it."""
    first = jax.lax.axis_index(axis_name) == 0
    shape = jax.eval_shape(solve)
    perm = jax.lax.cond(first, solve, lambda: jnp.zeros(shape.shape, shape.dtype))
    return jax.lax.psum(perm, axis_name)
