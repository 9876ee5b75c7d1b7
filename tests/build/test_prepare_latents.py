"""From pictures to cached latents and on to a trained network, by a tiny Stable Diffusion with drawn weights."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny_folders
from ml_collections import ConfigDict

from diffjax import build
from diffjax.build import cached, companions, encoded, parts
from diffjax.cli import flags, prepare
from diffjax.cli.train import train_and_evaluate
from diffjax.core import rng
from diffjax.data import crops, latents, sources, synthetic

NUM, PIXELS = 10, 16
METADATA = {"high": ("top", "left", "flip", "aspect"), "low": ("height", "width")}


def call(*argv):
    return flags.run(prepare.__doc__, prepare.define, prepare.main, ["prepare", *map(str, argv)])


@pytest.fixture(scope="module")
def place(transformers, tmp_path_factory):
    """The model `sd`, and `photos`, a folder with a tar of drawn pictures that were ten times as large."""
    folder = tmp_path_factory.mktemp("prepare")
    tiny_folders.stable_diffusion(transformers, folder / "sd")
    (folder / "photos").mkdir()
    source = synthetic.Shapes(NUM, captions=True)
    with tarfile.open(folder / "photos" / "0.tar", "w") as archive:
        for index in range(NUM):
            image, buffer = source[index]["image"], io.BytesIO()
            PIL.Image.fromarray(image).save(buffer, "PNG")
            facts = {"height": 10 * image.shape[0], "width": 10 * image.shape[1]}
            facts["caption"] = str(source[index]["caption"])
            for name, data in ((f"{index}.png", buffer.getvalue()), (f"{index}.json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def config(place, **changes) -> ConfigDict:
    """Two steps of four: a DiT of two blocks on the pictures of the tar, told of texts, sizes, crops and flips."""
    config = flags.load_config("configs/immiscible/sd.py:scratch_none")
    config.data = ConfigDict({
        "name": "webdataset", "path": str(place / "photos"), "captions": "own", "companions": str(place / "sd"),
        "image_size": 8, "channels": 4, "num_classes": 0,
    })  # fmt: skip
    config.model = ConfigDict({
        "name": "dit", "precondition": "eps", "process": "scaled_linear", "width": 32, "depth": 2, "heads": 2,
        "condition": "attention", "text_width": 32, "text_padding": {"kind": "noisy_replicate"}, "metadata": METADATA,
    })  # fmt: skip
    config.method.update({"label_dropout": 0.25, "control_dropout": 0.25})
    config.train.update({"batch_size": 4, "total_images": 8, "log_every_steps": 1, "sample_every_steps": 2})
    config.train.num_devices = 1
    for key, value in changes.items():
        section, name = key.split("__")
        with config[section].unlocked():
            config[section][name] = value
    return config


def of_latents(place, **changes) -> ConfigDict:
    """The same, of the folder `cache`."""
    own = {"data__name": "latents", "data__path": str(place / "cache"), "data__captions": ""}
    return config(place, **own | changes)


@pytest.fixture(scope="module")
def cache(place):
    """`cache`: two windows of each picture, each mirrored too, by the command."""
    argv = ["--kind=latents", "--config=configs/immiscible/sd.py", f"--out={place / 'cache'}"]
    argv += ["--crop=random", "--num_crops=2", "--flips"]
    argv += [f"--config.data.{key}={value}" for key, value in config(place).data.items()]
    assert call(*argv) == 0
    return place / "cache"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_those_of_each_window(place, cache):
    """Cut, encoded and tokenised again by other means, in batches of another size."""
    beside = companions.load_companions(str(place / "sd"))
    source = sources.load("latents", sources.DataShape(8, 4), path=str(cache))
    assert len(source) == 4 * NUM and source.header["captions"] == 4 * NUM
    for index in (0, NUM - 1):
        original = synthetic.Shapes(NUM, captions=True)[index]
        for number in range(4):
            generator = np.random.default_rng([42, index, number // 2])  # 42: the config's seed
            picture, told = crops.crop(original["image"], PIXELS, "random", generator, number % 2 == 1)
            item = source[4 * index + number]
            vae = beside.autoencoder
            expected = np.asarray(vae.moments(vae.params, picture[None]))[0]
            # float16 has 11 bits: half of the last one is 2^-12 of a number, and convolutions are rounded in float32
            np.testing.assert_allclose(item["moments"], expected, rtol=2**-11, atol=1e-4)
            assert all(float(item[key]) == told[key] for key in ("top", "left", "flip"))
            assert (item["height"], item["width"]) == tuple(10 * side for side in original["image"].shape[:2])
            text = str(original["caption"])
            assert source.caption(4 * index + number) == text
            ids = beside.text.tokenise([text])["tokens"][0]
            n = int(np.argmax(ids == ids.max())) + 1  # the end token has the highest number
            assert item["text_length"] == n
            tokens = beside.condition([text])["text"][0, :n]
            np.testing.assert_allclose(item["text"][:n], tokens, rtol=2**-11, atol=1e-4)
            assert not item["text"][n:].any()
    mirrored, plain = (np.asarray(source[i]["moments"], np.float32) for i in (1, 0))
    assert np.abs(mirrored - plain[:, ::-1]).max() > 0.01  # an autoencoder is not flip-equivariant


def test_drawn_latents_are_those_of_encoding(place, cache):
    """The key of the batch's number draws what it would have drawn of the pictures, also after a restart."""
    beside = companions.load_companions(str(place / "sd"))
    batches = build.experiment(of_latents(place)).batches()
    raw = parts.loader.make_batches(parts.source_of(of_latents(place).data), 4, 42)
    next(batches), next(raw)
    state = json.loads(json.dumps(batches.get_state()))
    next(batches)
    batches.set_state(state)
    for number in (1, 2):
        batch, stored = next(batches), next(raw)
        vae, key = beside.autoencoder, rng.stream(42, "encode", jnp.uint32(number))
        expected = vae.draw(stored["moments"], key)
        np.testing.assert_array_equal(batch["image"], expected)
        mean, logvar = np.split(stored["moments"].astype(np.float32), 2, axis=-1)
        noise = jax.random.normal(key, mean.shape)
        np.testing.assert_allclose(expected, (mean + np.exp(logvar / 2) * noise) * 0.18215, rtol=1e-5, atol=1e-6)
        assert batch["image"].dtype == jnp.float32 and "moments" not in batch
        for name in ("height", "width", "top", "left", "flip", "aspect"):
            assert batch[name].shape == (4,) and batch[name].dtype == np.float32
        # as many slots as the encoder has, zeros behind the real tokens
        slots = [(0, 0), (0, 77 - stored["text"].shape[1]), (0, 0)]
        np.testing.assert_array_equal(batch["text"], np.pad(stored["text"], slots))
        assert batch["text_length"].tolist() == stored["text_length"].tolist()
        assert batch["negative_text"].shape == (4, 77, 32) and batch["negative_text_length"].tolist() == [2] * 4
    image = np.full((3, PIXELS, PIXELS, 3), 90, np.uint8)
    direct = vae.encode(vae.params, image / np.float32(127.5) - 1, key)
    np.testing.assert_allclose(vae.draw(vae.moments(vae.params, image), key), direct, atol=1e-6)


