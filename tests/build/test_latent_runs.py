"""Published folders converted, distilled and trained on: a tiny Stable Diffusion with drawn weights, end to end."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_folders
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import companions
from diffjax.cli import convert, flags, sample
from diffjax.cli.train import train_and_evaluate
from diffjax.core import guidance, schedules, trees
from diffjax.data import sources
from diffjax.runtime import configs
from diffjax.runtime import mesh as meshes
from diffjax.weights import load

TEXTS = ["a photo of a red fox", "a blue car", "the hill.", "a red car on a hill", "fox", "photo of the blue fox"]


def call(module, *argv):
    """A command in this process; its exit code."""
    argv = [module.__name__, *map(str, argv)]
    return flags.run(module.__doc__, module.define, module.main, argv, getattr(module, "POSITIONAL", ()))


@pytest.fixture(scope="module")
def place(transformers, tmp_path_factory):
    """A folder with the model `sd`, converted to the run `teacher`, and files of texts."""
    folder = tmp_path_factory.mktemp("latent")
    tiny_folders.stable_diffusion(transformers, folder / "sd")
    assert call(convert, "--kind=folder", folder / "sd", folder / "teacher") == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    (folder / "names.txt").write_text("\n".join(f"a photo of {name}" for name in ("zero", "one", "two")))
    random = np.random.default_rng(0)
    items = [{"image": random.integers(0, 256, (16, 16, 3), np.uint8), "label": i % 3} for i in range(8)]
    sources.write_array_record(folder / "pictures.array_record", items)
    return folder


def config(name, place, **changes):
    """A published config for two steps of four on the tiny model."""
    config = flags.load_config(f"configs/{name}")
    config.train.update({"batch_size": 4, "total_images": 8, "log_every_steps": 1, "sample_every_steps": 0})
    config.train.num_devices = 1
    config.model.compute_dtype = ""
    if "teacher" in config.method:
        config.method.teacher = str(place / "teacher")
        config.data.update({"path": str(place / "texts.txt"), "held_out": 1})
    for key, value in changes.items():
        section, name = key.split("__")
        with config[section].unlocked():
            config[section][name] = value
    return config


def log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def draw(run, mesh=None, **options):
    plan = build.run_plan(run, **options)
    return build.draw(run, plan, 0, [0, 1], batch_size=2, prompts=TEXTS[:2], guidance_scale=3.0, mesh=mesh)


def test_converted_and_read_are_the_same(place):
    """A run folder made of the model, and the model itself."""
    run, model = build.load_run(place / "teacher"), build.load_model(place / "sd")
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert configs.to_plain(run.config.model) == configs.to_plain(model.config.model)
    assert run.config.data.companions == str(place / "sd")


def test_exported_for_diffusers(place, tmp_path):
    """The names and bits of the file that the model came from."""
    assert call(convert, "--export=diffusers", place / "teacher", tmp_path / "unet.safetensors") == 0
    found, original = load.read(tmp_path / "unet.safetensors"), load.read(place / "sd" / "unet")
    assert set(found) == set(original)
    for name in original:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(original[name]), err_msg=name)


def test_two_devices(place):
    """Weights go there as they are read; pictures are those of one device."""
    mesh = meshes.make_mesh(2)
    run = build.load_model(place / "sd", mesh=mesh)
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(run.params))
    expected = draw(build.load_model(place / "sd"), num_steps=4)
    np.testing.assert_allclose(draw(run, num_steps=4, mesh=mesh), expected, atol=1e-4)  # sums in another order


def test_guidance_of_published_samples(place):
    """On three channels of four, by a scale that rises: the same denoiser, guided by hand."""
    run = build.load_model(place / "sd")
    plan = build.run_plan(run, num_steps=4)
    options = dict(batch_size=2, prompts=TEXTS[:2])
    found = build.draw(run, plan, 0, [0, 1], guidance_scale=3.0, guidance_channels=3, guidance_power=4.0, **options)
    table = schedules.named("scaled_linear")

    def scale(sigma):
        return guidance.power_cosine(table.label(table.time(sigma)) / 1000, 3.0, 4.0)

    guided = run._replace(denoise=guidance.cfg(run.denoise, scale, guidance.negative, channels=3))
    np.testing.assert_allclose(found, build.draw(guided, plan, 0, [0, 1], **options), atol=1e-5)
    assert np.abs(found - build.draw(run, plan, 0, [0, 1], guidance_scale=3.0, **options)).max() > 1e-3


def test_sfd_v_of_stable_diffusion(place):
    """Trained on prompts without guidance, sampled with it, told the number of its levels (Zhou 2024, 3.3)."""
    workdir = place / "sfd"
    train_and_evaluate(config("sfd/sd_v15.py", place, method__num_steps=(4, 5), method__teacher_factor=2), workdir)
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in log(workdir) if "loss" in line)
    run = build.load_run(workdir)
    assert any(path.startswith("step/") for path in trees.paths(run.params))
    pictures = draw(run, num_steps=5)
    assert pictures.shape == (2, 16, 16, 3) and np.isfinite(pictures).all() and pictures.std() > 0.01
    with pytest.raises(ValueError, match="was trained for num_steps in"):
        build.run_plan(run, num_steps=6)
    with pytest.raises(ValueError, match="makes pictures of texts and found none"):
        build.draw(run, build.run_plan(run), 0, [0], batch_size=1)


def test_sfd_of_latent_diffusion(transformers, tmp_path):
    """Unconditional, as LSUN-Bedroom's, from a folder with a quantised autoencoder to pictures at three calls."""
    tiny_folders.ldm(transformers, tmp_path / "ldm")
    assert call(convert, "--kind=folder", tmp_path / "ldm", tmp_path / "teacher") == 0
    settings = config("sfd/lsun_bedroom.py:3", tmp_path, method__teacher_factor=2)
    settings.data = ConfigDict({"name": "none"})
    train_and_evaluate(settings, tmp_path / "sfd")
    losses = [line["loss"] for line in log(tmp_path / "sfd") if "loss" in line]
    assert losses and np.isfinite(losses).all() and min(losses) > 0
    run = build.load_run(tmp_path / "sfd")
    plan = build.run_plan(run)
    assert plan.nfe == 3
    pictures = build.draw(run, plan, 0, [0, 1], batch_size=2)
    assert pictures.shape == (2, 16, 16, 3) and np.isfinite(pictures).all() and pictures.std() > 0.01


