"""Published EDM pickles: files of the same structure are read exactly and become run folders; nothing in them is run.

How the files are made is in conftest.py; files made to do harm are in test_pickles.py.
"""

import functools
import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax import build
from diffjax.cli import convert, flags, sample
from diffjax.core import trees
from diffjax.sampling import generate
from diffjax.weights import edm, edm_pickle

ROOT = Path(__file__).parent.parent.parent
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'diffjax[test]'")

OPTIONS = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "use_fp16": False, "model_type": "SongUNet",
    "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1,
    "resample_filter": [1, 1], "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
    "dropout": 0.1, "augment_dim": 9,
}  # fmt: skip
NCSNPP = {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]
}  # fmt: skip
ADM = {key: OPTIONS[key] for key in ("img_resolution", "img_channels", "label_dim", "channel_mult", "num_blocks")}
ADM |= {"model_channels": 32, "attn_resolutions": [4], "model_type": "DhariwalUNet"}


def expected_params(options):
    """Abstract parameters of our network with the options of a released one."""
    return _expected_params(json.dumps(options))


@functools.cache
def _expected_params(options):
    config = edm_pickle.sections(edm_pickle.Network("EDMPrecond", json.loads(options), {}, {}))
    _, init = build.denoiser(config["model"], build.data_shape(config["data"]))
    return jax.eval_shape(init, jax.random.key(0))


def torch_weights(options) -> dict[str, np.ndarray]:
    """Random weights under PyTorch's names, by the inverse of our table, and the filters of the resampling layers."""
    random, weights = np.random.default_rng(0), {}
    taps = np.asarray(options.get("resample_filter", [1, 1]), np.float32)
    for path, leaf in trees.flatten(expected_params(options)).items():
        array = random.normal(0, 0.1, leaf.shape).astype(np.float32)
        array = np.transpose(array, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])
        name = "model." + path.replace("/", ".").replace("kernel", "weight").replace("scale", "weight")
        weights[name] = np.ascontiguousarray(array)
        parents = name.split(".")[:-1]
        if parents[-2].endswith(("_up", "_down")) and parents[-1] in ("conv0", "skip"):
            weights[".".join([*parents, "resample_filter"])] = np.outer(taps, taps)[None, None] / taps.sum() ** 2
    return weights


def call(module, *argv):
    positional = getattr(module, "POSITIONAL", ())
    return flags.run(module.__doc__, module.define, module.main, ["command", *argv], positional)


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("protocol", [3, 4])
def test_a_file_is_read_bit_equal(released, tmp_path, protocol):
    weights = torch_weights(OPTIONS)
    root = released.network(weights, OPTIONS, sigma_data=0.5, sigma_min=0, sigma_max=float("inf"))
    network = edm_pickle.read(released.write(tmp_path / "model.pkl", root, protocol))
    assert (network.kind, network.options) == ("EDMPrecond", OPTIONS)
    assert network.attributes["sigma_data"] == 0.5 and network.attributes["sigma_max"] == float("inf")
    assert network.attributes["skip_scale"] == float(np.sqrt(0.5))
    assert network.weights.keys() == weights.keys() and len(weights) > 50
    for name, array in weights.items():
        assert network.weights[name].dtype == np.float32
        np.testing.assert_array_equal(network.weights[name], array)


def test_views_and_half_precision_are_read(released, tmp_path):
    root = released.network({"model.bias": np.arange(3, dtype=np.float16)}, OPTIONS)
    storage = torch.arange(24, dtype=torch.float32)
    root.register_buffer("view", storage[2:14].reshape(3, 4).t())
    root.register_buffer("empty", storage[:0])
    weights = edm_pickle.read(released.write(tmp_path / "model.pkl", root)).weights
    np.testing.assert_array_equal(weights["view"], np.arange(2, 14, dtype=np.float32).reshape(3, 4).T)
    assert weights["empty"].shape == (0,) and weights["model.bias"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | NCSNPP, ADM], ids=["ddpmpp", "ncsnpp", "adm"])
