"""Tars as webdataset names them: every sample where it is, nothing unpacked, damage named."""

import io
import json
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest

from diffjax.data import sources, webdataset
from diffjax.data.sources import DataShape, load

SHAPE = DataShape(6, 3)


def pixels(index: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (height, width, 3)).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files: dict[str, bytes], **options) -> None:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def sample(index: int, **facts) -> dict[str, bytes]:
    facts = {"width": 6, "height": 6, "caption": f"picture {index}"} | facts
    parts = {"png": png(pixels(index)), "json": json.dumps(facts).encode(), "cls": b"1\n"}
    return {f"{index:05d}.{part}": data for part, data in parts.items()}


@pytest.fixture
def folder(tmp_path):
    """Five pictures in two tars, the second in folders with long names, and files that belong to none."""
    write_tar(tmp_path / "00000.tar", {**sample(0), **sample(1), "notes.md": b"none", "00001.txt": b" another text\n"})
    long = "a" * 60 + "/" + "b" * 90
    files = {f"{long}/{name}": data for index in (2, 3, 4) for name, data in sample(index).items()}
    write_tar(tmp_path / "00001.tar", files, format=tarfile.GNU_FORMAT)
    return tmp_path


@pytest.mark.fast
def test_samples_are_found_at_any_place(folder):
    source = load("webdataset", DataShape(6, 3, 2), path=str(folder))
    assert len(source) == 5
    for source in (source, pickle.loads(pickle.dumps(source))):  # into a worker process
        for index in (4, 0, 3, 1, 2):
            np.testing.assert_array_equal(source[index]["image"], pixels(index))
            assert source[index]["label"] == 1 and source[index]["label"].dtype == np.int32
    batch = sources.read(load("webdataset", SHAPE, path=str(folder)), [3, 0])
    np.testing.assert_array_equal(batch["image"], [pixels(3), pixels(0)])
    one = load("webdataset", SHAPE, path=str(folder / "00001.tar"))
    assert len(one) == 3 and one[0].keys() == {"image"}


def test_the_index_is_kept_beside_the_tar(folder, monkeypatch):
    """Read in the place of the tar's headers; made again for a tar that changed, and for a damaged index."""
    read, whole = [], webdataset._members
    monkeypatch.setattr(webdataset, "_members", lambda path: (read.append(path.name), whole(path))[1])

    def images():
        read.clear()
        source = load("webdataset", SHAPE, path=str(folder))
        return [source[i]["image"] for i in range(len(source))], list(read)

    first, both = images()
    assert both == ["00000.tar", "00001.tar"] and {path.name for path in folder.glob(".*")} == {
        ".00000.tar.index.npz", ".00001.tar.index.npz"
    }  # fmt: skip
    again, none = images()
    assert none == [] and all(np.array_equal(*pair) for pair in zip(again, first, strict=True))
    write_tar(folder / "00000.tar", {**sample(7), **sample(8)})
    changed, one = images()
    assert one == ["00000.tar"] and np.array_equal(changed[0], pixels(7)) and len(changed) == 5
    (folder / ".00001.tar.index.npz").write_bytes(b"PK damaged")
    assert images()[1] == ["00001.tar"]
    monkeypatch.setattr(webdataset.np, "savez", lambda *args, **arrays: (_ for _ in ()).throw(PermissionError))
    (folder / ".00001.tar.index.npz").unlink()
    assert images()[1] == ["00001.tar"] and images()[1] == ["00001.tar"]  # a folder that cannot be written to
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def test_captions_of_text_files_go_before_those_of_json(folder):
    source = load("webdataset", SHAPE, path=str(folder), captions=True)
    expected = ["picture 0", "another text", "picture 2", "picture 3", "picture 4"]
    assert [str(source[i]["caption"]) for i in range(5)] == expected
    assert source[0].keys() == {"image", "caption"}
    assert sources.read(source, [0, 1])["caption"].tolist() == ["picture 0", "another text"]


