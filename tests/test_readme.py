"""README.md: its bash blocks run as they stand (training cut short), its Python runs, its files exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffjax.cli import flags, protocols

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# what cuts a command short, by the module and config it names
SHORT = {
    "edm_digits": ["--config.train.total_images=2560", "--config.train.sample_every_steps=0", "--config.model.width=32"],
    "sfd_digits": ["--config.train.total_images=256", "--config.train.sample_every_steps=0"],
    "pd_digits": ["--config.train.total_images=256"],
    "immiscible_digits": ["--config.train.total_images=2560", "--config.model.width=64", "--config.model.depth=1"],
    "emd_digits": ["--config.train.total_images=256", "--config.train.sample_every_steps=0"],
    "amed_digits": ["--config.train.total_images=256"],
    "compare_digits": ["--config.num_samples=64", "--config.batch_size=64", "--config.calls=(1, 2)"],
    "cifar10_ddpmpp": ["--config.model.num_blocks=1"],
}

# Runs the commands one after another, each as `python -m` would. One process for all of them: each on its own would
# import JAX anew, and compile what the one before it has compiled (test_cli.py starts each in its own, for its help).
COMMANDS = """
import json, runpy, sys
for argv in json.load(sys.stdin):
    sys.argv = argv[2:]
    try:
        runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{argv} ended with {end.code}"
"""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, so that the commands' runs/ lands in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "launch", "diffjax"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_bash_blocks_run(checkout):
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    assert len(lines) >= 8
    commands = [shlex.split(line) for line in lines]
    for line, command in zip(lines, commands, strict=True):
        assert command[:2] == ["python", "-m"], f"a bash block holds {line!r}: indent what a test cannot run"
        command += [flag for name, short in SHORT.items() if f"/{name}.py" in line for flag in short]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}
    python, text = [sys.executable, "-c", COMMANDS], json.dumps(commands)
    done = subprocess.run(python, input=text, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_python_block_runs(checkout, monkeypatch):
    """After the bash blocks, whose student stands in for the quickstart's."""
    monkeypatch.chdir(checkout)
    (code,) = _blocks("python")
    scope: dict = {}
    exec(code.replace("runs/quickstart/student_2", "runs/digits_student_2"), scope)
    assert scope["plan"].nfe == 2 and scope["images"].shape == (16, 8, 8, 1)


@pytest.mark.fast
def test_files_it_names_exist():
    named = re.findall(r"(?:configs|launch|tests|diffjax)/[\w/.]+\w", README)
    missing = sorted({name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()})
    inside = [name for name in re.findall(r"`((?:core|data|build)/\w+\.py)`", README)]
    missing += [name for name in inside if not (ROOT / "diffjax" / name).exists()]
    assert not missing


@pytest.mark.fast
def test_the_metric_protocol_is_what_the_tool_says():
    """Made anew by python -m diffjax.cli.protocols --readme=README.md."""
    assert protocols.section(README) == protocols.markdown()
    below = README[README.index("## Metric protocol") :].partition("\n## ")[0]
    assert protocols.section(README) in below


def test_the_section_is_written_between_its_marks(tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{protocols.BEGIN}\nwhat was there\n{protocols.END}\n\nafter\n", encoding="utf-8")
    argv = ["protocols", f"--readme={path}"]
    assert flags.run(protocols.__doc__, protocols.define, protocols.main, argv) == 0
    text = path.read_text(encoding="utf-8")
    assert protocols.section(text) == protocols.markdown()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n") and "was there" not in text
    path.write_text("no marks", encoding="utf-8")
    assert flags.run(protocols.__doc__, protocols.define, protocols.main, argv) == 2
    assert "once each, a line each: put them around the section" in capsys.readouterr().err
