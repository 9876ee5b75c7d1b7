"""Addresses of buckets, and what is said of one that does not answer."""

import time

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from diffjax.runtime import buckets, checkpoint, configs

NOBODYS = "gs://diffjax-nobody-has-this/run"


@pytest.mark.fast
def test_a_run_says_where_its_checkpoints_are(tmp_path):
    own = epath.Path(tmp_path / "checkpoints")
    assert checkpoint.place(tmp_path) == checkpoint.place(tmp_path, {"train": {}}) == own
    assert str(checkpoint.place(tmp_path, {"train": {"checkpoint_folder": NOBODYS}})) == NOBODYS
    elsewhere = {"train": {"checkpoint_folder": str(tmp_path / "disk")}}
    assert checkpoint.place(tmp_path / "run", elsewhere) == epath.Path(tmp_path / "disk")
    (tmp_path / "run").mkdir()
    configs.write(tmp_path / "run", elsewhere)
    assert checkpoint.place(tmp_path / "run") == epath.Path(tmp_path / "disk")
    with checkpoint.Checkpoints(tmp_path / "run", elsewhere) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3)}, None, {})
    assert checkpoint.steps(tmp_path / "run") == [1] and (tmp_path / "disk" / "1").exists()


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket", "gs://bucket/", "gs:///run", "http://a/b"])
def test_addresses_that_cannot_be(tmp_path, address):
    with pytest.raises(ValueError, match="expected gs://BUCKET/FOLDER, or a path"):
        checkpoint.place(tmp_path, {"train": {"checkpoint_folder": address}})


def test_a_bucket_that_does_not_answer_is_named_within_the_time_and_so_is_the_remedy():
    """Without network, credentials or the bucket; with all, no bucket of this name is anybody's."""
    start = time.monotonic()
    with pytest.raises(buckets.BucketError) as caught:
        buckets.probe(epath.Path(NOBODYS), patience_s=3)
    assert time.monotonic() - start < 30
    text = str(caught.value)
    assert "the bucket diffjax-nobody-has-this" in text and "cannot be written and read: " in text
    assert "gcloud auth application-default login" in text and "gcloud storage ls gs://diffjax-nobody-has-this" in text


def test_a_run_ends_before_any_work_when_its_bucket_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE_S", 2.0)
    config = {"train": {"checkpoint_folder": NOBODYS}}
    with pytest.raises(checkpoint.CheckpointError, match="the bucket diffjax-nobody-has-this of .* cannot be written"):
        checkpoint.check_place(tmp_path, config, {"a": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_a_folder_that_can_be_used_is_left_as_it_was(tmp_path):
    buckets.probe(epath.Path(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_keeps_other_bytes_is_no_place_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_text", lambda path: "other")
    with pytest.raises(buckets.BucketError, match="and read 'other'"):
        buckets.probe(epath.Path(tmp_path))