def test_the_size_of_the_original_is_that_of_the_json(tmp_path):
    """The tar holds a smaller copy; the crop is told in the copy, the size in the original."""
    files = {**sample(0, width=300, height=200), "00000.png": png(pixels(0, 8, 12)), "00001.png": png(pixels(1, 12, 6))}
    write_tar(tmp_path / "a.tar", files)
    source = load("webdataset", SHAPE, path=str(tmp_path), resize=True, metadata=True)
    names = ("height", "width", "top", "left", "flip", "aspect")
    # the shorter side 8 becomes 6: (12 - 8) / 2 pixels of the copy are 1.5 of the scaled one
    assert [float(source[0][name]) for name in names] == [200, 300, 0, 1.5, 0, 1.5]
    assert [float(source[1][name]) for name in names] == [12, 6, 3, 0, 0, 0.5]  # no .json: its own
    assert all(source[0][name].dtype == np.float32 for name in names)
    plain = load("webdataset", SHAPE, path=str(tmp_path), resize=True)
    np.testing.assert_array_equal(source[0]["image"], plain[0]["image"])
    whole = load("webdataset", DataShape(0, 3), path=str(tmp_path))[0]
    assert whole["image"].shape == (8, 12, 3) and whole["height"] == 200
    with pytest.raises(ValueError, match="set data.resize = True"):
        load("webdataset", SHAPE, path=str(tmp_path), metadata=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"00000.png": b"no picture"}, r"unreadable picture .*a.tar/00000.png"),
        ({"00000.json": b"{"}, r"the .json beside .*a.tar/00000.png is damaged"),
        ({"00000.json": b"[]"}, "holds a list, expected names and values"),
        ({"00000.json": b'{"width": 6, "caption": "a"}'}, "tells {'width': 6} of the original"),
        ({"00000.json": b'{"width": 6, "height": 0, "caption": "a"}'}, "expected height and width in pixels"),
        ({"00000.json": b'{"width": 6, "height": 6}'}, "00000.png has no caption"),
        ({"00000.json": b'{"caption": 3}'}, "00000.png has no caption"),
        ({"00000.txt": b"  "}, "00000.png has no caption"),
        ({"00000.txt": b"\xff\xfe"}, "the .txt beside .*00000.png is not UTF-8"),
        ({"00000.jpg": b""}, "a.tar has 00000.png and 00000.jpg for one sample"),
    ],
)
def test_bad_samples_are_named(tmp_path, changes, message):
    write_tar(tmp_path / "a.tar", sample(0) | changes)
    with pytest.raises(ValueError, match=message):
        load("webdataset", SHAPE, path=str(tmp_path), captions=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"00000.cls": b"cat"}, "00000.png has the class b'cat', expected a whole number"),
        ({"00000.cls": b"2"}, "00000.png has labels 2..2, expected 0..1"),
    ],
)
def test_bad_classes_are_named(tmp_path, changes, message):
    write_tar(tmp_path / "a.tar", sample(0) | changes)
    with pytest.raises(ValueError, match=message):
        load("webdataset", DataShape(6, 3, 2), path=str(tmp_path))


def test_bad_tars_are_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*.tar in"):
        load("webdataset", SHAPE, path=str(empty))
    write_tar(empty / "a.tar", {"notes.md": b"none"})
    with pytest.raises(ValueError, match="no picture in .*a.tar"):
        load("webdataset", SHAPE, path=str(empty))
    whole = (folder / "00000.tar").read_bytes()
    first = sample(0)["00000.png"]
    for cut in (512 + len(first) // 2, 512 + 512 * -(-len(first) // 512) + 100):  # within a picture, within a header
        (empty / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.tar"):
            load("webdataset", SHAPE, path=str(empty))
    with tarfile.open(empty / "a.tar", "w:gz") as archive:
        archive.add(folder / "00000.tar", "00000.png")
    with pytest.raises(ValueError, match="a.tar is no whole tar without compression"):
        load("webdataset", SHAPE, path=str(empty))


def test_links_and_pickles_are_not_followed(tmp_path):
    """What would lead out of the tar, or run, is not looked at."""
    write_tar(tmp_path / "a.tar", {**sample(0), "00000.pkl": pickle.dumps(print), "00000.pyd": b"x"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        link = tarfile.TarInfo("00001.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    files = webdataset.TarFiles(tmp_path, 3)
    assert len(files) == 1 and files.name(0).endswith("a.tar/00000.png")
