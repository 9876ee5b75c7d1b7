"""Every config and variant builds abstractly, with the published parameter counts, and is compared with its golden text.

The texts under tests/golden/configs show every value that moved. To accept a change:

    DIFFJAX_WRITE_GOLDEN=1 bash launch/test.sh -k golden_text
"""

import ast
import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import companions
from diffjax.cli import flags, inspect
from diffjax.core import trees
from diffjax.runtime import configs
from diffjax.train import loop

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
WRITE = "DIFFJAX_WRITE_GOLDEN"

CALLS, STUDENTS = ("1", "2", "3", "4", "5"), ("2", "3", "4", "5", "v", "second")
HALVED = ("512", "1")  # the ends of the chain
# file -> its variants; evaluations are no experiments
EXPERIMENTS = {
    "quick/edm_digits.py": ("",),
    "quick/edm_cifar16.py": ("",),
    "quick/sfd_digits.py": ("", *CALLS, "v", "second"),
    "quick/sfd_cifar16.py": (*CALLS, "v", "second"),
    "quick/pd_digits.py": ("16", "1"),
    "quick/pd_cifar16.py": ("16", "1"),
    "quick/amed_digits.py": ("1", "4"),
    "quick/amed_cifar16.py": ("1", "4"),
    "edm/cifar10_ddpmpp.py": ("cond", "uncond"),
    "edm/imagenet64_adm.py": ("", "stochastic"),
    "sfd/cifar10.py": STUDENTS,
    "sfd/imagenet64.py": STUDENTS,
    "sfd/sd_v15.py": ("v",),
    "sfd/lsun_bedroom.py": ("2", "5"),
    "pd/cifar10.py": HALVED,
    "pd/imagenet64.py": HALVED,
    "pd/cifar10_guided.py": ("match", *HALVED),
    "pd/imagenet64_guided.py": ("match", *HALVED),
    "amed/cifar10.py": ("plugin5", "plugin10", "solver3"),
    "amed/imagenet64.py": ("plugin5", "plugin10", "solver3"),
    "quick/immiscible_digits.py": ("consistency_none", "flow_linear", "ddim_knn", "flow_labels_class", "consistency_auction"),
    "immiscible/ddim_cifar10.py": ("none", "knn"),
    "immiscible/flow_cifar10.py": ("linear", "knn"),
    "immiscible/consistency_cifar10.py": ("training_linear", "fixed_none", "ict_auction", "distillation_knn"),
    "immiscible/consistency_celeba.py": ("linear",),
    "immiscible/consistency_tiny_imagenet.py": ("knn",),
    "immiscible/sd.py": ("scratch_linear", "finetune_knn"),
    "quick/text_to_image_digits.py": ("",),
    "quick/text_to_image_cifar16.py": ("",),
    "conditioning/imagenet.py": (
        "mmdit_256_improved", "mmdit_512_improved", "dit_256_baseline", "mdt_512_improved", "pixart_256_improved",
        "unet_256_baseline", "dit_512_improved_ddpm_v", "mmdit_256_improved_flow",
    ),  # fmt: skip
    "conditioning/cc12m.py": (
        "mmdit_256_improved", "mmdit_512_baseline", "pixart_256_improved", "unet_256_baseline_edm",
    ),
    "quick/conditioning_digits.py": (
        "size_alpha_4", "size_constant", "text_noisy_replicate", "switch_rescaled", "bf16_qk_norm",
    ),
    "quick/emd_digits.py": ("emd_16", "emd_16_raw", "diff_instruct", "forward_kl", "dmd", "sds"),
    "emd/cifar10.py": ("emd_16", "diff_instruct", "dmd"),
    "emd/imagenet64.py": ("emd_16", "diff_instruct", "dmd2"),
    "emd/sd_v15.py": ("",),
    "quick/video_digits.py": ("",),
    "quick/video_clips.py": ("",),
    "quick/classifier_digits.py": ("",),
    "quick/classifier_cifar10.py": ("",),
}
EVALUATIONS = {
    "quick/compare_digits.py": ("",), "quick/compare_sfd.py": ("digits", "cifar10"), "quick/compare_emd.py": ("",),
    "quick/compare_immiscible.py": ("",), "quick/compare_conditioning.py": ("",),
    "quick/compare_video.py": ("",), "quick/evaluate_digits.py": ("",), "evaluate/cifar10.py": ("uncond", "cond"),
    "evaluate/imagenet64.py": ("deterministic", "stochastic", "adm"),
}  # fmt: skip
# folders that configs name as teachers -> the config of that run
TEACHERS = {
    r"runs/quickstart/teacher": "quick/edm_digits.py",
    r"runs/sfd_cifar10/teacher": "quick/edm_cifar16.py",
    r"runs/sfd_digits/seed_0/student_v": "quick/sfd_digits.py:v",
    r"runs/sfd_cifar10/seed_0/student_v": "quick/sfd_cifar16.py:v",
    r"runs/sfd_digits/seed_0/pd_(\d+)": "quick/pd_digits.py:",
    r"runs/sfd_cifar10/seed_0/pd_(\d+)": "quick/pd_cifar16.py:",
    r"runs/edm_cifar10": "edm/cifar10_ddpmpp.py:uncond",
    r"runs/edm_cifar10_cond_null": "edm/cifar10_ddpmpp.py:cond",
    r"runs/edm_imagenet64(_null)?": "edm/imagenet64_adm.py",
    r"runs/sfd_cifar10_full_v": "sfd/cifar10.py:v",
    r"runs/sfd_imagenet64_v": "sfd/imagenet64.py:v",
    r"runs/sd1[45]": "immiscible/sd.py:scratch_none",
    r"runs/pd_cifar10_(\d+)": "pd/cifar10.py:",
    r"runs/pd_imagenet64_(\d+)": "pd/imagenet64.py:",
    r"runs/guided_pd_cifar10_(\w+)": "pd/cifar10_guided.py:",
    r"runs/guided_pd_imagenet64_(\w+)": "pd/imagenet64_guided.py:",
}
# Karras 2022; the CIFAR-10 teacher of Zhou 2024
PARAMETERS = {"edm/cifar10_ddpmpp.py:uncond": 55_733_891}
# network -> what stands for all of its blocks, which take a minute to trace where several networks train one another;
# tests/build/test_full_size.py traces the published sizes of latent networks
ONE = {"num_blocks": 1}
FEWER = {"ddpmpp": ONE, "ncsnpp": ONE, "adm": ONE, "unet": {**ONE, "channel_mult": (1, 2), "transformer_depth": (1, 0)}}
ALL = [f"{file}:{arg}".rstrip(":") for file, args in (EXPERIMENTS | EVALUATIONS).items() for arg in args]
# whose name, or whose method, says how many calls a sample costs
NAMED = [name for name in ALL if name.partition(":")[0] in EXPERIMENTS and not re.search("immiscible|conditioning|video|classifier", name)]
# Traced as a whole, which takes seconds each: every method and network, with fewer blocks but for one of the published
# size. What is left out differs from these in numbers only.
BUILT = [
    "quick/conditioning_digits.py:size_alpha_4", "quick/edm_digits.py", "quick/edm_cifar16.py", "quick/sfd_digits.py:2", "quick/sfd_digits.py:v",
    "quick/sfd_digits.py:second", "quick/pd_digits.py:16", "quick/amed_digits.py:4", "edm/cifar10_ddpmpp.py:uncond",
    "sfd/cifar10.py:second", "pd/cifar10_guided.py:match", "quick/emd_digits.py:emd_16",
    "quick/emd_digits.py:dmd", "quick/emd_digits.py:sds", "quick/emd_digits.py:forward_kl", "emd/imagenet64.py:dmd2",
    "quick/immiscible_digits.py:consistency_auction", "quick/immiscible_digits.py:flow_linear",
    "quick/immiscible_digits.py:ddim_knn", "immiscible/consistency_cifar10.py:distillation_knn",
    "sfd/sd_v15.py:v", "emd/sd_v15.py", "immiscible/sd.py:finetune_knn", "quick/video_digits.py", "quick/video_clips.py",
    "quick/classifier_cifar10.py",
]  # fmt: skip


