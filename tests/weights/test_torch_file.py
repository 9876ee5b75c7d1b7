"""PyTorch files without PyTorch: what torch.save wrote comes back, and nothing that a file names is executed."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from diffjax.weights import torch_file

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MACHINE = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def rebuilt(
    size: bytes = b"K\x02K\x02", stride: bytes = b"K\x02K\x01", offset: bytes = b"K\x00", view: bytes = b"N",
    function: str = "_rebuild_tensor",
) -> bytes:  # fmt: skip
    """Pickle operations of a tensor in the storage "7" of 4 float32 numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("7") + text("cpu") + b"K\x04" + view + b"tQ"
    return f"ctorch._utils\n{function}\n".encode() + b"(" + storage + offset + b"(" + size + b"t(" + stride + b"ttR"


def dict_of(value: bytes) -> bytes:
    """A pickle of {"w": value}."""
    return b"\x80\x02}" + text("w") + value + b"s."


def stream(description: bytes, numbers=(0.0, 1.0, 2.0, 3.0), keys=("7",)) -> bytes:
    """The format before the zip files."""
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, MACHINE))
    tail = struct.pack("<q", len(numbers)) + np.asarray(numbers, "<f4").tobytes()
    return head + description + pickle.dumps(list(keys), 2) + (tail if keys else b"")


