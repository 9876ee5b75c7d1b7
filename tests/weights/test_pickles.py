"""Pickles made to do harm: nothing that they name is called, and none takes more memory than its own size.

Whatever would run leaves a marker file (see conftest.py), and a test fails where it finds one. They are read as
networks of EDM, and as files of torch.save.
"""

import builtins
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest

from diffjax.weights import edm_pickle, pickles, torch_file

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")

HEADER = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001))
GLOBALS = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
    ("diffjax.weights.pickles", "storage"), ("a" * 2000, "b"), ("a\x1b[2J", "b"),
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pkl"


class Calls:
    """Pickles itself as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def evil(module: str, name: str, marker) -> bytes:
    """A pickle that calls module.name with a text that would leave the marker."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(code(name, marker)) + b"\x85R."


def code(name, marker) -> str:
    return f"open({str(marker)!r}, 'w')" if name == "eval" else f"touch {marker}"


def refused(path, content: bytes, message: str, read=edm_pickle.read) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(("module", "name"), GLOBALS)
@pytest.mark.parametrize("place", ["file", "storage", "later in the storage"])
def test_other_globals_are_refused_by_name(path, marker, module, name, place):
    content = evil(module, name, marker)
    if place != "file":
        content = (HEADER if place.startswith("later") else b"") + content
        content = pickle.dumps({"ema": Calls(torch.storage._load_from_bytes, content)})
    shown = {"a" * 2000: r"a{100}\.\.\.", "a\x1b[2J": r"a\\x1b\[2J\.b"}.get(module, rf"{module}\.{name}")
    refused(path, content, rf"it names {shown}, .*nothing of it was executed")


@pytest.mark.fast
def test_the_oldest_form_of_a_global_is_refused(path, marker):
    refused(path, f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(), r"it names os\.system")
    refused(path, f"(S'touch {marker}'\nios\nsystem\n.".encode(), "damaged or no network pickle")


@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, builtins.__import__])
def test_a_call_deep_inside_a_file_is_refused(path, marker, function):
    deep = [{"a": (Calls(function, code(function.__name__, marker)), 1)}]
    refused(path, pickle.dumps({"loss_fn": deep, "ema": None}), rf"it names (posix|nt|builtins)\.{function.__name__}")


@pytest.mark.parametrize("state", [{"_call": "x"}, (None, {"_call": "x"}), {"__class__": "x"}])
def test_functions_classes_and_dicts_take_no_state(path, state):
    for module, name in (
        ("torch._utils", "_rebuild_parameter"), ("torch.nn.modules.container", "ModuleDict"),
        ("collections", "OrderedDict"),
    ):  # fmt: skip
        named = b"\x80\x04" + text(module) + text(name) + b"\x93"
        build = pickle.dumps(state, protocol=2)[2:-1] + b"b."
        refused(path, named + build, "refused: it sets attributes on a Function, which no weights need")
    refused(path, b"\x80\x04}" + build, "sets attributes on a dict")
    assert pickles.Function(len)([1]) == 1


def test_what_is_no_builder_is_not_called(path):
    for callee, kind in ((text("os"), "str"), (b"}", "dict"), (b"N", "NoneType")):
        refused(path, b"\x80\x04" + callee + b")R.", f"it calls a {kind}, which")
        refused(path, b"\x80\x04" + callee + b")\x81.", f"it calls a {kind}, which")


def typed_storage(tensor):
    return torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=torch.float32, _internal=True)


@pytest.mark.parametrize("size", [(5,), (2, 3), (1 << 40,), (-1,), (1.0,), ("a",)])
def test_a_tensor_beyond_its_storage_is_refused(path, size):
    storage = typed_storage(torch.zeros(4))
    root = Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, (0,) * len(size), False, {})
    refused(path, pickle.dumps({"ema": root}), "found a tensor ")
    root = Calls(torch._utils._rebuild_tensor_v2, storage, 1, (2, 2), (2, 1), False, {})
    refused(path, pickle.dumps({"ema": root}), r"a tensor of size \(2, 2\), stride \(2, 1\) ends behind its storage")


BOMBS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 28) + b"a",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 28) + b"a",
    "short bytes": b"\x80\x04B" + struct.pack("<I", (1 << 32) - 1) + b"a",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 28) + b"a",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b"a",
    "memo": b"\x80\x04Nr" + struct.pack("<I", (1 << 32) - 1) + b".",
    "laughs": b"\x80\x04]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(200)) + b".",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", ["file", "storage", "zip of torch.save", "stream of torch.save"])
def test_no_more_memory_than_the_file_is_taken(path, bomb, place):
    content = BOMBS[bomb]
    if place == "storage":
        content = pickle.dumps({"ema": Calls(torch.storage._load_from_bytes, content)})
    elif place.startswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", content)
        content = path.read_bytes()
    elif place.startswith("stream"):
        content = HEADER + content
    tracemalloc.start()
    try:
        refused(path, content, "model.pkl", torch_file.load if "torch" in place else edm_pickle.read)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_storage_that_says_another_size_is_refused():
    storage = typed_storage(torch.arange(8.0))
    (content,) = storage.__reduce__()[1]
    assert pickles.storage(content).tolist() == list(range(8))
    count = struct.pack("<q", 8)
    for other, message in (
        (content.replace(count, struct.pack("<q", 7)), "7 float32 numbers, expected 8"),
        (content + bytes(4), "found a Storage and 4 bytes more, expected one storage"),
    ):
        with pytest.raises(pickles.RefusedError, match=message):
            pickles.storage(other)
    for size in (20, len(content) - 4):
        with pytest.raises(EOFError, match="too early"):
            pickles.storage(content[:size])
    with pytest.raises(pickles.RefusedError, match="found another format than torch's"):
        pickles.storage(content.replace(struct.pack("<H", 1001), struct.pack("<H", 1002), 1))