def load(name: str) -> ConfigDict:
    return flags.load_config(str(ROOT / "configs" / name))


@pytest.fixture
def abstract_teachers(monkeypatch):
    """Teachers without runs: their configs, and weights of the right shapes that take no memory."""
    monkeypatch.setattr(build.runs, "load_run", lambda workdir: blank_run(config_of(workdir)))
    monkeypatch.setattr(build.planned.configs, "read", lambda workdir: runnable(config_of(workdir)).to_dict())
    monkeypatch.setattr(build.companions, "load_companions", blank_companions)


def blank_companions(folder) -> companions.Companions:
    """Shapes of Stable Diffusion 1's texts and latents: its real parts run in test_latent_runs, in small."""
    text = companions.TextEncoder(
        lambda texts: {"tokens": np.zeros((len(texts), 77), np.int32)},
        lambda params, tokens: {"text": jnp.zeros((*tokens["tokens"].shape, 768))}, {},
    )  # fmt: skip
    encode = lambda params, images, key: jnp.zeros((len(images), images.shape[1] // 8, images.shape[2] // 8, 4))  # noqa: E731
    return companions.Companions(folder, text, companions.Autoencoder(encode, None, {}, 8, 3))


def config_of(workdir) -> str:
    """The config of the run that a config names as its teacher."""
    (found,) = [(name, match) for pattern, name in TEACHERS.items() if (match := re.fullmatch(pattern, str(workdir)))]
    name, match = found
    return name + match[1] if name.endswith(":") else name


def runnable(name: str, whole: bool = False) -> ConfigDict:
    """The config as it is run here: without LPIPS's weights, with a null class where that is the user's to add, and
    with FEWER blocks unless `whole`."""
    config = load(name)
    if not whole:
        config.model.update(FEWER.get(config.model.name, {}))
    if config.method.get("perceptual"):
        config.method.perceptual.network = ""
        if config.method.name == "consistency":
            config.method.metric = "pseudo_huber"
    if "companions" in config.data or config.data.name == "prompts":
        config.train.update({"batch_size": 8, "total_images": 64})  # pictures are large
    if config.method.name == "edm":
        config.method.label_dropout = 0.1 if config.data.num_classes else 0.0
    return config


@functools.cache
def blank_run(name: str) -> build.Run:
    config = build.resolve(runnable(name))
    shape = build.data_shape(config.data)
    denoise, init = build.denoiser(config.model, shape)
    params = jax.eval_shape(init, jax.random.key(0))
    blank = jax.tree.map(lambda x: np.broadcast_to(x.dtype.type(0), x.shape), params)
    return build.Run(config, denoise, blank, 0, shape, null_class=bool(config.data.num_classes))


def test_every_config_file_is_listed():
    files = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.py")}
    assert files == set(EXPERIMENTS | EVALUATIONS)


@pytest.mark.parametrize("name", BUILT)
def test_builds_and_steps_abstractly(name, abstract_teachers, tmp_path):
    config = runnable(name, whole=name in PARAMETERS)
    blank = inspect.with_blank_data(build.resolve(config), tmp_path)
    experiment = build.experiment(blank)
    state = jax.eval_shape(experiment.init)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), experiment.frozen)
    new_state, metrics = jax.eval_shape(experiment.step, state, abstract, next(experiment.batches()))
    assert trees.compare(state, new_state) == []
    assert metrics["loss"].shape == ()
    assert loop.Settings.from_config(config.train.to_dict()).total_steps > 0
    if name in PARAMETERS:
        assert trees.count(state.method.params) == PARAMETERS[name]