def archive(description: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """The zip format."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        content = {"data.pkl": description, "data/7": np.arange(4, dtype="<f4").tobytes()} | members
        for name, value in content.items():
            opened.writestr(f"a/{name}", value)
    return file.getvalue()


def load(tmp_path, content: bytes):
    (tmp_path / "file.pth").write_bytes(content)
    return torch_file.load(tmp_path / "file.pth")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


# What torch.save writes -----------------------------------------------------------------------------------------------


def saved(torch, module) -> dict:
    """One of everything: types, views, a shared storage, no axes, no numbers, a parameter, numbers, nesting."""
    base = torch.arange(24, dtype=torch.float32)
    names = ("float32", "float16", "float64", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: torch.tensor([[0, 1, 3], [2, 0, 1]]).to(getattr(torch, name)) for name in names}
    views = {"t": base.reshape(4, 6).T, "slice": base[5:9], "strided": base[1::2], "expanded": base[:1].expand(4)}
    other = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base.clone())}
    plain = {"epoch": 3, "note": "é", "lr": [0.1, (1, None)]}
    return {"state_dict": module.state_dict(), **tensors, **views, **other, **plain}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_equals_what_torch_saved(tmp_path, torch, zipped, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    expected, path = saved(torch, module), tmp_path / "file.pth"
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = torch_file.load(path)

    def compare(want, have):
        if isinstance(want, dict):
            assert type(have) is dict and list(have) == list(want)
            for key, value in want.items():
                compare(value, have[key])
        elif isinstance(want, torch.Tensor):
            assert str(have.dtype) == str(want.dtype).removeprefix("torch.") and not have.flags.writeable
            np.testing.assert_array_equal(np.asarray(have, np.float64), want.detach().double().numpy())
        else:
            assert have == want

    compare(expected, found)


@pytest.mark.fast
@pytest.mark.parametrize("container", [stream, archive])
def test_reads_a_file_written_by_hand(tmp_path, container):
    found = load(tmp_path, container(dict_of(rebuilt())))
    np.testing.assert_array_equal(found["w"], [[0, 1], [2, 3]])


def test_reads_parameters_of_torch_before_0_4(tmp_path, torch):
    """Parameter(tensor) by NEWOBJ, then its state (gradient wanted, volatile, hooks): as in vgg16-397923af.pth."""
    state = b"(\x88\x89ccollections\nOrderedDict\n)Rtb"
    content = stream(dict_of(b"ctorch.nn.parameter\nParameter\n" + rebuilt() + b"\x85\x81" + state))
    found = load(tmp_path, content)["w"]
    np.testing.assert_array_equal(found, torch.load(tmp_path / "file.pth", weights_only=True)["w"].detach().numpy())


def test_reads_views_of_a_storage(tmp_path, torch):
    view = b"(" + text("8") + b"K\x01K\x03t"
    found = load(tmp_path, stream(dict_of(rebuilt(size=b"K\x03", stride=b"K\x01", view=view))))["w"]
    np.testing.assert_array_equal(found, [1, 2, 3])
    np.testing.assert_array_equal(found, torch.load(tmp_path / "file.pth", weights_only=True)["w"].numpy())


def test_reads_safetensors(tmp_path, torch):
    reason = "safetensors is not installed: pip install 'diffjax[weights]'"
    save = pytest.importorskip("safetensors.torch", reason=reason)
    expected = {"a": torch.arange(6.0).reshape(2, 3).bfloat16(), "b": torch.ones(2, dtype=torch.int64)}
    save.save_file(expected, tmp_path / "file.safetensors")
    found = torch_file.load(tmp_path / "file.safetensors")
    assert {name: str(array.dtype) for name, array in found.items()} == {"a": "bfloat16", "b": "int64"}
    np.testing.assert_array_equal(found["a"].astype(np.float32), expected["a"].float().numpy())
    content = (tmp_path / "file.safetensors").read_bytes()
    with pytest.raises(ValueError, match="file.pth: damaged .*download it again"):
        load(tmp_path, content[:-1])


def test_safetensors_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'diffjax\[weights\]'"):
        load(tmp_path, struct.pack("<Q", 2) + b"{}")


def test_torch_is_not_imported(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(archive(dict_of(rebuilt())))
    code = (
        f"import sys\nfrom diffjax.weights import torch_file\nprint(torch_file.load({str(path)!r})['w'].sum())\n"
        "print([name for name in ('torch', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["6.0", "[]"], done.stderr


# Nothing is executed --------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("protocol", [2, 4])  # the global in one operation, or taken from the stack
@pytest.mark.parametrize("place", ["zip", "stream", "first"])
def test_a_call_in_a_file_is_refused(tmp_path, place, protocol):
    trace = tmp_path / "executed"
    bomb = pickle.dumps(OrderedDict(w=Call(os.mkdir, str(trace))), protocol)
    content = {"zip": archive(bomb), "stream": stream(bomb, keys=()), "first": bomb}[place]
    with pytest.raises(ValueError, match=rf"file.pth: refused: it names {os.mkdir.__module__}.mkdir.*executed"):
        load(tmp_path, content)
    assert not trace.exists()
    pickle.loads(bomb)  # the bomb is a live one
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "torch load", "torch.storage _load_from_bytes", "torch nn.Module"]
)
def test_other_globals_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match="refused: it names " + name.replace(" ", ".")):
        load(tmp_path, archive(dict_of(f"c{name.replace(' ', chr(10))}\n".encode())))


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (b"\x82\x01", r"found opcode .*x82.*, which no weights need"),  # EXT1
        (b"\x96" + struct.pack("<Q", 2**40), r"found opcode .*x96"),  # BYTEARRAY8
        (b"(itimeit\ntimeit\n", "found opcode b'i'"),  # INST
        (b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("_call") + b"Nsb", "sets attributes on a Function"),
        (b"ctorch.nn.parameter\nParameter\nN}" + text("__new__") + b"Ns\x86b", "sets attributes on a Function"),
        (b"ctorch.nn.parameter\nParameter\nN\x85\x81b", "sets attributes on a str"),
    ],
)
def test_operations_that_no_weights_need_are_refused(tmp_path, operations, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, archive(dict_of(operations)))


@pytest.mark.parametrize(
    ("operations", "found"),
    [
        (b"ctorch\nFloatStorage\n", "FloatStorage"),  # stands for its name
        (b"Nr" + struct.pack("<I", 2**31), None),  # stored under an index for which C's pickle takes 16 GiB
        (b"U\x02\xc3\xa9T\x01\x00\x00\x00n\x86", ("é", "n")),  # texts of Python 2
    ],
)
def test_harmless_operations_take_no_memory(tmp_path, operations, found):
    tracemalloc.start()
    try:
        assert load(tmp_path, archive(dict_of(operations))) == {"w": found}
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_content_of_a_dict_is_not_copied_again_and_again(tmp_path):
    """Python 2 passed it in the call; here one list is passed a thousand times."""
    items = pickle.dumps([[f"n{i}", i] for i in range(3000)], 2)[2:-1]
    again = b"ccollections\nOrderedDict\n(h\xfftR"
    content = archive(dict_of(b"](" + items + b"q\xff" + again * 1000 + b"e"))
    tracemalloc.start()
    try:
        found = load(tmp_path, content)["w"]
        assert tracemalloc.get_traced_memory()[1] < 40 * len(content)
    finally:
        tracemalloc.stop()
    assert found[0] == [] and found[1]["n2999"] == 2999 and not any(found[2:])


# Damaged files, other files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [stream, archive])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            rebuilt(size=b"J\xff\xff\xff\x7fK\x02", stride=b"K\x00K\x00"),
            r"size \(2147483647, 2\), stride \(0, 0\) in a storage of 4",
        ),
        (rebuilt(stride=b"K\x03K\x01"), r"stride \(3, 1\) ends behind its storage of 4 numbers"),
        (rebuilt(offset=b"K\x01"), "ends behind"),
        (rebuilt(offset=b"J\xff\xff\xff\xff"), "found a tensor of size"),
        (rebuilt(stride=b"K\x01"), "found a tensor of size"),
        (rebuilt(size=b"K\x02G@\x00\x00\x00\x00\x00\x00\x00"), "size in whole numbers"),
        (rebuilt(view=b"(" + text("8") + b"K\x02K\x03t"), "'?3'? from '?2'? are used"),
        (b"ctorch._utils\n_rebuild_tensor\n(NK\x00(K\x01t(K\x01ttR", "without a storage"),
        (rebuilt() + b"s" + text("v") + rebuilt().replace(b"FloatStorage", b"HalfStorage"), "two descriptions"),
        (b"ctorch._utils\n_rebuild_parameter\n(tR", "damaged"),
        (b"}(K\x01K\x02tK\x03s", "found a key of type tuple"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path, container, tensor, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, container(dict_of(tensor), **({} if container is archive or b"Q" in tensor else {"keys": ()})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found another kind of file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "found another kind of file"),
        (b"<!DOCTYPE html><html>not found</html>", "found another kind of file"),
        (pickle.dumps({"w": 1}), "found another format than torch's .*; give a state dict as torch.save"),
        (stream(pickle.dumps([1.0], 2), keys=()), "found a list, expected a dict of tensors"),
        (stream(dict_of(rebuilt()), keys=()), "found 0 storages, expected the 1"),
        (stream(dict_of(rebuilt()), keys=("7", "7")), "found 2 storages"),
        (stream(dict_of(rebuilt()), numbers=(1.0,)), "found a storage with 1 float32 numbers, expected 4"),
        (archive(dict_of(rebuilt()), **{"data/7": bytes(12)}), "storage 7 has 12 bytes, expected 4 float32"),
        (archive(dict_of(rebuilt()), zipfile.ZIP_DEFLATED), "compressed or larger than itself"),
        (archive(dict_of(rebuilt()), byteorder=b"big"), "byte order b'big'"),
        (archive(dict_of(rebuilt()), **{"constants.pkl": b""}), "TorchScript archive"),
        (archive(b"", **{"b/data.pkl": b""}), "found a zip file of"),
        (archive(pickle.dumps({"w": b"bytes"}, 2)), "names _codecs.encode"),
    ],
)
def test_other_files_say_what_they_are(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, content)
    assert "file.pth" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        torch_file.load(tmp_path / "absent.pth")


@pytest.mark.parametrize("container", [stream, archive])
def test_every_truncation_is_an_error(tmp_path, container):
    content = container(dict_of(rebuilt()))
    for length in range(0, len(content), 3):
        with pytest.raises(ValueError, match="file.pth"):
            load(tmp_path, content[:length])


@pytest.mark.parametrize("container", [stream, archive])
def test_flipped_bytes_never_raise_anything_else(tmp_path, container):
    content, random, refused = container(dict_of(rebuilt())), np.random.default_rng(0), 0
    for _ in range(400):
        changed = bytearray(content)
        for place in random.integers(0, len(content), size=2):
            changed[place] ^= int(random.integers(1, 256))
        try:
            load(tmp_path, bytes(changed))
        except ValueError:
            refused += 1
    assert 50 < refused < 400  # some flips hit numbers or names, and are a file as good as any
