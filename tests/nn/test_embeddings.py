"""Numbers as cosines and sines, against the values that the specification prints."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.nn import embeddings


@pytest.mark.fast
def test_the_index_500_of_published_transformers(x64):
    found = embeddings.positional(jnp.array([500.0]), 256)[0]
    np.testing.assert_allclose(found[:3], [-0.88384927, 0.94594258, 0.84851454], rtol=0, atol=5e-9)  # digits given
    np.testing.assert_allclose(found[128:131], [-0.46777181, 0.32433414, -0.52917206], rtol=0, atol=5e-9)