@pytest.mark.fast
def test_the_quick_config_builds(tmp_path):
    blank = inspect.with_blank_data(load("quick/edm_digits.py"), tmp_path)
    assert trees.count(jax.eval_shape(build.experiment(blank).init).method.params) > 0


@pytest.mark.parametrize("name", NAMED)
def test_a_student_calls_the_network_as_often_as_its_name_says(name):
    config, said = load(name), re.search(r"(\d*)$", name.partition(":")[2])[1]
    if config.method.name == "edm":
        assert build.plan(config.sample).nfe == {18: 35, 40: 79, 256: 511}[config.sample.num_steps]
        return
    if config.method.name == "emd":
        assert build.runs.student_plan(config.method).nfe == 1
        return
    calls = tuple(build.runs.student_plan(config.method, num).nfe for num in build.trained_steps(config.method))
    by_word = {"": (2,), "v": (2, 3, 4, 5), "second": (1,), "match": (512,)}
    assert calls == ((int(said),) if said else by_word[name.partition(":")[2]])


@pytest.mark.parametrize("name", ALL)
def test_golden_text(name):
    path = GOLDEN / (name.replace("/", "_").replace(".py", "").replace(":", "_") + ".txt")
    text = flags.expand(load(name)) + "\n"
    if os.environ.get(WRITE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no golden text of {name}: run with {WRITE}=1"
    assert text == path.read_text(encoding="utf-8"), f"{name} changed; if it should, run with {WRITE}=1"


def test_every_golden_text_belongs_to_a_config():
    expected = {name.replace("/", "_").replace(".py", "").replace(":", "_") + ".txt" for name in ALL}
    assert {path.name for path in GOLDEN.glob("*.txt")} == expected


@pytest.mark.parametrize("name", ALL)
def test_a_config_survives_its_file(name):
    """config.json gives the config back: nothing but plain values."""
    config = load(name)
    assert configs.differences(configs.to_plain(config), config) == ([], [])


def test_a_network_is_the_same_from_the_lists_of_a_file():
    config = load("edm/cifar10_ddpmpp.py:uncond")
    model = configs.to_plain(config.model)
    assert isinstance(model["channel_mult"], list)
    init = build.denoiser(model, build.data_shape(config.data))[1]
    assert trees.count(jax.eval_shape(init, jax.random.key(0))) == PARAMETERS["edm/cifar10_ddpmpp.py:uncond"]


@pytest.mark.parametrize("file", EXPERIMENTS | EVALUATIONS)
def test_header_and_length(file):
    """The file opens with its command, hardware and expectation; the command names the file itself."""
    source = (ROOT / "configs" / file).read_text(encoding="utf-8")
    header = ast.get_docstring(ast.parse(source))
    module = "train" if file in EXPERIMENTS else "evaluate"
    assert re.search(rf"python -m diffjax\.cli\.{module} --config=configs/{re.escape(file)}\S* --workdir=runs/", header)
    assert "Hardware" in header
    assert file in EVALUATIONS or "Expect" in header
    assert len(source.splitlines()) <= 85


@pytest.mark.parametrize("file", EXPERIMENTS | EVALUATIONS)
def test_an_unknown_variant_is_refused_with_what_to_type(file):
    with pytest.raises(ValueError, match="leave out what follows|type "):
        load(f"{file}:nonsense")


def test_the_second_stage_asks_for_the_weights_of_its_loss(abstract_teachers):
    with pytest.raises(ValueError, match="perceptual.backbone is empty: give torchvision's file"):
        build.experiment(load("sfd/cifar10.py:second"))


def test_published_settings():
    """Karras 2022's and Zhou 2024's training settings, beside the golden texts because these must not move."""
    cifar, imagenet = load("edm/cifar10_ddpmpp.py:cond"), load("edm/imagenet64_adm.py")
    assert (cifar.train.batch_size, cifar.optim.learning_rate, cifar.train.total_images) == (512, 1e-3, 200_000_000)
    assert (imagenet.train.batch_size, imagenet.optim.learning_rate, imagenet.train.total_images) == (
        4096,
        1e-4,
        2_500_000_000,
    )
    for name, rate, factor in (("sfd/cifar10.py:2", 5e-5, 4), ("sfd/imagenet64.py:5", 1e-5, 4)):
        config = load(name)
        assert (config.optim.learning_rate, config.method.teacher_factor, config.train.batch_size) == (rate, factor, 128)
        assert config.train.total_images == 200_000 and config.method.sigma_min == 0.006
    assert load("sfd/imagenet64.py:5").method.num_steps == 7
    second = load("sfd/cifar10.py:second")
    assert (second.optim.learning_rate, second.train.total_images) == (5e-4, 2_000_000)
    assert (second.method.num_steps, second.method.teacher_factor, second.method.teacher_afs) == (3, 3, True)
    assert load("sfd/cifar10.py:v").train.total_images == 800_000
    plugin, solver = load("amed/cifar10.py:plugin5").method, load("amed/cifar10.py:solver3").method
    assert (plugin.teacher_factor, plugin.scale_time, solver.teacher_factor, solver.grid) == (3, 0.2, 2, "time_uniform")
    two_calls = load("sfd/cifar10.py:2")
    iterations = -(-two_calls.train.total_images // two_calls.train.batch_size)
    # published: an update at every level but the last, and the first one is analytical
    assert iterations * (two_calls.method.num_steps - 2) == 3126
