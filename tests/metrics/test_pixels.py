"""Distances of reports: the same numbers as without protocol, and a protocol that tells unequal ones apart."""

import numpy as np
import pytest

from diffjax.metrics import fid, pixels, prdc, protocol


def images(seed, count=60, dtype=np.float32):
    values = np.random.default_rng(seed).uniform(-1, 1, (count, 3, 3, 1))
    return np.round(values * 127.5 + 127.5).astype(np.uint8) if dtype is np.uint8 else values.astype(np.float32)


def digest(images):
    return protocol.set_sha256(protocol.digests(images))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_values_are_those_of_the_plain_functions(dtype):
    """Bit for bit: reports keep their numbers."""
    data, samples = images(0, dtype=dtype), images(1, 90)
    real = pixels.reference(data, "noise", keep_features=True)
    assert pixels.frechet(samples, real).value == fid.pixel_frechet(samples, data)
    found = pixels.prdc(samples, real, 3)
    expected = prdc.prdc(fid.pixels(data), fid.pixels(samples[:60]), 3)  # as many samples as images
    assert {name: result.value for name, result in found.items()} == expected._asdict()


def test_the_protocol_says_what_was_compared():
    data = images(0)
    real = pixels.reference(data, "noise", keep_features=True)
    distance, recall = pixels.frechet(images(1, 90), real), pixels.prdc(images(1, 90), real, 3)["recall"]
    p = distance.protocol
    assert (p.metric, p.features, p.rounding, p.num_samples) == ("frechet", "pixels", protocol.UNROUNDED, 90)
    assert (p.reference, p.reference_count, p.reference_sha256) == ("noise", 60, digest(data))
    assert recall.protocol == p._replace(metric="recall", settings="k=3, equal=True", num_samples=60)
    assert "FID" not in protocol.describe(p)


def test_the_hash_is_that_of_the_images():
    data = images(0)
    assert digest(data) == digest(np.asfortranarray(data))
    assert digest(data) != digest(data[::-1])
    changed = data.copy()
    changed[5, 0, 0, 0] += 0.1
    assert digest(changed) != digest(data)


def test_rows_of_a_report():
    real = pixels.reference(images(0), "noise")
    distances = [pixels.frechet(images(seed, 90), real) for seed in (1, 2)]
    half = pixels.frechet(images(0)[:30], pixels.reference(images(0)[30:], "half of noise"))
    rows = pixels.protocols({"frechet_distance": distances, "halves": [half]})
    assert [row["values"] for row in rows] == ["frechet_distance", "halves"]
    assert rows[0]["protocol"] == protocol.identity(distances[1].protocol) != rows[1]["protocol"]
    assert rows[0]["in words"].startswith("pixel Frechet distance: ")


def test_values_of_one_name_and_different_protocols_are_refused():
    real = pixels.reference(images(0), "noise")
    fewer = pixels.frechet(images(2, 80), real)
    with pytest.raises(ValueError, match="num_samples: 90 and 80"):
        pixels.protocols({"frechet_distance": [pixels.frechet(images(1, 90), real), fewer]})
    other = pixels.frechet(images(1, 90), pixels.reference(images(3), "noise"))
    with pytest.raises(ValueError, match="reference_sha256"):
        pixels.protocols({"frechet_distance": [pixels.frechet(images(1, 90), real), other]})
