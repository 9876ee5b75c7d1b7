"""The package as pip sees it: requirements, the refused flax/jax pairs, and an import that stays light."""

import importlib.metadata
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.version import Version

import diffjax

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"tensorflow", "tensorflow-cpu", "torch", "keras", "torchvision", "lpips"}


@pytest.fixture
def setup_arguments(monkeypatch) -> dict:
    """What setup.py hands to setuptools."""
    caught = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return caught


def _import_all(extra: str) -> subprocess.CompletedProcess:
    """Import every module of diffjax in a fresh process, then run `extra`."""
    code = (
        "import importlib, pkgutil, sys, diffjax\n"
        "for module in pkgutil.walk_packages(diffjax.__path__, 'diffjax.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    return _python(code + extra)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = [environment.pop("first_path", ""), str(ROOT)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)


def _needed(requirements: list[str], seen: dict[str, str], because: str) -> dict[str, str]:
    """Every package that `requirements` pull in -> the package that asks for it."""
    for text in requirements:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen[name] = because
        try:
            further = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            further = []  # not installed here, so this environment does without it
        _needed(further, seen, name)
    return seen


@pytest.mark.fast
def test_core_requires_neither_tensorflow_nor_torch(setup_arguments):
    needed = _needed(setup_arguments["install_requires"], {}, "diffjax")
    assert {"jax", "flax", "numpy", "msgpack"} <= set(needed)  # the walk went through the requirements of others
    assert not {name: by for name, by in needed.items() if name in FORBIDDEN}


def test_extras_are_the_documented_ones(setup_arguments):
    extras = setup_arguments["extras_require"]
    assert set(extras) == {"cuda", "tpu", "bucket", "demo", "video", "log", "ode", "weights", "test"}
    assert set(extras["demo"]) <= set(extras["test"])
    # torchvision's metadata names one torch; another pair would bring a second torch
    assert {"torch==2.13.0", "torchvision==0.28.0", "lpips==0.1.4"} <= set(extras["test"])
    assert not [r for name, rs in extras.items() if name != "test" for r in rs if Requirement(r).name in FORBIDDEN]


def test_floors_are_not_above_what_is_installed(setup_arguments):
    requirements = setup_arguments["install_requires"] + setup_arguments["extras_require"]["test"]
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package: its own tests skip with the reason
        assert requirement.specifier.contains(Version(found).public, prereleases=True), f"{requirement}: found {found}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_requirements_exclude_the_broken_pairs(setup_arguments, python):
    """Python 3.11 has no jax after 0.10.2; later ones get a flax that imports with every jax."""
    flax = [
        requirement
        for requirement in map(Requirement, setup_arguments["install_requires"])
        if requirement.name == "flax" and requirement.marker.evaluate({"python_version": python})
    ]
    assert len(flax) == 1
    broken = [flax_version for flax_version in ("0.12.8", "0.12.9") if python != "3.11" and flax_version in flax[0].specifier]
    assert not broken
    assert "0.12.12" in flax[0].specifier


@pytest.mark.parametrize(
    ("flax", "jax", "works"),
    [  # seen by importing each pair
        ("0.12.8", "0.10.2", True),
        ("0.12.8", "0.11.0", True),
        ("0.12.8", "0.11.1", False),
        ("0.12.8", "0.12.0.1", False),
        ("0.12.9", "0.11.1", True),
        ("0.12.9", "0.11.2", False),
        ("0.12.9", "0.12.0", False),
        ("0.12.10", "0.11.2", True),
        ("0.12.10", "0.12.0.1", True),
        ("0.12.12", "0.12.0.1", True),
        ("0.12.12", "0.13.0.dev20261101", True),
        ("0.12.9rc1", "0.12.0", False),
    ],
)
def test_broken_pairs_are_refused(flax, jax, works):
    if works:
        diffjax._refuse_broken_pair(flax, jax)
        return
    with pytest.raises(ImportError, match="pip install 'flax>=0.12.10'") as caught:
        diffjax._refuse_broken_pair(flax, jax)
    assert f"flax {flax} " in str(caught.value) and f"jax {jax} " in str(caught.value)


@pytest.mark.fast
def test_import_refuses_a_broken_pair_before_flax_is_imported(tmp_path):
    for name, version in (("flax", "0.12.9"), ("jax", "0.12.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = "import sys\ntry:\n    import diffjax\nexcept ImportError as error:\n    print(error)\nprint('flax' in sys.modules)"
    done = _python(code, first_path=str(tmp_path))
    message, imported = done.stdout.splitlines()
    assert "flax 0.12.9 cannot be imported with jax 0.12.0" in message and "type: pip install" in message
    assert imported == "False"


def test_import_of_a_missing_package_says_what_to_type():
    with pytest.raises(ImportError, match=r"needs no-such-package, .* type: pip install \."):
        diffjax._installed("no-such-package")


@pytest.mark.fast
def test_importing_diffjax_is_light():
    done = _python("import diffjax, sys; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_module_imports_without_tensorflow_torch_or_optional_packages():
    optional = sorted(FORBIDDEN | {"tensorboardX", "wandb", "sklearn", "matplotlib", "safetensors", "tensorflow_datasets"})
    done = _import_all(f"print([m for m in {optional} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_package_folder_is_found_by_setup(setup_arguments):
    folders = {
        ".".join(path.relative_to(ROOT).parts)
        for path in [ROOT / "diffjax", *(ROOT / "diffjax").rglob("*")]
        if path.is_dir() and list(path.glob("*.py"))
    }
    assert folders == set(setup_arguments["packages"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert setup_arguments["version"] == diffjax.__version__
