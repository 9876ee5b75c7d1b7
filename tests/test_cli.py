"""The commands as a person types them: help without JAX, a run from training to samples, errors without a stack."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax.cli import convert, evaluate, flags, inspect, protocols, sample, train, video

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train": train, "sample": sample, "evaluate": evaluate, "inspect": inspect, "convert": convert, "video": video,
    "protocols": protocols,
}  # fmt: skip
SMALL = (
    "--config.model.width=16", "--config.model.depth=1", "--config.train.batch_size=64",
    "--config.train.total_images=256", "--config.train.log_every_steps=2", "--config.train.sample_every_steps=0",
    "--config.train.num_devices=1", "--config.sample.num_steps=3", "--config.optim.warmup_images=0",
)  # fmt: skip


def call(command: str, *argv: str) -> int:
    module = COMMANDS[command]
    return flags.run(module.__doc__, module.define, module.main, [command, *argv], getattr(module, "POSITIONAL", ()))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Flags of a small data set that needs no package."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (128, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=random.integers(0, 10, 128))
    return ["--config=configs/quick/edm_digits.py", "--config.data.name=arrays", f"--config.data.path={path}", *SMALL]


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    folder = Path.cwd()
    os.chdir(ROOT)  # a module fixture comes before `in_the_checkout`
    try:
        assert call("train", *data, f"--workdir={workdir}") == 0
    finally:
        os.chdir(folder)
    return workdir


# Help ------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_jax(command):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('diffjax.cli.{command}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('code', end.code, [m for m in ('jax', 'flax', 'optax', 'numpy') if m in sys.modules])\n"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)
    assert done.stdout.splitlines()[-1] == "code 0 []", done.stderr
    others = {"convert": "--kind=...", "video": "--model=...", "protocols": "--readme=..."}
    own = others.get(command, "--workdir=...")
    assert f"python -m diffjax.cli.{command} --" in done.stdout and own in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_that_the_help_text_uses_exist(command, capsys):
    call(command, "--help")
    text, listing = capsys.readouterr().out.split("Flags:")
    for flag in re.findall(r"--([a-z_]+)", text):
        assert f"--{flag}" in listing, flag


# A run -----------------------------------------------------------------------------------------------------------


def test_train_leaves_a_whole_run_folder(run_folder):
    assert {path.name for path in run_folder.iterdir()} >= {
        "config.json", "metrics.jsonl", "checkpoints", "samples", "report.md", "report.json",
    }  # fmt: skip
    figures = json.loads((run_folder / "report.json").read_text())
    (summary,) = figures["tables"]["training"]
    assert (summary["images"], summary["steps"]) == (256, 4)
    assert summary["seconds"] > 0 and np.isfinite(summary["loss"])
    assert figures["tables"]["losses"][-1]["step"] == 4
    assert figures["environment"]["command"].startswith("python -m diffjax.cli.train")
    text = (run_folder / "report.md").read_text()
    assert "samples/final.png" in text and "diffjax.cli.train" in text
    with Image.open(run_folder / "samples" / "final.png") as picture:
        assert picture.size[0] > 8


def test_train_again_resumes_and_trains_no_further(run_folder, data, capsys):
    before = (run_folder / "metrics.jsonl").read_text()
    assert call("train", *data, f"--workdir={run_folder}") == 0
    assert "resumed from step 4 of 4" in capsys.readouterr().err
    assert (run_folder / "metrics.jsonl").read_text() == before


def test_train_refuses_the_folder_of_another_config(run_folder, data, capsys):
    assert call("train", *data, f"--workdir={run_folder}", "--config.optim.learning_rate=0.5") == 2
    assert "optim.learning_rate: 0.002 -> 0.5" in capsys.readouterr().err
    assert call("train", *data, f"--workdir={run_folder}", "--config.optim.learning_rate=0.5", "--dry_run") == 2


def test_dry_run_describes_and_writes_nothing(data, tmp_path, capsys):
    assert call("train", *data, f"--workdir={tmp_path / 'new'}", "--dry_run") == 0
    text = capsys.readouterr().out
    assert "image uint8[64, 8, 8, 1], label int32[64]; 64 images a step" in text
    assert "4 for 256 images, 0 done" in text and "(new)" in text
    assert not (tmp_path / "new").exists()


def test_samples_depend_on_their_seed_alone(run_folder, tmp_path):
    assert call("sample", f"--workdir={run_folder}", f"--out={tmp_path / 'a'}", "--seeds=0-5,9") == 0
    assert call("sample", f"--workdir={run_folder}", f"--out={tmp_path / 'b'}", "--seeds=9,2", "--batch_size=1") == 0
    with np.load(tmp_path / "a" / "samples.npz") as a, np.load(tmp_path / "b" / "samples.npz") as b:
        assert a["images"].shape == (7, 8, 8, 1) and a["images"].dtype == np.uint8
        assert a["seeds"].tolist() == [0, 1, 2, 3, 4, 5, 9]
        # one grey level: products of another batch size round differently
        difference = np.abs(a["images"][[6, 2]].astype(int) - b["images"])
        assert difference.max() <= 1
        assert np.abs(a["images"][0].astype(int) - a["images"][1]).max() > 1
    facts = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert facts["step"] == 4 and facts["calls"] == 5  # 3 noise levels and 0: two corrected steps, one plain


def test_samples_of_another_solver_and_class(run_folder, tmp_path, capsys):
    out = tmp_path / "a"
    argv = ("--seeds=0-3", "--labels=3", "--solver=euler", "--num_steps=5", "--dry_run")
    assert call("sample", f"--workdir={run_folder}", f"--out={out}", *argv) == 0
    assert "5 network calls each" in capsys.readouterr().out and not out.exists()
    assert call("sample", f"--workdir={run_folder}", f"--out={out}", *argv[:-1]) == 0
    with np.load(out / "samples.npz") as file:
        assert file["labels"].tolist() == [3, 3, 3, 3]


def test_sample_does_not_overwrite(run_folder, tmp_path, capsys):
    (tmp_path / "samples.png").write_bytes(b"mine")
    assert call("sample", f"--workdir={run_folder}", f"--out={tmp_path}") == 2
    assert "samples.png exist and are not overwritten: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "samples.png").read_bytes() == b"mine"


def test_inspect_shows_a_run_and_how_a_config_differs(run_folder, data, capsys):
    assert call("inspect", f"--workdir={run_folder}") == 0
    text = capsys.readouterr().out
    assert re.search(r"checkpoint +step 4, [\d.]+ [KM]iB", text)
    assert "last log line   step 4, 256 images: " in text and "config          model.width = 16" in text
    assert call("inspect", f"--workdir={run_folder}", *data) == 0
    assert "differs         nowhere" in capsys.readouterr().out
    assert call("inspect", f"--workdir={run_folder}", *data, "--config.model.width=32") == 0
    assert "differs         model.width: 16 -> 32" in capsys.readouterr().out


def test_inspect_shows_what_a_config_costs(capsys):
    argv = ("--config=configs/quick/edm_digits.py", *SMALL, "--config.ema.halflife_images=0")
    assert call("inspect", *argv, "--compile") == 0
    text = capsys.readouterr().out
    parameters = int(re.search(r"^parameters +([\d,]+)$", text, re.MULTILINE)[1].replace(",", ""))
    assert parameters == sum(int(n.replace(",", "")) for n in re.findall(r"^  \w+ +([\d,]+)$", text, re.MULTILINE))
    size = float(re.search(r"^state +([\d.]+) KiB", text, re.MULTILINE)[1])
    # float32 weights and Adam's two moments; the rest is a handful of counters
    assert size * 1024 == pytest.approx(12 * parameters, rel=0.01)
    flops = float(re.search(r"^training step +([\d.e+]+) FLOPs for 64 images", text, re.MULTILINE)[1])
    # products alone are 6 FLOPs a weight and image; those of the noise labels, norms and Adam come on top
    assert 6 * 64 * parameters * 0.5 < flops < 6 * 64 * parameters * 3
    assert "work" in text


def test_inspect_cuts_a_video_model_to_a_budget(capsys):
    assert call("inspect", "--video=animatediff", "--size=256x256", "--frames=2", "--budget=2680MB") == 0
    text = capsys.readouterr().out
    found = re.search(r"up_blocks/3/resnets/0/spatial +frames +4 +([24]) +(2\.\d+) GiB +(2\.\d+) GiB", text)
    assert float(found[2]) <= 2680e6 / 2**30 + 0.001 < float(found[3])  # printed with 4 digits
    assert "animatediff vae: " in text


# Errors ----------------------------------------------------------------------------------------------------------

CONFIG = "--config=configs/quick/edm_digits.py"
MISTAKES = [
    ("train", ["--config=configs/quick/edm_digit.py"], "did you mean 'configs/quick/edm_digits.py'"),
    ("train", [], "--config is missing; for example --config="),
    ("train", [CONFIG], "--workdir is missing; for example --workdir="),
    ("train", [CONFIG, "--workdir=setup.py/run"], "setup.py is a file, expected a folder"),
    ("train", [CONFIG + ":big"], "edm_digits.py has no variants, found 'big'"),
    ("train", [CONFIG, "--config.train.bach_size=3"], "unknown key config.train.bach_size; did you mean 'train.batch_size'"),
    ("train", [CONFIG, "--config.optim.learning_rte=3"], "did you mean 'optim.learning_rate'"),
    ("train", [CONFIG, "--config.ema.halflife_image=3"], "did you mean 'ema.halflife_images'"),
    ("train", [CONFIG, "--config.trian.batch_size=3"], "unknown key config.trian.batch_size; did you mean 'train'"),
    ("train", [CONFIG, "--config.foo.bar=3"], "unknown key config.foo.bar"),
    ("train", [CONFIG, "--config.seed.a=3"], "config.seed is a value, not a section"),
    ("train", [CONFIG, "--config.train.batch_size=many"], "batch_size=many"),
    ("train", [CONFIG, "--workdri=runs/a"], "Did you mean: workdir"),
    ("train", [CONFIG, "runs/a"], "found 'runs/a', which is no flag"),
    ("train", [CONFIG, "--workdir={tmp}", "--config.train.foo=3"], "foo"),
    ("train", [CONFIG, "--workdir={tmp}", "--config.model.name=adn"], "did you mean 'adm'"),
    ("train", [CONFIG, "--workdir={tmp}", "--config.method.name=edmm"], "did you mean 'edm'"),
    ("train", [CONFIG, "--workdir={tmp}", "--config.data.name=digit"], "did you mean 'digits'"),
    ("train", [CONFIG, "--workdir={tmp}", "--config.sample.solver=eulr"], "did you mean 'euler'"),
    ("train", ["--config=configs/quick/sfd_digits.py", "--workdir={tmp}", "--config.method.teacher={tmp}/none"], "none"),
    ("sample", ["--out={tmp}/out"], "--workdir is missing"),
    ("sample", ["--workdir={tmp}", "--out={tmp}/out"], "is no run folder (it has no config.json)"),
    ("sample", ["--workdir={run}"], "--out is missing"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--seeds=5-2"], "found '5-2', expected numbers and ranges like 0-63"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--seeds=4294967296"], "--seeds"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--labels=0,1,2"], "found 3 labels for 64 seeds"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--labels=10"], "found 10, expected 0..9"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--solver=eula"], "did you mean 'euler'"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--solver=euler", "--num_steps=1"], "at least 2 noise levels"),
    ("sample", ["--workdir={run}", "--out={tmp}/out", "--guidance_scale=2"], "needs a null class"),
    ("inspect", [], "give --config="),
    ("inspect", ["--workdir={tmp}/none"], "is no run folder"),
    ("inspect", ["--video=svdxt"], "unknown video model 'svdxt'; did you mean 'svd_xt'"),
    ("inspect", ["--video=svd", "--size=570x1024"], "found a size of 570x1024, expected multiples of 8"),
    ("inspect", ["--video=svd", "--size=576"], "found --size=576, expected HEIGHTxWIDTH"),
    ("inspect", ["--video=svd", "--offload=skip"], "unknown 'skip' to offload; did you mean 'skips'"),
    ("inspect", ["--video=svd", "--budget=16"], "found --budget=16, expected a number of MiB, GiB, MB or GB"),
    ("inspect", ["--video=svd", "--workdir={tmp}"], "found --video=svd beside a folder, --config or --workdir"),
    ("convert", ["--kind=edm", "{tmp}/a.pkl"], "FOLDER is missing: give FILE FOLDER and flags --NAME=VALUE"),
    ("convert", ["--kind=edm"], "FILE FOLDER is missing"),
    ("convert", ["--kind=edm", "{tmp}/a.pkl", "{tmp}/b", "{tmp}/c"], "/c', which is no flag: flags beside FILE FOLDER are"),
    ("convert", ["{tmp}/a.pkl", "{tmp}/b"], "--kind is missing; for example --kind=edm"),
    ("convert", ["--kind=edn", "{tmp}/a.pkl", "{tmp}/b"], "unknown --kind 'edn'; did you mean 'edm'"),
    ("convert", ["--kind=edm", "{tmp}/a.pkl", "{run}"], "exists (not overwritten): choose another folder"),
    ("convert", ["--kind=edm", "{tmp}/a.pkl", "setup.py/b"], "setup.py is a file, expected a folder"),
    ("convert", ["--kind=edm", "{tmp}/a.pkl", "{tmp}/b"], "a.pkl: No such file"),
    ("evaluate", ["--config=configs/quick/compare_digits.py", "--config.sedes=3"], "did you mean 'seeds'"),
]


@pytest.mark.parametrize(("command", "argv", "message"), MISTAKES)
def test_a_mistake_ends_with_code_2_and_one_message(command, argv, message, run_folder, tmp_path, capsys):
    argv = [arg.format(tmp=tmp_path, run=run_folder) for arg in argv]
    assert call(command, *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_a_misspelt_key_is_answered_with_the_nearest(capsys):
    assert call("train", CONFIG, "--config.train.bach_size=3") == 2
    assert "did you mean 'train.batch_size'" in capsys.readouterr().err


def test_traceback_shows_the_stack():
    with pytest.raises(FileNotFoundError, match="did you mean"):
        call("train", "--config=configs/quick/edm_digit.py", "--traceback")


def test_a_bug_keeps_its_stack():
    def broken(values):
        json.loads("{")  # a ValueError that no one raised for the user

    def missing(values):
        raise KeyError("a")

    for main in (broken, missing):
        with pytest.raises((ValueError, KeyError)):
            flags.run("", lambda values, argv: None, main, ["command"])


def test_keys_that_a_section_leaves_at_their_default_can_be_set(capsys):
    argv = ("--config.train.keep_every_steps=5", "--config.allow_config_change=True", "--config.optim.clip_norm=1.5")
    assert call("train", CONFIG, *argv, "--config.seed=7", "--print_config") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"train.keep_every_steps = 5", "allow_config_change = True", "optim.clip_norm = 1.5", "seed = 7"} <= set(lines)
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "expected"), [("0-3,7", [0, 1, 2, 3, 7]), ("5", [5]), (" 1 , 2-2", [1, 2]), ("4294967295", [2**32 - 1])]
)
def test_numbers(text, expected):
    assert sample.numbers("seeds", text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-1", "1.5"])
def test_numbers_refuses_the_rest(text):
    with pytest.raises(ValueError, match="--seeds="):
        sample.numbers("seeds", text)


def test_the_command_itself_exits_with_the_code(tmp_path):
    argv = [sys.executable, "-m", "diffjax.cli.train", "--config=configs/quick/none.py"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: config file"), done.stderr
