"""Cached latents: what is written is what is read, whoever writes it when; damage is named, never trained on."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest

from diffjax.data import latents, loader, sources
from diffjax.data.sources import DataShape

SHAPE = DataShape(4, 2)
LAYOUT = latents.Layout((4, 4, 4), text_width=6, pooled_width=3)
MADE_FOR = {"autoencoder": {"folder": "vae", "weights": "1"}}
NUM = 10
SIZES = [50 + 7 * i for i in range(NUM)]  # heights


def made(index: int, layout: latents.Layout = LAYOUT, label: bool = False) -> list[tuple[str, dict]]:
    """Both records of a picture: as it is, and mirrored."""
    random = np.random.default_rng(index)
    records = []
    for flip in (0, 1):
        record = {"moments": random.standard_normal(layout.moments), "height": SIZES[index], "width": 100.0}
        record |= {"top": 3.0 * index, "left": 1.5, "flip": flip}
        if label:
            record["label"] = index % 3
        else:
            record |= {"caption": f"picture nº {index}", "text": random.standard_normal((2 + index, layout.text_width))}
            record["pooled"] = random.standard_normal(layout.pooled_width)
        records.append((f"picture {index}", record))
    return records


def writing(folder, num: int = NUM, layout: latents.Layout = LAYOUT, label: bool = False, made_for=MADE_FOR, **options):
    """The iterator of `write`, four pictures a shard; its list `asked` has the shards that were computed."""
    asked = options.pop("asked", [])

    def records(first, last):
        asked.append(first)
        return (made(i, layout, label) for i in range(first, last))

    return latents.write(folder, made_for, layout, num, records, shard_images=4, **options)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
    """Twenty records in three shards."""
    assert list(writing(tmp_path / "cache"))[-1] == NUM
    return tmp_path / "cache"


@pytest.mark.fast
def test_records_are_read_as_they_were_written(folder):
    source = sources.load("latents", SHAPE, path=str(folder))
    assert len(source) == 2 * NUM
    longest = 2 + NUM - 1
    for number in range(2 * NUM):
        _, record = made(number // 2)[number % 2]
        item = source[number]
        assert set(item) == {"moments", *latents.METADATA, "aspect", "text", "text_length", "pooled"}
        n = len(record["text"])
        assert item["text"].shape == (longest, 6) and item["text_length"] == n and item["text_length"].dtype == np.int32
        expected = {name: record[name] for name in ("moments", "pooled")}
        expected["text"] = np.pad(record["text"], [(0, longest - n), (0, 0)])
        for name, array in expected.items():
            np.testing.assert_array_equal(item[name], array.astype(np.float16), err_msg=name)
        for name in latents.METADATA:
            assert item[name] == record[name] and item[name].dtype == np.float32
        assert item["aspect"] == np.float32(100) / np.float32(SIZES[number // 2]) and item["aspect"].dtype == np.float32
        assert source.caption(number) == f"picture nº {number // 2}"
    batch = sources.read(source, [7, 0, 19])
    np.testing.assert_array_equal(batch["moments"][2], source[19]["moments"])
    assert batch["moments"].dtype == np.float16 and batch["text_length"].tolist() == [5, 2, 11]
    there = pickle.loads(pickle.dumps(source))  # into a worker process
    np.testing.assert_array_equal(there[19]["moments"], source[19]["moments"])


def test_classes(tmp_path):
    layout = latents.Layout((4, 4, 4))
    list(writing(tmp_path, layout=layout, label=True))
    source = sources.load("latents", DataShape(4, 2, 3), path=str(tmp_path))
    assert [int(source[i]["label"]) for i in (0, 2, 4, 6)] == [0, 1, 2, 0] and source[0]["label"].dtype == np.int32
    assert set(sources.load("latents", SHAPE, path=str(tmp_path))[0]) == {"moments", *latents.METADATA, "aspect"}
    with pytest.raises(ValueError, match=r"record 4 of .*latents-00000.array_record has label 2, expected 0..1"):
        sources.load("latents", DataShape(4, 2, 2), path=str(tmp_path))


def test_sizes_are_those_of_the_specification():
    """ImageNet-1k with flips at 256 pixels: 42 GB; 11 million pictures at 256 and 512: 180 and 721 GB."""
    at_256, at_512 = latents.Layout((32, 32, 8)), latents.Layout((64, 64, 8))
    assert at_256.num_bytes() == 16 * 1024 + 28
    assert round(2 * 1_281_167 * at_256.num_bytes() / 1e9) == 42
    assert round(11e6 * at_256.num_bytes() / 1e9) in (180, 181) and round(11e6 * at_512.num_bytes() / 1e9) == 721
    # 77 tokens of CLIP: 118 kB, seven times the latents
    assert latents.Layout((32, 32, 8), 768).num_bytes(77) - at_256.num_bytes() == 118_272
    record = made(3)[0][1]
    assert len(latents.encode(LAYOUT, record, "a")) == LAYOUT.num_bytes(5, len("picture nº 3".encode()))


def test_the_loader_goes_on_where_it_was(folder):
    source = sources.load("latents", SHAPE, path=str(folder))
    batches = loader.make_batches(source, 6, seed=0)
    first = [next(batches) for _ in range(3)]
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    again = loader.make_batches(source, 6, seed=0)
    again.set_state(state)
    for want in expected:
        found = next(again)
        for name, value in want.items():
            np.testing.assert_array_equal(found[name], value)
    assert not np.array_equal(first[0]["moments"], expected[0]["moments"])


# Writing ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_preparation_ends_as_an_uninterrupted_one(folder, tmp_path):
    part = tmp_path / "part"
    asked = []
    for done in writing(part, asked=asked):
        if done == 6:
            break  # within the second shard
    assert asked == [0, 4] and not (part / latents.HEADER).exists()
    with pytest.raises(FileNotFoundError, match="unfinished latents: run the same command again"):
        sources.load("latents", SHAPE, path=str(part))
    assert list(writing(part, asked=asked))[-1] == NUM
    assert asked == [0, 4, 4, 8]  # the first shard is kept, the second made anew
    assert files(part) == files(folder)


def test_processes_together_write_what_one_writes(folder, tmp_path):
    """Shard i is that of process i mod n, and who finds all of them writes the header."""
    asked = [[], []]
    for process in (1, 0):
        done = list(writing(tmp_path / "two", asked=asked[process], process=process, num_processes=2))
        assert done[-1] == latents.own_images(NUM, process, 2, shard_images=4)
    assert asked == [[0, 8], [4]]
    assert files(tmp_path / "two") == files(folder)
    with pytest.raises(ValueError, match="found process 2 of 2"):
        next(writing(tmp_path / "other", process=2, num_processes=2))


def test_folders_of_others_are_refused(folder, tmp_path):
    with pytest.raises(FileExistsError, match="holds finished latents"):
        next(writing(folder))
    next(writing(tmp_path / "begun"))
    other = {"autoencoder": {"folder": "vae", "weights": "2"}}
    with pytest.raises(FileExistsError, match=r"unfinished latents of another run(.|\n)*'weights': '1'.*'weights': '2'"):
        next(writing(tmp_path / "begun", made_for=other))
    with pytest.raises(FileExistsError, match="num_images: made for 10, the run has 9"):
        next(writing(tmp_path / "begun", num=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": None}, r"picture 1 has no metadata \['top'\]"),
        ({"text": None}, "picture 1 has a caption and no tokens"),
        ({"moments": np.zeros((8, 8, 4))}, r"moments of picture 1: found shape .8, 8, 4., expected .4, .*one resolution"),
        ({"text": np.zeros((3, 5))}, r"text of picture 1: found shape \(3, 5\), expected \(3, 6\)"),
        ({"moments": np.full((4, 4, 4), 1e5)}, "moments of picture 1: not all finite in float16"),
        ({"caption": "x" * 2**16}, "the caption of picture 1 has 65536 bytes"),
    ],
)
def test_bad_records_are_not_written(changes, message):
    record = made(1)[0][1] | changes
    record = {name: value for name, value in record.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        latents.encode(LAYOUT, record, "picture 1")


# Reading what is damaged -----------------------------------------------------------------------------------------


def test_a_damaged_record_is_named(folder):
    """Its size is right: the file format's own checksum tells, when it is read."""
    spoil(folder / "latents-00001.array_record", 300)
    with pytest.raises(ValueError, match=r"record 0 of .*latents-00001.array_record cannot be read .*skip_corrupt = True"):
        sources.load("latents", SHAPE, path=str(folder))


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        (lambda path: spoil(path, 300), "another checksum"),
        (lambda path: spoil(path, 65_540), "another checksum"),  # in its table of records
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* written"),
        (lambda path: path.unlink(), "absent"),
    ],
)
def test_corrupt_shards_are_left_out_if_asked(folder, hurt, reason, capsys):
    whole = sources.load("latents", SHAPE, path=str(folder))
    hurt(folder / "latents-00001.array_record")
    with pytest.raises(ValueError, match=r"latents-00001.array_record"):
        sources.load("latents", SHAPE, path=str(folder))
    source = sources.load("latents", SHAPE, path=str(folder), skip_corrupt=True)
    said = capsys.readouterr().err
    assert re.search(reason, said) and "1 of 3 shards" in said and "8 of 20 records: latents-00001.array_record" in said
    assert len(source) == 12
    for found, expected in zip(range(12), [*range(8), *range(16, 20)], strict=True):
        np.testing.assert_array_equal(source[found]["moments"], whole[expected]["moments"])
        assert source.caption(found) == whole.caption(expected)