def test_architectures_convert(released, tmp_path, options):
    weights = torch_weights(options)
    network = edm_pickle.read(released.write(tmp_path / "model.pkl", released.network(weights, options)))
    expected = expected_params(options)
    params = edm_pickle.to_params(network, expected)
    assert trees.compare(expected, params) == []
    name = "enc.8x8_block0.conv0.weight"
    kernel = params["enc"]["8x8_block0"]["conv0"]["kernel"]
    np.testing.assert_array_equal(kernel, np.transpose(weights["model." + name], (2, 3, 1, 0)))


@pytest.mark.parametrize(
    ("kind", "attributes", "sigmas"),
    [
        ("EDMPrecond", {"sigma_min": 0, "sigma_max": float("inf")}, (0.002, 80.0)),
        ("VPPrecond", {"sigma_min": 0.001, "sigma_max": 152.2}, (0.002, 80.0)),
        ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}, (0.02, 80.0)),
    ],
)
def test_sections_say_the_precondition_and_its_range(kind, attributes, sigmas):
    config = edm_pickle.sections(edm_pickle.Network(kind, OPTIONS, attributes, {}))
    assert config["model"]["precondition"] == kind[:-7].lower() and config["model"]["name"] == "ddpmpp"
    assert config["data"] == {"image_size": 8, "channels": 1, "num_classes": 3}
    assert (config["sample"]["sigma_min"], config["sample"]["sigma_max"]) == sigmas
    assert build.plan(config["sample"]).nfe == 35  # Karras 2022, table 2


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("iDDPMPrecond", {}, "class iDDPMPrecond, expected one of"),
        ("EDMPrecond", {"model_type": "UNet"}, "model_type 'UNet'"),
        ("EDMPrecond", {"decoder_type": "skip"}, "decoder_type='skip', and ddpmpp here has 'standard' built in"),
        ("EDMPrecond", {"embedding_type": "fourier"}, "encoder_type='standard', and ncsnpp here has 'residual'"),
        ("EDMPrecond", {"channel_mult_emb": 2}, "channel_mult_emb=2"),
        ("EDMPrecond", {"model_type": "DhariwalUNet"}, "adm here has no such option"),
        ("EDMPrecond", {"strange": 1}, "strange=1, and ddpmpp here has no such option"),
        ("VPPrecond", {"beta_d": 10}, "beta_d=10, and ddpmpp here has 19.9 built in"),
    ],
)
def test_networks_that_we_do_not_have_are_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        edm_pickle.sections(edm_pickle.Network(kind, OPTIONS | change, {}, {}))


# Other files -----------------------------------------------------------------------------------------------------


