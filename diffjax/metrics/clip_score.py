"""CLIP's score: how well images fit their texts, by the cosine of CLIP's embeddings. Radford 2021; Hessel 2021.

    found = cosines(image_BD, text_BD)      # of each pair; keep them, or their sum and number
    clip_score(found)                       # 100 mean cos, at least 0

Two scalings go by this name. Papers on text to image report

    100 max(mean_i cos_i, 0)                as the package torchmetrics computes it                  (1)

and Hessel 2021, eq. 1, has 2.5 mean_i max(cos_i, 0), for captions of photographs. Where no pair is below 0, the second
is a fortieth of the first. `clip_score` is (1).

>>> import numpy as np
>>> from diffjax.metrics import clip_score
>>> clip_score.clip_score(np.array([0.25, 0.35], np.float32)).__round__(3)
30.0
"""

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array

SCALE = 100.0


def unit(x_BD: Array) -> Array:
    """Each vector (..., D) over its length, float32 or wider; zeros become NaN."""
    wide = x_BD.astype(jnp.promote_types(x_BD.dtype, jnp.float32))
    return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)


def cosines(image_BD: Array, text_BD: Array) -> Array:
    """(B,) of the embeddings of images and of their texts, a row each. Raises ValueError for shapes that differ."""
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
        raise ValueError(
            f"found embeddings of images {image_BD.shape} and of texts {text_BD.shape}, expected two (B, D): one text "
            "an image, of one CLIP"
        )
    return jnp.sum(unit(image_BD) * unit(text_BD), axis=-1)


def clip_score(cosines_N: np.ndarray) -> float:
    """(1) of the cosines of all pairs, in float64. Raises ValueError for none, and for values that are not finite."""
    cosines_N = np.asarray(cosines_N, np.float64)
    if cosines_N.ndim != 1 or not len(cosines_N) or not np.isfinite(cosines_N).all():
        found = f"{cosines_N.shape}, {np.sum(~np.isfinite(cosines_N))} not finite"
        raise ValueError(f"found cosines of shape {found}, expected one a pair of image and text")
    return max(SCALE * float(np.mean(cosines_N)), 0.0)
