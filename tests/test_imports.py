"""Who may import whom, read from the source: layers, cycles, optional packages at top level."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> packages it may import besides itself; build and cli stand above all
ALLOWED = {
    "core": set(),
    "assign": {"core"},
    "nn": {"core"},
    "models": {"core", "nn"},
    "sampling": {"core"},
    "methods": {"core", "assign", "sampling"},
    "metrics": {"core", "nn"},
    "weights": {"core"},
    "runtime": {"core"},
    "data": {"core", "runtime"},
    "train": {"core", "runtime", "data"},
    "video": {"core", "nn", "models", "sampling"},
}
EVERYTHING = set(ALLOWED)
ALLOWED["build"] = EVERYTHING
ALLOWED["cli"] = EVERYTHING | {"build"}

# installed by an extra, or slow and seldom needed: imported by the function that uses it
LAZY = {
    "array_record", "av", "diffrax", "imageio", "lap", "lpips", "matplotlib", "safetensors", "sentencepiece", "sklearn",
    "tensorboardX", "tensorflow", "tensorflow_datasets", "tokenizers", "torch", "torchvision", "transformers", "wandb",
}  # fmt: skip
ONLY_IN_FUNCTIONS = {"cli": {"jax", "flax", "optax", "orbax", "grain"}}  # so that --help is immediate


def imports(source: str, module: str) -> list[tuple[str, bool]]:
    """(imported module, whether at top level) of every import; blocks of TYPE_CHECKING do not count."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:  # relative: from . import x
                    base = ".".join(filter(None, [*module.split(".")[: -child.level], base]))
                found.extend((f"{base}.{alias.name}", top) for alias in child.names)
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), True)
    return found


def part(module: str) -> str:
    """'diffjax.core.rng' -> 'core'; '' for anything outside the package and for diffjax itself."""
    names = module.split(".")
    return names[1] if names[0] == "diffjax" and len(names) > 1 else ""


def violations(files: dict[str, str]) -> list[str]:
    """Every broken rule among `files`, module name -> source."""
    found, edges = [], {module: set() for module in files}
    for module, source in files.items():
        own = part(module)
        for imported, top in imports(source, module):
            other, package = part(imported), imported.partition(".")[0]
            if own and other and other != own and other not in ALLOWED.get(own, set()):
                found.append(f"{module} imports {imported}: {own} may import {sorted(ALLOWED.get(own, ())) or 'nothing'}")
            if top and (package in LAZY or package in ONLY_IN_FUNCTIONS.get(own, ())):
                found.append(f"{module} imports {package} at top level: move it into the function that needs it")
            target = imported if imported in files else imported.rpartition(".")[0]
            if target in files and top and target != module and target != "diffjax":
                edges[module].add(target)
        if own and own not in ALLOWED:
            found.append(f"{module}: the package {own} has no rule here")
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> Iterable[list[str]]:
    """A path through each import cycle that a depth-first search meets."""
    done = set()

    def search(module: str, path: list[str]) -> Iterable[list[str]]:
        if module in path:
            yield [*path[path.index(module) :], module]
            return
        if module in done:
            return
        for target in sorted(edges[module]):
            yield from search(target, [*path, module])
        done.add(module)

    for module in sorted(edges):
        yield from search(module, [])


def package_files() -> dict[str, str]:
    """Module name -> source of the whole package."""
    files = {}
    for path in sorted((ROOT / "diffjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return files


@pytest.mark.fast
def test_the_package_keeps_the_import_rules():
    files = package_files()
    assert len(files) > 40
    assert violations(files) == []


def test_package_folders_hold_a_docstring_and_nothing_else():
    """But build, whose names are what users import."""
    for path in set((ROOT / "diffjax").glob("*/__init__.py")) - {ROOT / "diffjax" / "build" / "__init__.py"}:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_configs_import_nothing_but_ml_collections_and_one_table():
    for path in (ROOT / "configs").rglob("*.py"):
        found = {name for name, _ in imports(path.read_text(encoding="utf-8"), "configs")}
        assert found <= {"ml_collections.ConfigDict", "diffjax.core.paradigms"}, path
    source = (ROOT / "diffjax" / "core" / "paradigms.py").read_text(encoding="utf-8")
    assert {name for name, _ in imports(source, "diffjax.core.paradigms")} == {"typing.Any", "diffjax.core.names"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"diffjax.core.a": "from diffjax.nn import layers"}, "core may import nothing"),
        ({"diffjax.methods.a": "def f():\n    import diffjax.models.toy"}, "methods may import"),
        ({"diffjax.train.a": "from diffjax.methods import sfd"}, "train may import"),
        ({"diffjax.methods.a": "from ..models import toy"}, "diffjax.models.toy"),
        ({"diffjax.sampling.a": "from diffjax import build"}, "sampling imports diffjax.build|imports diffjax.build"),
        ({"diffjax.core.a": "import torch"}, "torch at top level"),
        ({"diffjax.data.a": "try:\n    import tensorflow_datasets as t\nexcept ImportError:\n    t = None"}, "top level"),
        ({"diffjax.cli.a": "import jax"}, "jax at top level"),
        ({"diffjax.new.a": ""}, "new has no rule"),
        (
            {"diffjax.core.a": "from diffjax.core import b", "diffjax.core.b": "import diffjax.core.a"},
            "import cycle: diffjax.core.a -> diffjax.core.b -> diffjax.core.a",
        ),
    ],
)
def test_a_broken_example_is_found(files, message):
    found = violations(files)
    assert len(found) == 1 and any(option in found[0] for option in message.split("|")), found


@pytest.mark.parametrize(
    "files",
    [
        {"diffjax.core.a": "def f():\n    import torch"},
        {"diffjax.train.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from diffjax.methods import sfd"},
        {"diffjax.core.a": "def f():\n    from diffjax.core import b", "diffjax.core.b": "import diffjax.core.a"},
        {"diffjax.models.a": "from diffjax.nn import layers\nfrom diffjax.core import rng"},
    ],
)
def test_a_good_example_passes(files):
    assert violations(files) == []
