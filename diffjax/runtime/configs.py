"""The config a run folder belongs to: `config.json`, and what may change when the run goes on."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffjax.runtime import report

FILE_NAME = "config.json"
ALLOW_KEY = "allow_config_change"

# Keys (and sections) that change how long a run is, where, how it is watched, or what is done with its
# weights. Their changes are printed too: a schedule that ends at total_images follows the new value,
# and another number of devices adds up gradients in another order.
FREE_KEYS = (
    ALLOW_KEY,
    "evaluate",
    "sample",
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.log_every_steps",
    "train.max_in_flight",
    "train.mesh",
    "train.num_devices",
    "train.sample_every_steps",
    "train.stall_minutes",
    "train.total_images",
    "train.writers",
)


class ConfigChangedError(ValueError):
    """The run folder belongs to another config; the message lists every difference."""


def to_plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config (dict or ConfigDict) as it comes back from its file. Raises TypeError for a value JSON
    has no word for."""
    nested = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps(nested))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """'train.batch_size' -> value; empty sections stay as {}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(refused, free): lines 'key: saved -> now', sorted; 'absent' where one side lacks the key."""
    before, after = flatten(to_plain(saved)), flatten(to_plain(now))
    refused, free = [], []
    for key in sorted(before.keys() | after.keys()):
        if key in before and key in after and before[key] == after[key]:
            continue
        line = f"{key}: {_show(before, key)} -> {_show(after, key)}"
        (free if _is_free(key) else refused).append(line)
    return refused, free


def check(saved: Mapping[str, Any], now: Mapping[str, Any], holder: str) -> list[str]:
    """Lines of the differences that are allowed. Raises ConfigChangedError listing all others, unless
    `now` holds allow_config_change=True.

    holder: what holds `saved`, for the message ('runs/a/config.json').
    """
    refused, free = differences(saved, now)
    if refused and not now.get(ALLOW_KEY, False):
        listing = "\n  ".join(refused)
        raise ConfigChangedError(
            f"{holder} holds another config (saved -> now):\n  {listing}\n"
            f"Use another --workdir, the saved values, or --config.{ALLOW_KEY}=True to go on with these"
        )
    return refused + free


def read(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Content of config.json; None where there is none. Raises ValueError for a damaged file."""
    path = Path(workdir) / FILE_NAME
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it, or use another --workdir") from error


def write(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write config.json atomically."""
    report.write_text(Path(workdir) / FILE_NAME, json.dumps(to_plain(config), indent=1) + "\n")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _show(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
