"""Files like the pickles of NVlabs/edm, written by PyTorch with classes made on the fly under the released names.

The source text in them would create a marker file if it ever ran.
"""

import pickle
import sys
import types

import numpy as np
import pytest


class Released:
    """Writer of files: modules pickle themselves as those of the released code do."""

    def __init__(self, marker, monkeypatch):
        self.torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")
        self.source = f"open({str(marker)!r}, 'w').close()\n"
        persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

        def _reconstruct_persistent_obj(meta):
            raise AssertionError("the released function was called")

        for module, value in (
            (persistence, _reconstruct_persistent_obj),
            (dnnlib, type("EasyDict", (dict,), {"__module__": "dnnlib.util"})),
        ):
            value.__module__, value.__qualname__ = module.__name__, value.__name__
            setattr(module, value.__name__, value)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setitem(sys.modules, module.__name__.split(".")[0], types.ModuleType("package"))
        self.reconstruct, self.easy_dict = _reconstruct_persistent_obj, dnnlib.EasyDict
        self.version = 6

    def module(self, name: str):
        def reduce(this, *_):
            meta = {"type": "class", "version": self.version, "module_src": self.source, "class_name": name}
            return self.reconstruct, (meta | {"state": dict(this.__dict__)},), None

        module = type(name, (self.torch.nn.Module,), {"__reduce_ex__": reduce})()
        # as UNetBlock.skip_scale, so that numpy's numbers occur
        module.skip_scale, module._init_args, module._init_kwargs = np.sqrt(0.5), (), {"init_weight": np.sqrt(0.2)}
        return module

    def network(self, weights: dict[str, np.ndarray], options, kind="EDMPrecond", **attributes):
        root = self.module(kind)
        root._init_kwargs = self.easy_dict(options)
        for name, value in attributes.items():
            setattr(root, name, value)
        for name, array in weights.items():
            *parents, leaf = name.split(".")
            node = root
            for depth, parent in enumerate(parents):
                if parent not in node._modules:
                    container = parent in ("enc", "dec") and depth == 1
                    node.add_module(parent, self.torch.nn.ModuleDict() if container else self.module("Layer"))
                node = node._modules[parent]
            if leaf in ("weight", "bias"):
                node.register_parameter(leaf, self.torch.nn.Parameter(self.torch.tensor(array), requires_grad=False))
            else:
                node.register_buffer(leaf, self.torch.tensor(array))
            node.register_parameter("absent", None)
        return root

    def write(self, path, root, protocol=4):
        path.write_bytes(pickle.dumps({"ema": root, "loss_fn": self.module("EDMLoss")}, protocol=protocol))
        return path


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist after the test."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "something in the file was executed"


@pytest.fixture
def released(marker, monkeypatch):
    return Released(marker, monkeypatch)
