"""Kills at random moments lose no checkpoint and change no bit."""

import jax
import kill_example
import loop_example
import numpy as np
import pytest

from diffjax.runtime import checkpoint_read
from diffjax.train import loop


@pytest.mark.fast
def test_kills_at_random_moments_lose_no_checkpoint_and_change_no_bit(tmp_path):
    kills = list(kill_example.kill_often(tmp_path / "killed", kills=3, seed=1))
    assert all(kill.resumed == kill.newest > 0 for kill in kills)
    assert [kill.newest for kill in kills] == sorted(kill.newest for kill in kills) and kills[-1].newest == 12
    config = loop_example.make_config(**kill_example.SETTINGS)
    whole = loop.run(loop_example.make_experiment(config), config, tmp_path / "whole")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    found = checkpoint_read.read_newest(tmp_path / "killed", abstract, config)
    jax.tree.map(np.testing.assert_array_equal, whole, found.state)
