"""Inception score of class probabilities p(y|x) of samples.

    IS = exp( mean_x KL(p(y|x) | p(y)) ),  p(y) = mean_x p(y|x)             Salimans 2016, sec. 4  (1)

for each of ten splits in the order of the samples, i N / 10 to (i + 1) N / 10; the score is the mean of the splits' (as
in the original code and in torch-fidelity, which shuffles first). Published scores are of the 1008 logits of the
TensorFlow graph *without* their bias, softmax(pool @ kernel).
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from diffjax.metrics.mmd import checked


class InceptionScore(NamedTuple):
    """mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, splits: int = 10) -> InceptionScore:
    """Eq. 1 from `logits` (N, classes) of any additive constant; log-probabilities will do.

    Raises ValueError for another shape, values that are not finite, and fewer samples than splits.
    """
    logits = checked(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"expected 1 to {len(logits)} splits of {len(logits)} samples, found {splits}")
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        logs = scipy.special.log_softmax(part.astype(np.float64), axis=1)
        mean = np.exp(logs).mean(axis=0)
        # of a probability that is 0 for all samples, nothing
        divergence = np.exp(logs) * logs - scipy.special.xlogy(np.exp(logs), mean[None, :])
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
