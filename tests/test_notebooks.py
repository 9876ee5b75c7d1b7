"""The notebooks run from top to bottom in a fresh kernel, their figures cut short."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
import tiny_folders

ROOT = Path(__file__).parent.parent
SHORT = {  # notebook -> names of its settings and what the test takes for them
    "quickstart": {"TEACHER_IMAGES": 2_560, "STUDENT_IMAGES": 640, "SAMPLES": 200},
    "sfd_v": {"TEACHER_IMAGES": 2_560, "STUDENT_IMAGES": 640, "SECOND_IMAGES": 640, "SAMPLES": 200},
    "immiscible": {"IMAGES": 2_560, "UPDATES": 50, "SAMPLES": 200},
    "emd": {"TEACHER_IMAGES": 2_560, "STUDENT_IMAGES": 640, "SAMPLES": 200},
    "conditioning": {"IMAGES": 640},
    "video": {"FRAMES": 3, "SIZE": 16, "STEPS": 5, "FULL": 3},
    "text_to_image": {"MODEL": "'tiny'", "STEPS": 3},
}
SHOWN = {  # notebook -> number of its pictures, and what it prints
    "quickstart": (3, ("35 network calls", "SFD student, 2 calls")),
    "sfd_v": (2, ("second stage, 1 call", "5 calls: SFD-v")),
    "immiscible": (2, ("linear   distance of image", "linear   1 step", "linear, 50 calls: distance")),
    "emd": (3, ("Diff-Instruct, 1 call: distance", "EMD-4, 1 call: distance")),
    "conditioning": (7, ("strength 1 is plain guidance: largest", "replicate        attention", "level 3.42")),
    "video": (1, ("conv_out", "below 1e-5: True", "full steps: [0,", "fewer     differs")),
    "text_to_image": (3, ("unet with 792,964 weights", "pictures of 16 pixels a side", "16 network calls each")),
}


def test_every_notebook_is_run_here():
    assert {path.stem for path in (ROOT / "launch" / "colab").glob("*.ipynb")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_notebook_runs(name, tmp_path, request):
    for folder in ("configs", "launch", "diffjax"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    notebook = nbformat.read(ROOT / "launch" / "colab" / f"{name}.ipynb", as_version=4)
    for setting, value in SHORT[name].items():
        _set(notebook, setting, value)
    if name == "text_to_image":
        tiny_folders.stable_diffusion(request.getfixturevalue("transformers"), tmp_path / "tiny")
    one_device = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": one_device}
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    count, texts = SHOWN[name]
    assert len(pictures) == count
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert all(text in printed for text in texts), printed


def test_notebooks_are_stored_without_output():
    for path in (ROOT / "launch" / "colab").glob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in cells), path.name


def _set(notebook: nbformat.NotebookNode, name: str, value: int | str) -> None:
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        for i, line in enumerate(lines):
            if line.startswith(f"{name} = "):
                lines[i] = f"{name} = {value}"
                cell.source = "\n".join(lines)
                return
    raise AssertionError(f"the notebook does not set {name}")