def test_trained_on(place, cache):
    """Two steps, a grid of samples of the captions, and samples that are told a size and a flip."""
    train_and_evaluate(of_latents(place), place / "run")
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(line["loss"]) for line in lines if "loss" in line] == [True, True]
    with PIL.Image.open(place / "run" / "samples" / "final.png") as picture:
        assert np.asarray(picture).std() > 1
    run = build.load_run(place / "run")
    plan, options = build.run_plan(run, num_steps=3), dict(batch_size=1, prompts=["a red circle"])
    for told in ({}, {"flip": 1, "height": 50}):
        images = build.draw(run, plan, 0, [0], metadata=told, **options)
        assert images.shape == (1, PIXELS, PIXELS, 3) and np.isfinite(images).all()


def test_interrupted_and_shared_preparations_are_the_same(place, tmp_path):
    """Bit for bit, with the real encoders: stopped within a shard, and by two processes."""
    job = cached.job(config(place), cached.Crops("random", flips=True))
    options = {"shard_images": 4}
    list(latents.write(tmp_path / "whole", *job, **options))
    writing = latents.write(tmp_path / "part", *job, **options)
    assert next(done for done in writing if done == 6)
    writing.close()
    list(latents.write(tmp_path / "part", *job, **options))
    for process in (0, 1):
        list(latents.write(tmp_path / "two", *job, **options, process=process, num_processes=2))
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "part") == whole and files(tmp_path / "two") == whole
    header = json.loads(whole["latents.json"])
    assert header["made_for"]["autoencoder"]["folder"] == "sd" and len(header["shards"]) == 3
    assert header["records"] == 2 * NUM and header["made_for"]["data"]["name"] == "webdataset"


