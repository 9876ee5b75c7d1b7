"""README.md: its bash blocks run as they stand (training cut short), its Python runs, its files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
}


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
    for line in lines:
        command = shlex.split(line)
        assert command[:2] == ["python", "-m"], f"a bash block holds {line!r}: indent what a test cannot run"
        extra = [flag for name, flags in SHORT.items() if f"/{name}.py" in line for flag in flags]
        done = subprocess.run([sys.executable, *command[1:], *extra], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


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
