"""Protocols: what may be compared, what is refused, what values are called."""

import numpy as np
import pytest

from diffjax.metrics import protocol
from diffjax.metrics.protocol import Protocol, Result

FILE = {"reference": "cifar10-32x32.npz", "reference_sha256": "ab" * 32, "reference_count": 50_000}
FID = Protocol("fid", "inception", "0f" * 32, "tf1 299", num_samples=50_000, **FILE)
CHANGES = {
    "weights_sha256": "1f" * 32, "resize": "clean 299", "rounding": protocol.UNROUNDED, "reference_sha256": "ac" * 32,
    "num_samples": 10_000, "settings": "k=3", "statistic": "minimum of 3 seed ranges",
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("field", CHANGES)
def test_each_field_that_differs_is_refused_by_name(field):
    other = FID._replace(**{field: CHANGES[field]})
    with pytest.raises(
        ValueError, match=rf"different protocols and cannot be compared: {field}: .+Evaluate both with one config"
    ):
        protocol.check_comparable([Result(1.0, FID), Result(2.0, other)])
    assert protocol.identity(other) != protocol.identity(FID)


def test_all_fields_that_differ_are_named():
    with pytest.raises(ValueError, match='resize: "tf1 299" and "torch 299"; num_samples: 50000 and 5'):
        protocol.check_comparable([FID, FID._replace(resize="torch 299", num_samples=5)])


def test_a_reference_is_known_by_its_hash_and_without_one_by_its_name():
    renamed = FID._replace(reference="other name.npz", reference_count=0)
    protocol.check_comparable([FID, renamed])
    assert protocol.identity(FID) == protocol.identity(renamed)
    nameless = FID._replace(reference_sha256="")
    with pytest.raises(ValueError, match="reference: .+other name"):
        protocol.check_comparable([nameless, nameless._replace(reference="other name.npz")])


def test_only_inception_features_make_an_fid():
    assert protocol.title("fid", "inception") == "FID"
    assert protocol.title("frechet", "pixels") == "pixel Frechet distance"
    assert protocol.title("frechet", "classifier") == "classifier Frechet distance"
    assert protocol.title("precision", "classifier") == "classifier precision"
    for metric, features in (("fid", "pixels"), ("fid", "classifier"), ("frechet", "inception"), ("cmmd", "clip_b32")):
        with pytest.raises(
            ValueError, match=f"'{metric}' is not defined on the features '{features}', expected one of"
        ):
            protocol.title(metric, features)
    with pytest.raises(ValueError, match="unknown metric 'fidd'; did you mean 'fid'"):
        protocol.title("fidd", "inception")


def test_every_value_of_every_metric_has_a_title_and_a_sentence():
    for name, metric in protocol.METRICS.items():
        for features in metric.titles:
            for part in metric.gives or (name,):
                sentence = protocol.describe(FID._replace(metric=part, features=features))
                assert sentence.startswith(protocol.title(part, features) + ": ") and "{" not in sentence
                assert ("FID" in sentence) == (features == "inception" and "fid" in name)


def test_the_sentence_says_all():
    text = protocol.describe(FID._replace(settings="k=3"))
    for part in (
        "weights sha256 0f0f0f0f0f0f",
        "tf1 299",
        "uint8",
        "50,000 items of cifar10-32x32.npz",
        "sha256 abab",
        "k=3",
        "one seed range",
    ):
        assert part in text


def test_the_minimum_where_lower_is_better_else_the_mean():
    low = protocol.summarise([3.0, 1.0, 2.0], FID, ["a", "b", "c"], nfe=35)
    assert (low.value, low.spread, low.nfe, low.protocol.statistic) == (
        1.0,
        (1.0, 2.0, 3.0),
        35,
        "minimum of 3 seed ranges",
    )
    high = protocol.summarise([3.0, 1.0, 2.0], FID._replace(metric="recall"), ["a", "b", "c"])
    assert (high.value, high.protocol.statistic) == (2.0, "mean of 3 seed ranges")
    one = protocol.summarise([3.0], FID, ["a"])
    assert (one.value, one.protocol) == (3.0, FID)
    with pytest.raises(ValueError, match="statistic"):
        protocol.check_comparable([low, one])


def test_tables_write_each_protocol_once():
    results = [
        ("a", Result(1.0, FID, ("0: 0-9",), 2)),
        ("b", Result(2.0, FID)),
        ("b", Result(3.0, FID._replace(metric="recall"))),
    ]
    made = protocol.tables(results)
    assert [row["metric"] for row in made["metrics"]] == ["FID", "FID", "Inception recall"]
    assert [row["protocol"] for row in made["metrics"]] == [
        row["protocol"] for row in made["protocols"] for _ in range(2)
    ][:3]
    assert set(Protocol._fields) <= set(made["protocols"][0]) and len(made["protocols"]) == 2


def test_the_hash_of_a_set_does_not_depend_on_its_parts():
    images = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2, 1)
    whole = protocol.set_sha256(protocol.digests(images))
    assert whole == protocol.set_sha256(np.concatenate([protocol.digests(images[:3]), protocol.digests(images[3:])]))
    assert whole != protocol.set_sha256(protocol.digests(images[::-1]))
