"""Captions made of classes, and pictures whose captions say that they are mirrored."""

import numpy as np
import pytest

from diffjax.data import sources, texts
from diffjax.data.sources import DataShape


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", DataShape(8, 1, 10))


@pytest.mark.fast
def test_each_picture_and_its_mirror_image_say_what_they_show(digits):
    source = texts.Captioned(texts.Mirrored(digits), texts.of_classes("digits"), texts.MIRRORED)
    assert len(source) == 2 * len(digits)
    batch = sources.read(source, [14, 15])
    image = digits[7]["image"]
    np.testing.assert_array_equal(batch["image"], np.stack([image, image[:, ::-1]]))
    assert np.any(image != image[:, ::-1])
    assert batch["caption"].tolist() == ["a handwritten seven", "a handwritten seven, mirrored"]
    assert batch["flip"].tolist() == [0, 1] and batch["flip"].dtype == np.float32 and "label" not in batch


def test_captions_follow_the_flips_of_the_source():
    """Views are mirrored or not when they are made; a text of a file does not say it."""
    views = sources.load("digits", DataShape(8, 1, 10), views=2)
    source = texts.Captioned(views, texts.of_classes("digits"), texts.MIRRORED)
    plain = texts.Captioned(views, texts.of_classes("digits"))
    flips = [float(views[i]["flip"]) for i in range(40)]
    assert 5 < sum(flips) < 35
    for i, flip in enumerate(flips):
        line = texts.of_classes("digits")[views[i]["label"]]
        assert source[i]["caption"] == line + (", mirrored" if flip else "") and plain[i]["caption"] == line
        assert source[i]["flip"] == flip
    with pytest.raises(ValueError, match="mirrored already: leave it out"):
        texts.Mirrored(views)[2 * flips.index(1)]


def test_every_class_has_a_text_of_its_own():
    """In the order of the labels of the data sets."""
    for name in texts.CLASSES:
        lines = texts.of_classes(name)
        assert len(set(lines)) == 10 and not [line for line in lines if "{" in line]
    assert texts.of_classes("digits")[3] == "a handwritten three"
    assert texts.of_classes("cifar10")[1] == "a photo of an automobile"
    assert texts.of_classes("cifar10")[6] == "a photo of a frog"


def test_the_classes_of_cifar10_are_in_their_order(cifar10_dir):
    import tensorflow_datasets

    names = tensorflow_datasets.builder("cifar10", data_dir=cifar10_dir).info.features["label"].names
    assert [line.split()[-1] for line in texts.of_classes("cifar10")] == names
