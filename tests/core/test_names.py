"""Names that do not exist are answered with the nearest one that does."""

import pytest

from diffjax.core import names


def _function(x, scale=1.0, shift=0.0):
    return scale * x + shift


@pytest.mark.fast
def test_lookup():
    table = {"cosine": 1, "constant": 2}
    assert names.lookup(table, "cosine", "schedule") == 1
    with pytest.raises(ValueError, match="unknown schedule 'Cosin'; did you mean 'cosine'. Known: cosine, constant"):
        names.lookup(table, "Cosin", "schedule")
    with pytest.raises(ValueError, match="unknown schedule None; did you mean"):
        names.lookup(table, None, "schedule")


def test_options_are_parameters_with_a_default():
    names.check_options(_function, {"scale": 2.0}, "the map")
    with pytest.raises(ValueError, match="unknown option 'scales' of the map; did you mean 'scale'"):
        names.check_options(_function, {"scales": 2.0}, "the map")
    with pytest.raises(ValueError, match="unknown option 'x' of the map"):
        names.check_options(_function, {"x": 2.0}, "the map")
    with pytest.raises(ValueError, match="the map has no options, found 'a': leave it out"):
        names.check_options(lambda x: x, {"a": 1}, "the map")