def test_truncated_files_are_refused(released, tmp_path):
    path = released.write(tmp_path / "model.pkl", released.network({"model.bias": np.zeros(9, np.float32)}, OPTIONS))
    whole = path.read_bytes()
    for size in {0, 1, *range(2, len(whole), len(whole) // 20), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.pkl is damaged or no network pickle"):
            edm_pickle.read(path)


def test_foreign_files_are_refused(released, tmp_path):
    path = tmp_path / "model.pkl"
    for content, message in (
        (pickle.dumps({"weights": [1]}), r"found a dict of \['weights'\], expected a dict whose 'ema' is a network"),
        (pickle.dumps([1]), "found list, expected"),
        (pickle.dumps({"ema": {}}), "expected a dict whose 'ema' is a network"),
        (pickle.dumps({"ema": released.module("Linear")}), r"found a Linear made without \['img_resolution'"),
        (b"no pickle at all", "damaged or no network pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            edm_pickle.read(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="damaged or no network pickle"):
        edm_pickle.read(path)
    released.version = 5
    path.write_bytes(pickle.dumps({"ema": released.module("EDMPrecond")}))
    with pytest.raises(ValueError, match="of version 5, expected class of version 6"):
        edm_pickle.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.map_layer0.bias": None}, "missing: map_layer0/bias"),
        ({"model.strange.weight": np.zeros((2, 2), np.float32)}, "extra: strange/kernel"),
        ({"model.map_layer0.bias": np.zeros(5, np.float32)}, r"different: map_layer0/bias, expected float32\[32\]"),
        ({"model.map_layer0.bias": np.full(32, np.nan, np.float32)}, "model.map_layer0.bias: found NaN"),
        ({"model.dec.8x8_up.skip.resample_filter": np.ones((1, 1, 2, 2), np.float32)}, "skip.resample_filter is not"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(released, tmp_path, capsys, change, message):
    weights = {name: array for name, array in (torch_weights(OPTIONS) | change).items() if array is not None}
    path = released.write(tmp_path / "model.pkl", released.network(weights, OPTIONS))
    with pytest.raises(ValueError, match=message):
        edm_pickle.to_params(edm_pickle.read(path), expected_params(OPTIONS))
    assert call(convert, "--kind=edm", f"{path}", f"{tmp_path / 'run'}") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [child.name for child in tmp_path.iterdir()] == ["model.pkl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 10**6}, r"num_blocks=1000000 with \d+ arrays"),
        ({"channel_mult": [1] * 33}, "channel_mult=list, expected a list of integers"),
        ({"channel_mult": 2}, "channel_mult=2, expected a list of integers"),
        ({"model_channels": 2**21}, "model_channels=2097152, expected an integer"),
        ({"img_resolution": "8"}, "img_resolution=str, expected an integer"),
        ({"dropout": [[0.1]]}, "dropout=list, expected a number"),
        ({"extra": {"a": 1}}, "extra=dict, expected a number or name"),
    ],
)
def test_options_that_would_build_an_endless_network_are_refused(released, tmp_path, change, message):
    root = released.network(torch_weights(OPTIONS), OPTIONS | change)
    with pytest.raises(ValueError, match=message):
        edm_pickle.read(released.write(tmp_path / "model.pkl", root))


@pytest.mark.parametrize(
    ("attach", "message"),
    [
        (lambda root, child: root._modules.update(a=child, b=child), "a is in two places"),
        (lambda root, child: root._modules.update(loop=loop()), "loop.again is in two places"),
        (lambda root, child: root._modules.update(a=[child]), "a is a list, expected a module"),
        (lambda root, child: root._parameters.update(a="text"), "a is a str, expected a tensor"),
        (lambda root, child: root._modules.update({"a" * 300: child}), "expected a short name"),
        (lambda root, child: root._modules.update({"a\x1b[2J": child}), r"a\\x1b\[2J, expected a short name"),
    ],
)
def test_trees_that_are_no_network_are_refused(released, tmp_path, attach, message):
    root = released.network({"model.bias": np.zeros(2, np.float32)}, OPTIONS)
    attach(root, root._modules["model"])
    with pytest.raises(ValueError, match=message):
        edm_pickle.read(released.write(tmp_path / "model.pkl", root))


def loop() -> torch.nn.Module:
    module = torch.nn.ModuleDict()
    module._modules["again"] = module
    return module


class Calls:
    """Pickles itself as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def test_many_views_of_one_storage_are_refused(released, tmp_path):
    """A small file whose weights, written out, would be a hundred times larger."""
    numbers = torch.zeros(1000).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.float32, _internal=True)
    storage = Calls(*(typed.__reduce__()[0], *typed.__reduce__()[1]))
    root = released.network({}, OPTIONS)
    root._parameters |= {
        f"v{i}": Calls(torch._utils._rebuild_tensor_v2, storage, 0, (1000,), (1,), False, {}) for i in range(100)
    }
    path = released.write(tmp_path / "model.pkl", root)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match="found 100,000 weights in a file of"):
        edm_pickle.read(path)


# The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(released, tmp_path):
    root = released.network(torch_weights(OPTIONS), OPTIONS, sigma_min=0, sigma_max=float("inf"), sigma_data=0.6)
    return released.write(tmp_path / "model.pkl", root)


def test_a_converted_network_samples_as_its_arrays_do(file, tmp_path):
    workdir, out = tmp_path / "runs" / "published", tmp_path / "out"
    argv = ("--solver=euler", "--num_steps=3", "--labels=2")
    assert call(convert, "--kind=edm", f"{file}", f"{workdir}") == 0
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "config.json"]
    assert [path.name for path in workdir.parent.iterdir()] == ["published"]
    assert call(sample, f"--workdir={workdir}", f"--out={out}", "--seeds=0-1", *argv) == 0

    # the same arrays in our network, by hand
    weights = {name: array for name, array in torch_weights(OPTIONS).items() if not name.endswith("resample_filter")}
    config = {
        "name": "ddpmpp", "channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attention_sizes": (4,),
        "augment_dim": 9, "sigma_data": 0.6,
    }  # fmt: skip
    shape = build.data_shape({"image_size": 8, "channels": 1, "num_classes": 3})
    denoise, init = build.denoiser(config, shape)
    params = edm.to_params(weights, jax.eval_shape(init, jax.random.key(0)))
    plan = build.plan(
        {"solver": "euler", "num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "to_zero": True}
    )
    images = generate.generate(
        denoise, params, plan, [0, 1], shape.shape, batch_size=2, seed=0, cond={"label": np.asarray([2, 2], np.int32)},
        num_classes=3,
    )  # fmt: skip
    with np.load(out / "samples.npz") as drawn:
        np.testing.assert_array_equal(drawn["images"], np.asarray(generate.to_uint8(images)))
        assert drawn["images"].std() > 10


def test_a_converted_network_teaches(file, tmp_path):
    assert call(convert, "--kind=edm", f"{file}", f"{tmp_path / 'published'}") == 0
    run = build.load_run(tmp_path / "published")
    config = flags.load_config(str(ROOT / "configs" / "quick" / "sfd_digits.py") + ":1")
    config.method.teacher = str(tmp_path / "published")
    config.train.num_devices, config.train.batch_size = 1, 8
    experiment = build.experiment(config)
    jax.tree.map(np.testing.assert_array_equal, experiment.frozen.teacher, run.params)
    state = experiment.init()
    jax.tree.map(np.testing.assert_array_equal, state.method.params, run.params)
    after, _ = jax.eval_shape(experiment.step, state, experiment.frozen, next(experiment.batches()))
    assert trees.compare(run.params, after.method.params) == []


def test_dry_run_describes_and_writes_nothing(file, tmp_path, capsys):
    assert call(convert, "--kind=edm", f"{file}", f"{tmp_path / 'run'}", "--dry_run") == 0
    text = capsys.readouterr().out
    number = sum(array.size for name, array in torch_weights(OPTIONS).items() if not name.endswith("resample_filter"))
    assert f"ddpmpp (edm), {number:,} weights" in text and "(8, 8, 1), 3 classes" in text
    assert "18 noise levels from 80.0 to 0.002: 35 network calls" in text and "was not written" in text
    assert [path.name for path in tmp_path.iterdir()] == ["model.pkl"]


@pytest.mark.parametrize("name", ["run", "run.unfinished"])
def test_nothing_is_overwritten(file, tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for more in ((), ("--dry_run",)):
        assert call(convert, "--kind=edm", f"{file}", f"{tmp_path / 'run'}", *more) == 2
        assert f"{name} exists (" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_no_folder(file, tmp_path, monkeypatch, error):
    from diffjax.runtime import configs

    def fail(*_):
        # the weights are there by now, the folder is not
        assert (tmp_path / "run.unfinished" / "checkpoints" / "0").is_dir() and not (tmp_path / "run").exists()
        raise error

    monkeypatch.setattr(configs, "write", fail)
    with pytest.raises(type(error)):
        call(convert, "--kind=edm", f"{file}", f"{tmp_path / 'run'}", "--traceback")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pkl"]
