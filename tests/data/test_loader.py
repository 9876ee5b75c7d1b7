"""Order of the data: every image once an epoch, the same wherever and however it is read, resumed exactly."""

import json

import numpy as np
import pytest

from diffjax.data import loader, sources

SHAPE = sources.DataShape(4, 1, 23)


@pytest.fixture(scope="module")
def source():
    """23 images; the label is the index."""
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 1)).astype(np.uint8)
    return sources.Arrays(images, np.arange(23), SHAPE)


def take(batches, count: int) -> list[np.ndarray]:
    return [next(batches)["label"] for _ in range(count)]


@pytest.mark.fast
def test_each_epoch_shows_every_image_once_in_a_new_order(source):
    order = np.concatenate(take(loader.make_batches(source, 5, seed=0), 14))
    epochs = order[: 3 * 23].reshape(3, 23)  # batches span the ends of epochs
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(23), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = np.concatenate(take(loader.make_batches(source, 5, seed=1), 5))
    assert not np.array_equal(order[:25], other)
    np.testing.assert_array_equal(loader.order(23, 0, 17, 40), order[17:57])


def test_batches_hold_the_images_of_their_labels(source):
    batch = next(loader.make_batches(source, 8, seed=3))
    assert batch["image"].shape == (8, 4, 4, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_array_equal(image, source[int(label)]["image"])


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_resumed_batches_are_those_that_would_have_come(source, stop):
    uninterrupted = loader.make_batches(source, 5, seed=0)
    expected = [next(uninterrupted) for _ in range(stop + 6)][stop:]
    stopped = loader.make_batches(source, 5, seed=0)
    take(stopped, stop)  # threads are ahead of this by then
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = loader.make_batches(source, 5, seed=0)
    resumed.set_state(state)
    take(stopped, 3)
    stopped.set_state(state)  # back, in the same iterator
    for batches in (resumed, stopped):
        for batch in expected:
            found = next(batches)
            assert found.keys() == batch.keys() and batches.get_state()["num_images"] == 23
            for key in batch:
                np.testing.assert_array_equal(found[key], batch[key])


def test_a_position_goes_on_with_another_batch_size(source):
    first = loader.make_batches(source, 6, seed=0)
    take(first, 2)
    second = loader.make_batches(source, 4, seed=0)
    second.set_state(first.get_state())
    np.testing.assert_array_equal(np.concatenate(take(second, 3)), loader.order(23, 0, 12, 12))


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_do_not_change_the_order(source, threads):
    expected = take(loader.make_batches(source, 5, seed=0), 20)
    np.testing.assert_array_equal(take(loader.make_batches(source, 5, seed=0, num_threads=threads), 20), expected)


def test_worker_processes_do_not_change_the_order_nor_the_position(source):
    expected = take(loader.make_batches(source, 5, seed=0), 8)
    batches = loader.make_batches(source, 5, seed=0, num_workers=2)
    found = take(batches, 3)
    state = batches.get_state()
    batches.close()
    resumed = loader.make_batches(source, 5, seed=0)
    resumed.set_state(state)
    np.testing.assert_array_equal(found + take(resumed, 5), expected)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batch_of_one(source, processes):
    expected = take(loader.make_batches(source, 6, seed=0), 9)
    parts = [
        take(loader.make_batches(source, 6, seed=0, process=p, num_processes=processes), 9) for p in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


def test_batches_that_cannot_be_made_are_refused(source):
    with pytest.raises(ValueError, match="23 images, fewer than train.batch_size = 24"):
        loader.make_batches(source, 24, seed=0)
    with pytest.raises(ValueError, match="found 5, expected a multiple of 2"):
        loader.make_batches(source, 5, seed=0, process=0, num_processes=2)
    with pytest.raises(ValueError, match="found -1"):
        loader.make_batches(source, 5, seed=-1)
    with pytest.raises(ValueError, match="data set of 22 images, found 23"):
        loader.make_batches(source, 5, seed=0).set_state({"images": 5, "num_images": 22})


def test_an_error_of_the_source_reaches_the_caller(source):
    class Broken:
        def __len__(self):
            return 23

        def __getitem__(self, index):
            raise ValueError(f"unreadable picture {index}")

    with pytest.raises(ValueError, match="unreadable picture"):
        next(loader.make_batches(Broken(), 5, seed=0))


def test_no_data_has_a_position_too():
    batches = loader.NoData()
    assert [next(batches) for _ in range(3)] == [{}, {}, {}]
    state = json.loads(json.dumps(batches.get_state()))
    resumed = loader.NoData()
    resumed.set_state(state)
    assert next(resumed) == {} and resumed.get_state() == {"batches": 4}
    assert next(iter(resumed)) == {}


def test_cifar10_is_read_and_resumed(cifar10_dir):
    cifar = sources.load("tfds", sources.DataShape(32, 3, 10), dataset="cifar10", data_dir=cifar10_dir)
    assert len(cifar) == 50_000
    batches = loader.make_batches(cifar, 64, seed=0)
    first = next(batches)
    assert first["image"].shape == (64, 32, 32, 3) and first["image"].dtype == np.uint8
    assert first["label"].dtype == np.int32 and len(set(first["label"])) == 10
    state = batches.get_state()
    expected = next(batches)
    batches.close()
    resumed = loader.make_batches(cifar, 64, seed=0)
    resumed.set_state(state)
    for key, value in next(resumed).items():
        np.testing.assert_array_equal(value, expected[key])
    resumed.close()