def test_nothing_but_corrupt_shards(folder):
    for path in folder.glob("*.array_record"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 3 shards in .* are corrupt: .*latents-00000.array_record .0 bytes"):
        sources.load("latents", SHAPE, path=str(folder))
    with pytest.raises(ValueError, match="every shard in .* is corrupt"):
        sources.load("latents", SHAPE, path=str(folder), skip_corrupt=True)


def test_other_resolutions_in_a_folder(folder, tmp_path):
    """A shard more, a shard of another folder with its line of the header, and another size in the config."""
    with pytest.raises(ValueError, match="latents of 4x4x2, found data.image_size=8 and data.channels=2: set 4 and 2"):
        sources.load("latents", DataShape(8, 2), path=str(folder))
    wide = tmp_path / "wide"
    list(writing(wide, layout=LAYOUT._replace(moments=(8, 8, 4))))
    shutil.copy(wide / "latents-00000.array_record", folder / "latents-00003.array_record")
    with pytest.raises(ValueError, match=r"latents-00003.array_record'\], which latents.json does not name"):
        sources.load("latents", SHAPE, path=str(folder))
    (folder / "latents-00003.array_record").rename(folder / "latents-00000.array_record")
    header, other = (json.loads((path / latents.HEADER).read_text()) for path in (folder, wide))
    header["shards"][0] = other["shards"][0]
    (folder / latents.HEADER).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"record 0 of .*latents-00000.array_record has \d+ bytes, .*one resolution"):
        sources.load("latents", SHAPE, path=str(folder))


def test_headers_that_do_not_fit(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.load("latents", SHAPE, path=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no latents.json: make it with diffjax.cli.prepare --kind=latents"):
        sources.load("latents", SHAPE, path=str(tmp_path))
    with pytest.raises(ValueError, match="has 0 labels for 20 records: set data.num_classes = 0"):
        sources.load("latents", DataShape(4, 2, 3), path=str(folder))
    header = json.loads((folder / latents.HEADER).read_text())
    for changes, message in [
        ({"version": 2}, "has version 2, expected 1"),
        ({"text_width": 0}, "has captions without tokens"),
    ]:
        (folder / latents.HEADER).write_text(json.dumps(header | changes))
        with pytest.raises(ValueError, match=message):
            sources.load("latents", SHAPE, path=str(folder))
