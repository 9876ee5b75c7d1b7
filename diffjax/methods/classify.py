"""Training of a classifier by cross-entropy, the one method here that generates nothing.

    loss = -log p(y | x),   p = softmax of the logits, averaged over the batch                                       (1)

Its features serve as a feature space for evaluation (`models.classifier`).

    method = make(network, optax.scale_by_adam(), learning_rate=lambda i: 1e-3)
    state = method.init(params)
    state, metrics = method.step(state, {}, {"image": x_BHWC, "label": y_B}, key, iteration)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffjax.core import microbatches, trees
from diffjax.core.types import Array, Batch, Key, Method, Metrics, Params
from diffjax.methods.edm import take_image
from diffjax.methods.update import descend


class ClassifyState(NamedTuple):
    """params: the classifier's weights. opt_state: the optimiser's."""

    params: Params
    opt_state: Any


def make(
    network: Callable[[Params, Array], Array],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Array], Array],
    prepare: Callable[[Batch, Key], Batch] | None = None,
) -> Method:
    """Cross-entropy as a Method: nothing is frozen, state is a ClassifyState.

    network(params, x (B, H, W, C)) -> logits (B, num_classes). prepare(batch, key): what the loader gives to image
    float32 in [-1, 1] and label. Metrics, float32: loss, accuracy on the batch before the step, grad_norm before
    clipping, learning_rate; nonfinite_leaf (int32). Raises ValueError at the first call for a batch without labels.
    """

    def init(params: Params) -> ClassifyState:
        return ClassifyState(params, optimizer.init(params))

    def step(
        state: ClassifyState, frozen: Params, batch: Batch, key: Key, iteration: Array
    ) -> tuple[ClassifyState, Metrics]:
        del frozen
        batch = dict(batch) if prepare is None else dict(prepare(batch, key))
        image = take_image(batch)
        if "label" not in batch:
            raise ValueError(
                f"a classifier learns labels, found a batch with {sorted(batch)} beside the image: set data.num_classes"
            )

        def objective(params: Params, fixed: tuple[()], rows: tuple[Array, Array], key: None) -> tuple[Array, Array]:
            image, label = rows
            logits = network(params, image)
            return loss(logits, label), logits

        given = image, batch["label"]
        (value, logits), grads = microbatches.value_and_grad(objective, state.params, (), given)
        right = accuracy(logits, batch["label"])
        rate = learning_rate(iteration)
        params, opt_state = descend(optimizer, rate, *state, grads)
        values = {"loss": value, "accuracy": right, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        return ClassifyState(params, opt_state), {**metrics, "nonfinite_leaf": trees.first_nonfinite(grads)}

    return Method(init, step)


def loss(logits: Array, label: Array) -> Array:
    """Eq. 1 of logits (B, num_classes) and integer labels (B,), a scalar."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))


def accuracy(logits: Array, label: Array) -> Array:
    """Share of the labels (B,) that have the highest logit, a scalar."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == label).astype(jnp.float32))
