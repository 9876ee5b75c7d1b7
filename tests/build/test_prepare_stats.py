"""Statistics of a data set by the command: those of a direct computation, resumable, and refused where nothing fits."""

import re
from pathlib import Path

import numpy as np
import pytest

from diffjax.build import evaluation, feature_spaces, streams
from diffjax.cli import flags, prepare
from diffjax.metrics import fid, protocol, references

ROOT = Path(__file__).parent.parent.parent
COUNT = 50


def digest(images):
    return protocol.set_sha256(protocol.digests(images))


def call(*argv):
    return flags.run(prepare.__doc__, prepare.define, prepare.main, ["prepare", *map(str, argv)])


@pytest.fixture
def images(tmp_path):
    """A data set of a file, its flags."""
    values = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=values, labels=np.zeros(COUNT, np.int64))
    named = ("--config.data.name=arrays", f"--config.data.path={tmp_path / 'images.npz'}", "--config.data.image_size=4")
    return values, (f"--config={ROOT / 'configs/quick/edm_digits.py'}", *named, "--batch_size=4")


@pytest.mark.fast
def test_the_file_holds_the_statistics_and_says_of_what(images, tmp_path, capsys):
    values, argv = images
    out = tmp_path / "stats.npz"
    assert call("--stats", *argv, f"--out={out}") == 0
    assert "50 images of images.npz 4x4: 16 pixels features" in capsys.readouterr().out
    found, (mean, covariance) = references.read(out, 16), fid.pixel_statistics(values)
    # sums in another order
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-12, atol=1e-14)
    assert found.count == COUNT and found.features is None
    assert found.protocol["features"] == "pixels" and found.protocol["images_sha256"] == digest(values)
    assert not out.with_suffix(".state").exists()
    # as the evaluation opens it, it is the set of images and no file of some name
    opened = evaluation.open_reference(str(out), feature_spaces.load("pixels"))
    assert (opened.sha256, opened.source) == (digest(values), "images.npz 4x4")


def test_a_rerun_after_a_stop_writes_the_same_bytes(images, tmp_path, monkeypatch):
    _, argv = images
    whole, stopped = tmp_path / "whole.npz", tmp_path / "stopped.npz"
    assert call("--kind=stats", *argv, "--keep_features", f"--out={whole}") == 0
    read, calls = feature_spaces.features, []

    def breaks(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return read(*arguments)

    monkeypatch.setattr(feature_spaces, "features", breaks)
    # saved after each batch, to stop behind the first
    monkeypatch.setattr(streams.How, "__new__", _saving(streams.How.__new__))
    assert call("--kind=stats", *argv, "--keep_features", f"--out={stopped}") == 2
    assert not stopped.exists() and stopped.with_suffix(".state").exists()
    assert call("--kind=stats", *argv, "--keep_features", f"--out={stopped}") == 0
    assert stopped.read_bytes() == whole.read_bytes()
    batches = -(-COUNT // 32)  # of 4 images on each of 8 devices
    assert len(calls) == 2 + batches - 1  # the first batch was not read again
    assert references.read(stopped).features.shape == (COUNT, 16)


def _saving(make):
    return lambda cls, *arguments, **named: make(cls, *arguments, **{"save_every_s": 0.0, **named})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--out=stats.pkl",), "--out=stats.pkl, .* give the name of an .npz file"),
        (("--kind=latents", "--out=a.npz"), "--stats is short for --kind=stats, found --kind=latents"),
        (("--flips", "--out=a.npz"), r"found \['--flips'\] with --kind=stats, they are of --kind=latents"),
        (("--features=pixel", "--out=a.npz"), "unknown feature space 'pixel'; did you mean 'pixels'"),
        (("--weights=a.pth", "--out=a.npz"), "'pixels' takes no weights"),
        (("--features=classifier", "--out=a.npz"), "'classifier' needs weights"),
        (("--batch_size=0", "--out=a.npz"), "--batch_size=0"),
        ((), "--out is missing; for example --out=digits_pixels.npz"),
    ],
)
def test_what_does_not_fit_is_refused(images, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--stats", *images[1], *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
    assert not list(tmp_path.glob("*.state"))


def test_nothing_is_written_by_a_dry_run_and_options_of_statistics_are_refused_elsewhere(images, tmp_path, capsys):
    assert call("--stats", *images[1], "--dry_run", f"--out={tmp_path / 'a.npz'}") == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "a.npz").exists()
    assert call("--features=inception", *images[1], f"--out={tmp_path / 'a'}") == 2
    assert "with --kind=trajectories, they are of --kind=stats" in capsys.readouterr().err
