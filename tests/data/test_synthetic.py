"""Drawn pictures say what their captions say, are of many sizes, and the same again."""

import numpy as np
import pytest

from diffjax.data import sources, synthetic
from diffjax.data.sources import DataShape


def middle(image: np.ndarray, colour: str) -> float:
    """Mean column of the pixels of a colour, as a part of the width; NaN where there is none."""
    columns = np.nonzero((image == synthetic.COLOURS[colour]).all(axis=2))[1]
    return columns.mean() / image.shape[1] if len(columns) else np.nan


@pytest.mark.fast
def test_captions_say_what_is_left_and_right():
    source, ends = synthetic.Shapes(300, captions=True), {"left": 0, "right": 0}
    for index in range(300):
        item = source[index]
        first, side, last = str(item["caption"]).replace(" of a ", " ").removeprefix("a ").rpartition(" left ")
        if not side:
            first, side, last = str(item["caption"]).replace(" of a ", " ").removeprefix("a ").rpartition(" right ")
        ends[side.strip()] += 1
        (one, _), (other, _) = first.split(), last.split()
        if one != other:
            assert (middle(item["image"], one) < middle(item["image"], other)) == (side == " left ")
        else:
            assert np.isclose(middle(item["image"], one), 0.5, atol=0.15)
    assert min(ends.values()) > 100  # each is drawn half of the time


def test_classes_are_those_of_the_left_thing():
    labelled, told = synthetic.Shapes(100), synthetic.Shapes(100, captions=True)
    for index in range(100):
        np.testing.assert_array_equal(labelled[index]["image"], told[index]["image"])
        label = labelled[index]["label"]
        colour, thing = list(synthetic.COLOURS)[label // 3], synthetic.THINGS[label % 3]
        caption = str(told[index]["caption"])
        assert caption.startswith(f"a {colour} {thing} left") or caption.endswith(f"right of a {colour} {thing}")
    assert {int(labelled[i]["label"]) for i in range(100)} == set(range(synthetic.NUM_CLASSES))


def test_sizes_differ_and_items_repeat():
    a, b = synthetic.Shapes(50), synthetic.Shapes(1000)
    shapes = [a[i]["image"].shape for i in range(50)]
    assert len(set(shapes)) > 40 and min(min(s[:2]) for s in shapes) >= 48 and max(max(s[:2]) for s in shapes) <= 128
    for index in (0, 49):
        np.testing.assert_array_equal(a[index]["image"], b[index]["image"])
    with pytest.raises(IndexError):
        a[50]
    with pytest.raises(ValueError, match="data.num: found 0"):
        synthetic.Shapes(0)


def test_as_a_source():
    """Cropped, with what the crop lost, and with texts in place of classes."""
    source = sources.load("shapes", DataShape(16, 3, synthetic.NUM_CLASSES), num=20, resize=True, metadata=True)
    item, (height, width, _) = source[3], synthetic.Shapes(20)[3]["image"].shape
    assert item["image"].shape == (16, 16, 3) and item["label"].dtype == np.int32
    assert (item["height"], item["width"], item["flip"]) == (height, width, 0)
    assert item["top"] == np.float32(max(height - width, 0) // 2 * 16 / min(height, width)) and item["left"] == 0
    texts = sources.load("shapes", DataShape(16, 3), num=20, resize=True, captions=True)
    assert texts[0].keys() == {"image", "caption"}
    with pytest.raises(ValueError, match="data.captions: unknown for 'digits'"):
        sources.load("digits", DataShape(8, 1), captions=True)
