"""Every kind of source gives the images that were put in, and says early what is wrong with bad ones."""

import builtins
import json
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest

from diffjax.data import sources, texts
from diffjax.data.sources import DataShape, load

SHAPE = DataShape(6, 3, 2)
NAMES = ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png")  # of the fixture `folder`


def make_images(count: int = 5, size: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Classes `cat` (2 pictures) and `dog` (3), PNG, and a file that is no picture."""
    for index, image in enumerate(make_images()):
        path = tmp_path / "photos" / ("cat" if index < 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


def make_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def assert_holds(source, images, labels):
    assert len(source) == len(images)
    for index, image in enumerate(images):
        item = source[index]
        np.testing.assert_array_equal(item["image"], image)
        assert item["image"].dtype == image.dtype
        assert item["label"] == labels[index] and item["label"].dtype == np.int32
    batch = sources.read(source, [3, 0])
    np.testing.assert_array_equal(batch["image"], images[[3, 0]])
    assert batch["label"].tolist() == [labels[3], labels[0]] and batch["label"].dtype == np.int32


@pytest.mark.fast
def test_digits():
    source = load("digits", DataShape(8, 1, 10))
    assert len(source) == 1797 and source[0]["label"] == 0 and source[0]["label"].dtype == np.int32
    images = sources.read(source, range(1797))["image"]
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
    np.testing.assert_array_equal(np.unique(images), np.arange(17, dtype=np.float32) / 8 - 1)
    assert load("digits", DataShape(8, 1))[0].keys() == {"image"}  # no classes asked for
    colour = load("digits", DataShape(8, 3))[5]["image"]  # as grey picture files become it
    np.testing.assert_array_equal(colour, np.repeat(images[5], 3, axis=2))


def test_digits_without_scikit_learn(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[demo\]'"):
        load("digits", DataShape(8, 1, 10))


def test_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'image_foldr'.*did you mean 'image_folder'"):
        load("image_foldr", SHAPE)
    with pytest.raises(ValueError, match="data.paht: unknown for 'arrays', .*did you mean 'path'"):
        load("arrays", SHAPE, paht="x.npz")
    assert len(load("digits", DataShape(8, 1), path="")) == 1797  # a config's path, emptied on the command line


# Arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("names", [("images", "labels"), ("image", "label")])
def test_arrays(tmp_path, dtype, names):
    images = make_images() if dtype == np.uint8 else (make_images() / 127.5 - 1).astype(np.float32)
    np.savez(tmp_path / "data.npz", **{names[0]: images, names[1]: np.array([0, 1, 1, 0, 1])})
    assert_holds(load("arrays", SHAPE, path=str(tmp_path / "data.npz")), images, [0, 1, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": make_images(size=7)}, r"\(5, 7, 7, 3\), expected \(5, 6, 6, 3\): set data.image_size"),
        ({"images": make_images(channels=1)}, "1 channels, expected 3: set data.channels"),
        ({"images": make_images().astype(np.float64)}, "float64, expected uint8"),
        ({"images": make_images().astype(np.float32)}, r"spans .*255, expected float32 in -1..1"),
        ({"images": np.full((5, 6, 6, 3), np.nan, np.float32)}, "spans nan..nan"),
        ({"labels": np.array([0, 1, 2, 0, 1])}, "labels 0..2, expected 0..1"),
        ({"labels": np.array([0, 1, -1, 0, 1])}, "labels -1..1, expected 0..1"),
        ({"labels": np.array([0, 1.5, 1, 0, 1])}, "float64 labels, expected integers"),
        ({"labels": np.array([0, 1])}, r"labels \(N,\), found \(5, 6, 6, 3\) and \(2,\)"),
        ({"images": make_images()[0]}, r"expected images \(N, H, W, C\)"),
        ({"images": make_images(0), "labels": np.zeros(0, int)}, "holds no image"),
        ({"labels": np.array([{}] * 5)}, "no readable .npz"),  # would need pickle
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    good = {"images": make_images(), "labels": np.array([0, 1, 1, 0, 1])}
    np.savez(tmp_path / "data.npz", **good | arrays)
    with pytest.raises(ValueError, match=message):
        load("arrays", SHAPE, path=str(tmp_path / "data.npz"))


def test_arrays_that_are_missing(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("arrays", SHAPE, path=str(path))
    np.savez(path, x=make_images())
    with pytest.raises(ValueError, match=r"array 'images' .*found \['x'\]"):
        load("arrays", SHAPE, path=str(path))
    np.savez(path, images=make_images())
    with pytest.raises(ValueError, match="has no labels"):
        load("arrays", SHAPE, path=str(path))
    assert load("arrays", DataShape(6, 3), path=str(path))[0].keys() == {"image"}
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no readable .npz"):
        load("arrays", SHAPE, path=str(path))
    np.save(path.with_suffix(".npy"), make_images())
    with pytest.raises(ValueError, match="no readable .npz"):
        load("arrays", SHAPE, path=str(path.with_suffix(".npy")))


# Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_number_their_classes_in_sorted_order(folder, tmp_path, zipped):
    path = make_zip(folder, tmp_path / "photos.zip") if zipped else folder
    source = load("image_folder", SHAPE, path=str(path))
    assert_holds(source, make_images(), [0, 0, 1, 1, 1])
    assert_holds(pickle.loads(pickle.dumps(source)), make_images(), [0, 0, 1, 1, 1])  # into a worker process
    assert load("image_folder", DataShape(6, 3), path=str(path))[0].keys() == {"image"}


@pytest.mark.parametrize("zipped", [False, True])
def test_the_table_of_labels_goes_before_folders(folder, tmp_path, zipped):
    (folder / "dataset.json").write_text(json.dumps({"labels": [[n, i % 2] for i, n in enumerate(NAMES)]}))
    path = make_zip(folder, tmp_path / "photos.zip") if zipped else folder
    assert_holds(load("image_folder", SHAPE, path=str(path)), make_images(), [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"labels": null}', "has no labels: set data.num_classes = 0"),
        ('{"labels": [["cat/0.png", 0]]}', "lacks the label of 4 pictures, the first is cat/1.png"),
        ('{"labels": [["cat/0.png", 0', "is not JSON"),
        (json.dumps({"labels": [[name, 2] for name in NAMES]}), "labels of .* are 2..2, expected 0..1"),
        (json.dumps({"labels": [[name, [1]] for name in NAMES]}), "label of cat/0.png is .1., expected a whole number"),
    ],
)
def test_bad_tables(folder, table, message):
    (folder / "dataset.json").write_text(table)
    with pytest.raises(ValueError, match=message):
        load("image_folder", SHAPE, path=str(folder))


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load("image_folder", SHAPE, path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="expected 3 class folders in .*, found 2"):
        load("image_folder", DataShape(6, 3, 3), path=str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture in"):
        load("image_folder", SHAPE, path=str(tmp_path / "empty"))
    (folder / "cat" / "0.png").rename(folder / "0.png")
    with pytest.raises(ValueError, match="found pictures outside of any"):
        load("image_folder", SHAPE, path=str(folder))
    (tmp_path / "half.zip").write_bytes(make_zip(folder, tmp_path / "photos.zip").read_bytes()[:300])
    with pytest.raises(ValueError, match="neither a folder nor a complete .zip"):
        load("image_folder", SHAPE, path=str(tmp_path / "half.zip"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no picture"), r"unreadable picture .*dog/3\.png"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), r"unreadable picture .*dog/3\.png"),
        (lambda path: path.write_bytes(b""), r"unreadable picture .*dog/3\.png"),
        (lambda path: PIL.Image.new("RGB", (7, 6)).save(path), r"dog/3\.png is 7x6, expected 6x6.*data.resize = True"),
        (lambda path: PIL.Image.new("RGBA", (6, 6)).save(path), r"dog/3\.png has mode RGBA.*transparency"),
        (lambda path: PIL.Image.new("I;16", (6, 6)).save(path), r"dog/3\.png has mode I;16, expected 8-bit"),
    ],
)
def test_bad_pictures_are_named(folder, spoil, message):
    spoil(folder / "dog" / "3.png")
    with pytest.raises(ValueError, match=message):
        load("image_folder", SHAPE, path=str(folder))


def test_a_damaged_picture_in_a_zip_is_named(folder, tmp_path):
    path = make_zip(folder, tmp_path / "photos.zip")
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("dog/3.png").header_offset
    data = bytearray(path.read_bytes())
    data[place + 90] ^= 255  # inside the stored PNG: the archive's checksum tells
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"unreadable picture .*dog/3\.png"):
        load("image_folder", SHAPE, path=str(path))


def test_grey_pictures(folder):
    grey = make_images(channels=1)[0, :, :, 0]
    with pytest.raises(ValueError, match="has colours .*expected grey: set data.channels = 3"):
        load("image_folder", DataShape(6, 1, 2), path=str(folder))
    with pytest.raises(ValueError, match="1 or 3 channels, found data.channels = 4"):
        load("image_folder", DataShape(6, 4, 2), path=str(folder))
    PIL.Image.fromarray(grey).save(folder / "cat" / "0.png")
    image = load("image_folder", SHAPE, path=str(folder))[0]["image"]
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
    for path in folder.rglob("*.png"):
        PIL.Image.fromarray(grey).save(path)
    image = load("image_folder", DataShape(6, 1, 2), path=str(folder))[0]["image"]
    np.testing.assert_array_equal(image, grey[..., None])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resizing_crops_the_centre(tmp_path, dtype):
    # 8 high, 20 wide; the central square has a flat left and right half
    image = np.zeros((8, 20, 3), dtype)
    image[:, 6:10], image[:, 10:14] = (200, 100) if dtype == np.uint8 else (0.5, -0.5)
    np.savez(tmp_path / "data.npz", images=image[None])
    shape = DataShape(4, 3)
    with pytest.raises(ValueError, match="data.resize = True"):
        load("arrays", shape, path=str(tmp_path / "data.npz"))
    small = load("arrays", shape, path=str(tmp_path / "data.npz"), resize=True)[0]["image"]
    assert small.shape == (4, 4, 3) and small.dtype == dtype
    # Lanczos overshoots by some percent beside the edge
    tolerance = 16 if dtype == np.uint8 else 0.08
    np.testing.assert_allclose(small[:, 0].astype(float), np.full((4, 3), image[0, 6, 0]), atol=tolerance)
    np.testing.assert_allclose(small[:, 3].astype(float), np.full((4, 3), image[0, 13, 0]), atol=tolerance)


def test_what_resizing_did_is_told(folder, tmp_path):
    """The original's size, and the window in pixels of the original scaled until it fits; the image is the same."""
    names = ("height", "width", "top", "left", "flip", "aspect")
    PIL.Image.new("RGB", (9, 30), (10, 20, 30)).save(folder / "dog" / "3.png")
    source = load("image_folder", SHAPE, path=str(folder), resize=True, metadata=True)
    # 21 rows too many, 10 of them above: of 9 pixels 6 are made
    np.testing.assert_allclose([source[3][name] for name in names], [30, 9, 10 * 6 / 9, 0, 0, 0.3], rtol=1e-6)
    assert [float(source[0][name]) for name in names] == [6, 6, 0, 0, 0, 1] and source[0]["label"] == 0
    plain = load("image_folder", SHAPE, path=str(folder), resize=True)
    np.testing.assert_array_equal(source[3]["image"], plain[3]["image"])
    batch = sources.read(source, [0, 3])
    assert all(batch[name].shape == (2,) and batch[name].dtype == np.float32 for name in names)
    captioned = texts.Captioned(source, ["a cat", "a dog"])
    assert str(captioned[3]["caption"]) == "a dog" and captioned[3]["height"] == 30 and "label" not in captioned[3]
    np.savez(tmp_path / "wide.npz", images=np.zeros((5, 8, 20, 3), np.uint8))
    source = load("arrays", DataShape(4, 3), path=str(tmp_path / "wide.npz"), resize=True, metadata=True)
    assert [float(source[4][name]) for name in names] == [8, 20, 0, 3, 0, 2.5]


def test_arrays_may_tell_their_own_sizes(tmp_path):
    told = {name: np.arange(5.0) + i for i, name in enumerate(("height", "width", "top", "left", "flip"), 1)}
    np.savez(tmp_path / "data.npz", images=make_images(), **told)
    source = load("arrays", DataShape(6, 3), path=str(tmp_path / "data.npz"), metadata=True)
    assert [float(source[3][name]) for name in (*told, "aspect")] == [4, 5, 6, 7, 8, 1.25]
    assert load("arrays", DataShape(6, 3), path=str(tmp_path / "data.npz"))[0].keys() == {"image"}
    for wrong in ({"top": np.zeros(4)}, {"top": None}):
        left = {name: array for name, array in {**told, **wrong}.items() if array is not None}
        np.savez(tmp_path / "bad.npz", images=make_images(), **left)
        with pytest.raises(ValueError, match=r"bad.npz tells \['top'\] of no image, or not of each"):
            load("arrays", DataShape(6, 3), path=str(tmp_path / "bad.npz"), metadata=True)


def test_folders_resize_pictures_of_any_size(folder):
    PIL.Image.new("RGB", (9, 30), (10, 20, 30)).save(folder / "dog" / "3.png")
    source = load("image_folder", SHAPE, path=str(folder), resize=True)
    np.testing.assert_array_equal(source[3]["image"], np.full((6, 6, 3), (10, 20, 30)))
    np.testing.assert_array_equal(source[0]["image"], make_images()[0])  # of the right size already


# ArrayRecord ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint8), (1, np.uint8), (4, np.uint8), (3, np.float32)])
def test_array_record_round_trip(tmp_path, channels, dtype):
    images = make_images(channels=channels)
    images = images if dtype == np.uint8 else (images / 127.5 - 1).astype(np.float32)
    items = [{"image": image, "label": label} for image, label in zip(images, [0, 1, 1, 0, 1], strict=True)]
    assert sources.write_array_record(tmp_path / "a.array_record", items[:2]) == 2
    assert sources.write_array_record(tmp_path / "b.array_record", items[2:]) == 3
    source = load("array_record", DataShape(6, channels, 2), path=str(tmp_path))
    assert_holds(source, images, [0, 1, 1, 0, 1])
    assert_holds(pickle.loads(pickle.dumps(source)), images, [0, 1, 1, 0, 1])
    assert len(load("array_record", DataShape(6, channels), path=str(tmp_path / "a.array_record"))) == 2


def test_array_record_bad_input(tmp_path):
    path = tmp_path / "a.array_record"
    good = {"image": make_images()[0], "label": 1}
    with pytest.raises(ValueError, match="item 1 is float64, expected uint8"):
        sources.write_array_record(path, [good, {"image": np.zeros((6, 6, 3)), "label": 0}])
    with pytest.raises(ValueError, match="no image to write"):
        sources.write_array_record(path, [])
    assert not list(tmp_path.iterdir())
    sources.write_array_record(path, [good, {"image": make_images()[1]}])
    with pytest.raises(FileExistsError, match="choose another name"):
        sources.write_array_record(path, [good])
    with pytest.raises(ValueError, match="image 1 of .* has no label"):
        load("array_record", SHAPE, path=str(path))
    with pytest.raises(ValueError, match="image 0 of .* has shape .*expected .5, 5, 3.: set data.image_size"):
        load("array_record", DataShape(5, 3), path=str(path))
    with pytest.raises(ValueError, match="3 channels, expected 1"):
        load("array_record", DataShape(6, 1), path=str(path), resize=True)
    for label in (2, -3):
        other = tmp_path / f"{label}" / "a.array_record"
        other.parent.mkdir()
        sources.write_array_record(other, [{"image": make_images()[0], "label": label}])
        with pytest.raises(ValueError, match=f"image 0 of .* has labels {label}..{label}, expected 0..1"):
            load("array_record", SHAPE, path=str(other))
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(ValueError, match="no complete ArrayRecord file"):
        load("array_record", SHAPE, path=str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .*array_record.* file in"):
        load("array_record", SHAPE, path=str(tmp_path / "empty"))


def test_foreign_records_are_told_apart(tmp_path):
    array_record_module = pytest.importorskip("array_record.python.array_record_module")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(b"\x0a\x10something of another make")
    writer.close()
    with pytest.raises(ValueError, match="image 0 of .* is no record of write_array_record .*data.name = 'tfds'"):
        load("array_record", SHAPE, path=str(tmp_path))


# tensorflow-datasets ------------------------------------------------------------------------------------------------


def test_cifar10(cifar10_dir):
    options = {"dataset": "cifar10", "data_dir": cifar10_dir}
    source = load("tfds", DataShape(32, 3, 10), split="test[:100]", **options)
    assert len(source) == 100
    batch = sources.read(pickle.loads(pickle.dumps(source)), range(100))
    assert batch["image"].shape == (100, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and set(batch["label"]) <= set(range(10))
    assert batch["image"].std() > 40  # pictures, not noise around one value
    with pytest.raises(ValueError, match="has 10 classes, found data.num_classes = 100"):
        load("tfds", DataShape(32, 3, 100), **options)
    with pytest.raises(ValueError, match="no split 'tst', expected one of .*did you mean 'test'"):
        load("tfds", DataShape(32, 3, 10), split="tst", **options)
    with pytest.raises(ValueError, match="expected .64, 64, 3.: set data.image_size, or data.resize = True"):
        load("tfds", DataShape(64, 3, 10), split="test[:100]", **options)
    assert load("tfds", DataShape(16, 3), split="test[:100]", resize=True, **options)[0]["image"].shape == (16, 16, 3)


def test_tensorflow_datasets_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="has no 'mnst'; did you mean 'mnist'"):
        load("tfds", DataShape(32, 3, 10), dataset="mnst", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'cifar10' is not prepared in .*data.download = True"):
        load("tfds", DataShape(32, 3, 10), dataset="cifar10", data_dir=str(tmp_path))