def test_classes_of_real_pictures(place, cifar10_dir, tmp_path):
    """CIFAR-10 with its labels, by companions that could read texts."""
    data = {"name": "tfds", "dataset": "cifar10", "split": "test[:20]", "data_dir": cifar10_dir}
    data |= {"companions": str(place / "sd"), "image_size": 8, "channels": 4, "num_classes": 10}
    chosen = config(place)
    chosen.data = ConfigDict(data)
    job = cached.job(chosen, cached.Crops(flips=True))
    list(latents.write(tmp_path / "cache", *job))
    source = sources.load("latents", sources.DataShape(8, 4, 10), path=str(tmp_path / "cache"))
    plain = {key: data[key] for key in ("dataset", "split", "data_dir")}
    pictures = sources.load("tfds", sources.DataShape(32, 3, 10), **plain)
    assert [int(source[i]["label"]) for i in range(40)] == [int(pictures[i // 2]["label"]) for i in range(40)]
    assert [float(source[1][key]) for key in ("height", "width", "top", "left", "flip")] == [32, 32, 0, 0, 1]
    kept = {key: value for key, value in data.items() if key not in plain}
    chosen.data = ConfigDict(kept | {"name": "latents", "path": str(tmp_path / "cache")})
    batch = next(parts.batches(chosen)())
    assert set(batch) == {"image", "label", "aspect", *latents.METADATA}


def test_texts_of_classes_say_what_is_mirrored(place, cifar10_dir, tmp_path):
    data = {"name": "tfds", "dataset": "cifar10", "split": "test[:3]", "data_dir": cifar10_dir, "captions": "cifar10"}
    chosen = config(place)
    chosen.data = ConfigDict(data | {"companions": str(place / "sd"), "image_size": 8, "channels": 4, "num_classes": 0})
    list(latents.write(tmp_path / "cache", *cached.job(chosen, cached.Crops(flips=True))))
    source = sources.load("latents", sources.DataShape(8, 4), path=str(tmp_path / "cache"))
    beside = companions.load_companions(str(place / "sd"))
    for index in range(3):
        plain, mirrored = (source.caption(2 * index + flip) for flip in (0, 1))
        assert plain.startswith("a photo of ") and mirrored == plain + ", mirrored"
        for flip, text in enumerate((plain, mirrored)):
            item, found = source[2 * index + flip], beside.condition([text])
            assert item["flip"] == flip and item["text_length"] == found["text_length"][0]
            tokens = found["text"][0, : item["text_length"]]
            # float16, and convolutions are rounded in float32
            np.testing.assert_allclose(item["text"][: len(tokens)], tokens, rtol=2**-11, atol=1e-4)


def test_a_picture_that_is_damaged_later_is_named(place, tmp_path, capsys):
    """Behind those that are read at the start; it ends the command with a message, and the shard is not there."""
    source = cached.job(config(place), cached.Crops())
    folder, tar = tmp_path / "cache", place / "photos" / "0.tar"
    whole = tar.read_bytes()
    data = bytearray(whole)
    start = whole.index(b"\x89PNG", whole.index(b"7.png"))
    data[start : start + 8] = bytes(8)
    try:
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"unreadable picture .*0.tar/7.png") as error:
            list(latents.write(folder, *source))
        assert flags._is_message(error.value)
    finally:
        tar.write_bytes(whole)
    assert not list(folder.glob("*.array_record"))
    assert list(latents.write(folder, *source))[-1] == NUM


def test_dry_run_prints_sizes(place, tmp_path, capsys):
    argv = ["--kind=latents", "--config=configs/immiscible/sd.py", f"--out={tmp_path / 'none'}", "--dry_run"]
    imagenet = ["--num_images=1281167", "--flips", "--config.data.captions=", "--config.data.path=absent"]
    assert call(*argv, *imagenet) == 0
    text = capsys.readouterr().out
    assert "1,281,167 pictures x 2 (crops, flips) = 2,562,334 records of 16,412 bytes" in text and "42.1 GB" in text
    assert call(*argv, "--num_images=11000000", "--config.data.image_size=64", "--config.data.companions=absent") == 0
    text = capsys.readouterr().out
    assert "721 GB" in text and "its text, which is not counted" in text
    own = [f"--config.data.{key}={value}" for key, value in config(place).data.items()]
    assert call(*argv, *own) == 0
    # 8 x 8 x 8 of float16, 28 of metadata, at most 77 tokens and one vector of 32
    text = capsys.readouterr().out
    assert "10 pictures x 1 (crops, flips) = 10 records of 6,044 bytes (of them at most 4,992 of text)" in text
    assert not (tmp_path / "none").exists()


def test_refusals_of_the_command(place, cache, tmp_path, capsys):
    own = [f"--config.data.{key}={value}" for key, value in config(place).data.items()]
    argv, texts = ["--kind=latents", "--config=configs/immiscible/sd.py", *own], place / "sd" / "model_index.json"
    for wrong, message in [
        (["--kind=latent"], "unknown --kind 'latent'; did you mean 'latents'"),
        (["--crop=center"], "unknown crop 'center'; did you mean 'centre'"),
        (["--crop=native"], "expected size above 0 and high of at least 16"),
        (["--num_crops=3"], "found num_crops=3 of 'centre', expected 1"),
        (["--config.data.channels=3"], "found data.channels=3, and latents of"),
        (["--process=1"], "--process and --num_processes go together"),
        (["--num_images=5"], "--num_images is of --dry_run"),
        (["--config.data.companions="], "data.companions is empty"),
        (["--config.data.mirrored=True", "--config.data.captions=cifar10"], ": leave data.mirrored out"),
        (["--config.data.name=prompts", "--config.data.captions=", f"--config.data.path={texts}"],
         "has no pictures: latents are made of these"),
        ([f"--out={cache}"], "holds finished latents"),
        (["--kind=trajectories", "--flips"], r"found ['--flips'] with --kind=trajectories"),
    ]:  # fmt: skip
        assert call(*argv, f"--out={tmp_path / 'x'}", *wrong) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_runs_that_do_not_fit_are_refused(place, cache):
    """Before anything is computed, with the reason."""
    for changes, message in [
        ({"data__flip": True}, "does not turn a mirrored picture into mirrored latents: prepare both with --flips"),
        ({"data__companions": "", "method__label_dropout": 0.0}, "needs data.companions"),
        ({"data__captions": "own"}, "cached latents have the texts they were prepared with"),
        ({"model__text_padding": None}, "cached texts have no padding"),
        ({"data__num_classes": 3, "model__text_width": 0}, "has 0 labels for 40 records"),
        ({"data__image_size": 16}, "holds latents of 8x8x4"),
    ]:
        with pytest.raises(ValueError, match=message):
            build.experiment(of_latents(place, **changes))
    with pytest.raises(ValueError, match="cached latents hold no images"):
        build.all_images(of_latents(place).data)
    header = json.loads((cache / latents.HEADER).read_text())
    beside = companions.load_companions(str(place / "sd"))
    for part, what in (("autoencoder", "autoencoder"), ("text_encoder", "text encoder")):
        other = {**header, "made_for": {**header["made_for"], part: {"folder": "other", "weights": "0"}}}
        with pytest.raises(ValueError, match=f"made with the {what} in 'other', that in .* has other weights"):
            encoded.check(other, beside, {"text_padding": {}})
    with pytest.raises(ValueError, match="needs data.companions: the folder whose autoencoder"):
        encoded.check(header, beside._replace(autoencoder=None), {})
    with pytest.raises(ValueError, match="have texts, and data.companions=.* no text encoder"):
        encoded.check(header, beside._replace(text=None), {})


def test_another_decoder_fits_and_another_encoder_does_not(place):
    beside = companions.load_companions(str(place / "sd"))

    def changed(part):
        params = jax.tree.map(lambda leaf: leaf, beside.autoencoder.params)
        params[part]["conv_in"]["kernel"] = params[part]["conv_in"]["kernel"] + 1e-3
        return beside._replace(autoencoder=beside.autoencoder._replace(params=params))

    assert encoded.autoencoder(changed("decoder")) == encoded.autoencoder(beside)
    assert encoded.autoencoder(changed("encoder")) != encoded.autoencoder(beside)


@pytest.mark.fast
def test_pixels_are_told_their_flips(tmp_path):
    """A network on pixels, data.metadata and data.flip: the flip is drawn on the device, and told."""
    config = ConfigDict({"data": {"flip": True}, "model": {}})
    images = np.random.default_rng(0).uniform(-1, 1, (64, 4, 6, 1)).astype(np.float32)
    batch = {"image": images, "flip": np.zeros(64, np.float32), "left": np.ones(64, np.float32)}
    found = parts.prepare(config)(batch, jax.random.key(0))
    flipped = (np.asarray(found["image"]) == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 10 < flipped.sum() < 54  # 32 expected, five standard deviations of 4
    np.testing.assert_array_equal(found["flip"], flipped.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(found["image"])[~flipped], images[~flipped])
