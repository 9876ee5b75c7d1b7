"""Files of arrays: bytes, headers, and files that are damaged, hostile or something else."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from diffjax.metrics import array_files

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "n": np.asarray(3),
    "text": np.asarray('{"ä": 1}'),
    "none": np.zeros((0, 2)),
}


@pytest.mark.fast
def test_arrays_come_back_and_files_are_the_same_each_time(tmp_path):
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    array_files.write(first, ARRAYS)
    array_files.write(second, ARRAYS)
    found = array_files.read(first)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert array_files.shapes(first) == {"a": (2, 3), "n": (), "text": (), "none": (0, 2)}
    assert list(array_files.read(first, ["n"])) == ["n"]
    assert array_files.sha256(first) == array_files.sha256(second) and len(array_files.sha256(first)) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_what_others_write_is_read(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.asfortranarray(ARRAYS["a"]))
    np.testing.assert_array_equal(array_files.read(tmp_path / "a.npz")["a"], ARRAYS["a"])


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("something of the file was executed",))


def test_python_objects_are_refused_and_never_executed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(2), b=np.asarray([Harmful()], object))
    for call in (array_files.read, array_files.shapes):
        with pytest.raises(ValueError, match="a.npz holds Python objects in b, which are not read"):
            call(path)
    np.testing.assert_array_equal(array_files.read(path, ["a"])["a"], np.zeros(2))
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        array_files.read(path)


def test_files_that_are_damaged_or_lie_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        array_files.read(path)
    array_files.write(path, ARRAYS)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="a.npz has no b, c: found a, n, text, none"):
        array_files.read(path, ["a", "b", "c"])
    at = whole.index(np.float64(4.0).tobytes())
    for broken in (b"", whole[:-30], whole[:at] + b"\x01" + whole[at + 1 :]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="a.npz is damaged or no .npz file"):
            array_files.read(path)
    # a header that asks for 8 TB
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", header.getvalue() + b"\0" * 80)
    with pytest.raises(ValueError, match=r"damaged or no .npz file .*a is float64 \(1000000, 1000000\)"):
        array_files.read(path)
