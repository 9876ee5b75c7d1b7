"""Folders that are filled with ArrayRecord files shard by shard: claimed for one purpose, taken up after a stop.

    claim(folder, made_for, "latents.json", "latents")             # refuses what others have begun or finished
    for done in write(folder / "latents-00000.array_record", records): ...
    finish(folder, "latents.json", header)                         # from now on the folder is a whole

A shard has its name once it is whole, so that what an interrupted call left is known by its name.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffjax.runtime import report

CLAIM = "unfinished.json"


def claim(folder: Path, made_for: Mapping[str, Any], header: str, what: str) -> None:
    """Make `folder`, and leave a note of what its shards are for.

    Raises FileExistsError where it holds `header`, the sign of a finished folder, or the note of something else.
    """
    if (folder / header).exists():
        raise FileExistsError(f"{folder} holds finished {what}: choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    note, made_for = folder / CLAIM, json.loads(json.dumps(made_for))
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if lines := differences(found, made_for):
            listed = "\n  ".join(lines)
            raise FileExistsError(f"{folder} holds unfinished {what} of another run: choose another folder\n  {listed}")
    report.write_text(note, json.dumps(made_for))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A line for every key on which what a folder was made for and what is wanted differ."""
    return [
        f"{key}: made for {found.get(key)!r}, the run has {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]


def write(path: Path, records: Iterable[bytes]) -> Iterator[int]:
    """Write `records` as the file `path`; yields how many are written, after each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_suffix(".unfinished")
    # groups of 1: random access; noise does not compress
    writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
    for count, record in enumerate(records, 1):
        writer.write(record)
        yield count
    writer.close()
    unfinished.rename(path)


def finish(folder: Path, header: str, content: Mapping[str, Any]) -> None:
    """Write the header and take the note away."""
    report.write_text(folder / header, json.dumps(content, indent=1) + "\n")
    (folder / CLAIM).unlink(missing_ok=True)
