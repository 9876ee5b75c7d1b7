"""Every method and network on a mesh of 2 x 2 x 2 devices trains as on one, its weights in parts."""

import functools

import jax
import numpy as np
import pytest
from quick_runs import small

from diffjax import build
from diffjax.build import parts
from diffjax.cli.train import train_and_evaluate
from diffjax.runtime import mesh
from diffjax.train import loop

STEPS, LAYOUT = 20, "data:2,fsdp:2,tensor:2"
DIT = {"name": "dit", "precondition": "edm", "width": 32, "depth": 2, "heads": 2, "patch": 2}
UNET = {"name": "unet", "precondition": "eps", "process": "linear", "width": 32, "channel_mult": (1, 2), "num_blocks": 1}
UNET |= {"transformer_depth": (1, 0), "heads": 2, "context_width": 16}
MMDIT = {"name": "mmdit", "precondition": "v", "process": "linear", "width": 32, "depth": 2, "heads": 2, "patch": 2}
EPS = {"precondition": "eps", "process": "linear"}
FLOW = {"precondition": "velocity", "process": "flow", "label_scale": 1000.0}
OBJECTIVES = {
    "edm": (DIT, {"name": "edm"}),
    "ddpm": (DIT | EPS, {"name": "edm", "distribution": "discrete", "weighting": "eps"}),
    "flow": (DIT | FLOW, {"name": "edm", "distribution": "uniform_flow", "weighting": "velocity"}),
    "consistency": (DIT | {"precondition": "consistency"}, {"name": "consistency", "metric": "l2"}),
}
CASES = {f"{name}_{assign}": (*found, assign) for name, found in OBJECTIVES.items() for assign in ("none", "linear")}
CASES |= {
    "edm_auction": (*OBJECTIVES["edm"], "auction"),
    "unet_knn": (UNET, {"name": "edm", "distribution": "discrete", "weighting": "eps"}, "knn"),
    "mmdit": (MMDIT, {"name": "edm", "distribution": "discrete", "weighting": "v"}, "none"),
}


# Adam makes a full step of the rounding error of a gradient that is balanced: of signs, or behind layers that start at zero
DESCENT = {"name": "sgd", "learning_rate": 1e-5}


def objective(model, method, assign):
    config = small("edm_digits.py", batch_size=16, num_steps=STEPS)
    config.model, config.method = model, method
    if model["name"] == "unet":
        config.optim = DESCENT
    if assign != "none":
        config.method.assign = assign
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    config = objective(*OBJECTIVES["edm"], "none")
    config.train.total_images = 32
    train_and_evaluate(config, folder)
    return folder


def trained(config, layout, num_devices):
    """(losses, norms of gradients, last state, the mesh) of a short training."""
    config.train.num_devices, config.train.mesh = num_devices, layout
    config = build.resolve(config)
    experiment, devices = build.experiment(config), parts.run_mesh(config)
    step = loop.train_step(experiment, devices)
    state = loop.first_state(experiment, devices)
    frozen = mesh.place(experiment.frozen, mesh.shardings(experiment.frozen, devices))
    batches, losses, norms = experiment.batches(), [], []
    for _ in range(STEPS):
        batch = jax.device_put(dict(next(batches)), mesh.batch_sharding(devices))
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert step._cache_size() == 1
    return losses, norms, state, devices


def check(config):
    alone, norms, _, _ = trained(config, "", 1)
    split, split_norms, found, devices = trained(config, LAYOUT, 8)
    assert np.isfinite(alone).all() and len(set(alone)) == STEPS
    # float32 sums in another order; Adam's division keeps the difference of weights at this size
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(split_norms, norms, rtol=1e-3)  # to which Adam is blind
    sizes = dict(devices.shape)
    for part in (found.method.params, found.ema_params or found.method.params, found.method):
        leaves = jax.tree.leaves(part)
        total, first = sum(leaf.nbytes for leaf in leaves), jax.devices()[0]
        own = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == first)
        print(f"{own:,} of {total:,} bytes on a device, {own / total:.3f}")
        assert own <= 1.2 / sizes["fsdp"] * total


@pytest.mark.parametrize("case", CASES)
def test_objectives(case):
    check(objective(*CASES[case]))


@pytest.mark.parametrize("name", ["sfd_digits.py:2", "emd_digits.py:emd_4"])
def test_distillation(name, teacher):
    changes = {"method__langevin_steps": 2, "method__score_updates": 1} if name.startswith("emd") else {}
    config = small(name, teacher, batch_size=16, num_steps=STEPS, **changes)
    if name.startswith("sfd"):
        config.optim = DESCENT
    check(config)


def test_samples_on_a_mesh(teacher):
    """Weights in parts, chunks over data and fsdp; rounding of a float32 network along 5 calls."""
    run = build.load_run(teacher)
    plan = build.run_plan(run, num_steps=3)
    draw = functools.partial(build.draw, run, plan, 0, range(8), batch_size=8)
    found = draw(mesh=mesh.make_mesh(layout=LAYOUT))
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, draw(), rtol=0, atol=1e-4)
