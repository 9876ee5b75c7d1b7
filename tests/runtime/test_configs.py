"""The config of a run folder: what may change, what may not, and what the message says."""

import ml_collections
import pytest

from diffjax.runtime import configs

SAVED = {"seed": 0, "optim": {"learning_rate": 0.1}, "train": {"batch_size": 4, "total_images": 8}, "sample": {"n": 1}}


@pytest.mark.fast
def test_every_difference_is_listed_in_order():
    now = {"seed": 0, "optim": {"learning_rate": 0.2, "b1": 0.9}, "train": {"total_images": 16}, "sample": {"n": 2}}
    assert configs.differences(SAVED, now) == (
        ["optim.b1: absent -> 0.9", "optim.learning_rate: 0.1 -> 0.2", "train.batch_size: 4 -> absent"],
        ["sample.n: 1 -> 2", "train.total_images: 8 -> 16"],
    )


def test_a_key_that_only_starts_like_a_free_one_is_not_free():
    assert configs.differences({"sampler": 1}, {"sampler": 2}) == (["sampler: 1 -> 2"], [])


def test_tuples_and_config_dicts_equal_what_their_file_gives_back(tmp_path):
    config = ml_collections.ConfigDict({"model": {"widths": (1, 2)}, "empty": {}})
    configs.write(tmp_path, config)
    assert configs.read(tmp_path) == {"model": {"widths": [1, 2]}, "empty": {}}
    assert configs.check(configs.read(tmp_path), config, "config.json") == []


def test_a_section_that_became_a_value_is_a_difference():
    assert configs.differences({"a": {"b": 1}}, {"a": 1})[0] == ["a: absent -> 1", "a.b: 1 -> absent"]
    assert configs.differences({"a": {}}, {"a": None})[0] == ["a: {} -> null"]


def test_a_refusal_says_what_to_type_and_can_be_overruled():
    with pytest.raises(configs.ConfigChangedError, match=r"here holds.*\n  seed: 0 -> 1\nUse another --w"):
        configs.check(SAVED, SAVED | {"seed": 1}, "here")
    allowed = SAVED | {"seed": 1, "allow_config_change": True}
    assert configs.check(SAVED, allowed, "here") == ["seed: 0 -> 1", "allow_config_change: absent -> true"]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON.*--workdir"):
        configs.read(tmp_path)
    assert configs.read(tmp_path / "absent") is None
