"""The launch scripts: they parse, show what they would do, and refuse mistakes before anything is installed or queued."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TRAINERS = ("local.sh", "slurm.sh", "tpu_pod.sh")
FLAGS = ("--config=configs/edm/cifar10_ddpmpp.py", "--workdir=runs/a run")


def launch(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TPU_ZONE": "us-central1-a", **variables}
    command = ["bash", f"launch/{script}", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.fast
def test_every_script_parses():
    assert len(SCRIPTS) >= 6
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.fast
@pytest.mark.parametrize("script", TRAINERS)
def test_dry_run_shows_the_command_and_quotes_it(script):
    done = launch(script, *FLAGS, "--config.seed=3", "--dry_run")
    assert done.returncode == 0, done.stderr
    plain = done.stdout.replace("\\", "")  # a command inside a command is quoted
    assert "python -m diffjax.cli.train" in plain and "--config.seed=3" in plain and "--dry_run" not in plain
    assert "a\\ run" in done.stdout
    assert not (ROOT / "runs" / "a run").exists()


def test_slurm_job_saves_and_queues_itself_again():
    job = launch("slurm.sh", *FLAGS, "--dry_run").stdout
    assert "#SBATCH --signal=TERM@300" in job and 'if [ "$code" = 75 ]' in job
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)


def test_tpu_commands_name_the_runtime_of_the_type():
    done = launch("tpu_pod.sh", *FLAGS, "--dry_run", TPU_TYPE="v6e-4", TPU_SPOT="1")
    create = done.stdout.splitlines()[0]
    assert "--accelerator-type=v6e-4" in create and "--runtime-version=v2-alpha-tpuv6e" in create and "--spot" in create
    assert "--worker=all" in done.stdout and "delete diffjax" in done.stdout


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing"),
        (["--config=configs/none.py"], "config file configs/none.py does not exist; there are: configs/"),
        (["--config=configs/quick/edm_digits.py"], "--workdir is missing"),
    ],
)
def test_missing_flags_are_refused_first(script, argv, message):
    done = launch(script, *argv)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("script", "argv", "variables", "message"),
    [
        ("tpu_pod.sh", FLAGS, {"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        ("tpu_pod.sh", FLAGS, {"TPU_TYPE": "v5p-4096"}, "found TPU_TYPE=v5p-4096, expected one host"),
        ("tpu_pod.sh", (FLAGS[0], "--workdir=/abs"), {}, "expected a folder inside the checkout"),
        ("slurm.sh", FLAGS, {}, "found no sbatch"),
        ("quickstart.sh", ("--fast",), {}, "expected nothing or --smoke"),
        ("video_demo.sh", ("--fast",), {}, "expected nothing or --smoke"),
    ],
)
def test_other_mistakes_are_refused_first(script, argv, variables, message):
    if "sbatch" in message and shutil.which("sbatch"):
        pytest.skip("this machine has Slurm")
    done = launch(script, *argv, **variables)
    assert done.returncode == 2 and message in done.stderr


def test_without_a_registry_it_says_so_at_once(tmp_path):
    """A fresh checkout, an index that does not answer: no half-made installation, no long retries."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "setup.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "", "PIP_FIND_LINKS": ""}
    environment |= {"PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    script = 'source launch/_env.sh; cd "$1"; prepare demo'
    command = ["bash", "-c", f"set -euo pipefail; {script}", "bash", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no package registry answers" in done.stderr, done.stderr
