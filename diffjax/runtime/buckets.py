"""Folders in buckets of Google Cloud Storage, gs://BUCKET/FOLDER: their addresses, and whether they can be used."""

import os
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

from etils import epath

PATIENCE_S = 60.0
_PROBE = "probe.orbax-checkpoint-tmp"  # beginning of the probe's name; what ends so is no checkpoint


class BucketError(OSError):
    """A bucket cannot be written and read; the message names it, the reason and what to type."""


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether this is an address such as gs://..., not a path of this machine."""
    return "://" in os.fspath(path)


def check_address(text: str) -> None:
    """Raises ValueError unless it is gs://BUCKET/FOLDER."""
    parts = urlsplit(text)
    if parts.scheme != "gs" or not parts.netloc or not parts.path.strip("/"):
        raise ValueError(
            f"found {text!r}, expected gs://BUCKET/FOLDER, or a path: orbax writes to Google Cloud Storage and to file "
            "systems; mount a bucket of another kind as one"
        )


def probe(folder: epath.Path, patience_s: float | None = None) -> None:
    """Write a small file into `folder`, read it back and remove it, within `patience_s` seconds (default: a minute).

    Raises BucketError.
    """
    # a name of its own for each of the processes that probe at once
    file = folder / f"{_PROBE}-{socket.gethostname()}-{os.getpid()}"
    error = _within(lambda: _round_trip(file), PATIENCE_S if patience_s is None else patience_s)
    if error is None:
        return
    bucket = urlsplit(os.fspath(folder)).netloc
    if isinstance(error, ImportError):
        raise BucketError(f"{folder}: {error}. Type: pip install 'diffjax[bucket]'") from error
    text = " ".join(str(error).split())[:300]
    raise BucketError(
        f"the bucket {bucket} of {folder} cannot be written and read: {type(error).__name__}: {text}\n"
        f"See that it exists and is yours: gcloud storage ls gs://{bucket}; log in: gcloud auth "
        "application-default login; or leave config.train.checkpoint_folder out to write into the run's folder"
    ) from error


def _round_trip(file: epath.Path) -> None:
    written = f"diffjax {os.getpid()}"
    file.write_text(written)
    found = file.read_text()
    file.unlink()
    if found != written:
        raise OSError(f"wrote {written!r} to {file} and read {found!r}")


def _within(action: Callable[[], None], patience_s: float) -> Exception | None:
    """What `action` raised; a TimeoutError where it is not done in time: its thread goes on, and nobody waits."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # of the file system, its credentials or the network: all are one answer
            raised.append(error)

    thread = threading.Thread(target=run, name="probe of a bucket", daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        return TimeoutError(f"no answer within {patience_s:g} s")
    return raised[0] if raised else None