def test_prompts_are_seen_and_resumed(place):
    """Each batch has its own captions, encoded as `condition` does it; after a restart they go on where they were."""
    experiment = build.experiment(config("sfd/sd_v15.py", place))
    batches = experiment.batches()
    first, state, second = next(batches), batches.get_state(), next(batches)
    assert not np.array_equal(first["text"], second["text"])
    batches.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(next(batches)["text"], second["text"])
    every = companions.load_companions(str(place / "sd")).condition([*TEXTS, ""])["text"]
    rows = np.abs(np.asarray(first["text"])[:, None] - every[None]).max(axis=(2, 3)).argmin(axis=1)
    np.testing.assert_allclose(first["text"], every[rows], atol=1e-5)  # float32, batches of another size
    assert max(rows) < len(TEXTS) - 1  # the last is held out
    np.testing.assert_allclose(first["negative_text"], np.repeat(every[-1:], 4, axis=0), atol=1e-5)


def test_emd_of_stable_diffusion(place):
    """A guided teacher, one call for a picture."""
    workdir = place / "emd"
    train_and_evaluate(config("emd/sd_v15.py", place, method__langevin_steps=2), workdir)
    assert all(np.isfinite(line["score_loss"]) for line in log(workdir) if "score_loss" in line)
    run = build.load_run(workdir)
    pictures = build.draw(run, build.run_plan(run), 0, [0, 1], batch_size=2, prompts=TEXTS[:2])
    assert pictures.shape == (2, 16, 16, 3) and np.isfinite(pictures).all()


@pytest.mark.parametrize("variant", ["scratch_linear", "finetune_knn"])
def test_immiscible_stable_diffusion(place, variant):
    """Pictures become latents, classes become captions; fine-tuning starts from the published weights."""
    data = {"path": str(place / "pictures.array_record"), "companions": str(place / "sd"), "image_size": 8}
    changes = {f"data__{key}": value for key, value in data.items()} | {"data__captions": str(place / "names.txt")}
    chosen = config(f"immiscible/sd.py:{variant}", place, **changes, method__label_dropout=0.1)
    teacher = build.load_run(place / "teacher")
    chosen.model = ConfigDict({**teacher.config.model.to_dict()})
    if variant.startswith("finetune"):
        chosen.method.start = str(place / "teacher")
        started = build.experiment(chosen).init().method.params
        for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(teacher.params), strict=True):
            np.testing.assert_array_equal(a, b)
    train_and_evaluate(chosen, place / variant)
    lines = [line for line in log(place / variant) if "loss" in line]
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) for line in lines)
    assert draw(build.load_run(place / variant), num_steps=3).shape == (2, 16, 16, 3)


def test_samples_by_prompt_from_the_command(place, capsys):
    out = place / "pictures"
    argv = [f"--model={place / 'sd'}", "--prompt=a red fox", "--seeds=0-1", "--num_steps=3", "--guidance_scale=4"]
    assert call(sample, *argv, f"--out={out}") == 0
    with np.load(out / "samples.npz") as file:
        assert file["images"].shape == (2, 16, 16, 3) and file["images"].std() > 1
    assert json.loads((out / "sample.json").read_text())["prompts"] == ["a red fox"] * 2
    for wrong, message in [
        (["--prompt=a", f"--prompts={place / 'texts.txt'}"], "found --prompt and --prompts"),
        ([f"--prompts={place / 'texts.txt'}"], "has 6 lines for 2 seeds"),
        ([], "found none: give a prompt"),
        (["--prompt=a", "--labels=1"], "trained without classes"),
    ]:
        assert call(sample, argv[0], "--seeds=0-1", f"--out={place / 'none'}", *wrong) == 2
        assert message in capsys.readouterr().err


def test_a_folder_of_another_kind_is_refused(place, tmp_path, capsys):
    """A missing part, an unknown class, a weight that does not fit: each is named."""
    for change, message in [
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "it says which noise"),
        (lambda folder: edit(folder / "unet" / "config.json", _class_name="UNet3D"), "unknown class of config.json 'UNet3D'"),
        (lambda folder: edit(folder / "unet" / "config.json", class_embed_type="timestep"), "class_embed_type"),
        (lambda folder: edit(folder / "unet" / "config.json", cross_attention_dim=48), "expected .* found"),
        (lambda folder: edit(folder / "vae" / "config.json", act_fn="relu"), "act_fn"),
        (lambda folder: edit(folder / "model_index.json", _class_name="Other"), "Other"),
    ]:
        folder = tmp_path / "model"
        shutil.copytree(place / "sd", folder)
        change(folder)
        assert call(sample, f"--model={folder}", "--prompt=a", f"--out={tmp_path / 'none'}") == 2
        assert re.search(message, capsys.readouterr().err)
        shutil.rmtree(folder)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
