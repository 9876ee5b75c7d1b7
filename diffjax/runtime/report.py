"""Reports of a run: `report.md` for people and `report.json`, the same figures, for programs.

    write_report(
        "runs/demo",
        "Demo",
        [("Results", "Lower is better.\\n\\n<!-- table: frechet_by_calls -->")],
        {"frechet_by_calls": [{"method": "euler", "nfe": 2, "seed": 0, "frechet_distance": 1.71}]},
    )

A line `<!-- table: NAME -->` in a section is replaced by that table; a table that no section places
is appended under its own heading. The Markdown rounds to 6 significant digits, the JSON does not.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

Row = Mapping[str, Any]  # column name -> plain value
Tables = Mapping[str, Sequence[Row]]

_PACKAGES = ("diffjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_PLACEHOLDER = re.compile(r"<!-- table: (\S+) -->")


def versions() -> dict[str, str]:
    """Installed versions by package name, and Python's; 'not installed' where a package is absent."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source checkout on PYTHONPATH has no metadata
            found[name] = "not installed"
    return found


def git_commit(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Commit hash of the checkout that holds `folder` (default: this package), `+changes` when it is
    not clean; None outside a checkout or without git."""
    folder = Path(__file__).parent if folder is None else Path(folder)
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    outputs = []
    for command in commands:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):  # no git, no repository: a report can do without
            return None
        outputs.append(done.stdout.strip())
    return outputs[0] + ("+changes" if outputs[1] else "")


def environment() -> dict[str, Any]:
    """Where figures come from: package versions, backend, devices, CPU count, commit and date (UTC).

    Starts JAX's backend. Holds no host name and no path.
    """
    devices = jax.devices()
    return {
        "versions": versions(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file atomically: a reader sees the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` as JSON types: NumPy and JAX scalars and arrays become numbers and lists, non-finite
    floats the strings 'nan', 'inf', '-inf' (strict JSON has no word for them).

    Raises TypeError for anything else, naming its type.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"found {type(value).__name__} ({value!r}) in a report; use numbers, text, lists and dicts")


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; columns in order of first appearance, an absent cell is empty."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    sections: Sequence[tuple[str, str]],
    tables: Tables,
    environment: Mapping[str, Any] | None = None,
    name: str = "report",
) -> Path:
    """Write `report.md` and `report.json` into `folder` (made if absent); returns the Markdown path.

    sections: (heading, Markdown text) in order. tables: name -> rows, each a dict of plain values.
    environment: default `environment()`. name: of the files. Each is replaced atomically.
    Raises ValueError for a placeholder without table, TypeError for a value JSON cannot hold.
    """
    facts = plain(_environment() if environment is None else environment)
    figures = plain(tables)
    body = "\n\n".join(f"## {heading}\n\n{text.strip()}" for heading, text in sections)
    placed = _PLACEHOLDER.findall(body)
    unknown = sorted(set(placed) - set(figures))
    if unknown:
        raise ValueError(f"sections place the tables {unknown}, found only {sorted(figures)}; pass them in tables=")
    body = _PLACEHOLDER.sub(lambda match: markdown_table(figures[match.group(1)]), body)
    rest = [f"## {table}\n\n{markdown_table(rows)}" for table, rows in figures.items() if table not in placed]
    facts_text = "## Environment\n\n" + "\n".join(f"- {key}: {_fact(value)}" for key, value in facts.items())
    text = "\n\n".join(part for part in (f"# {title}", body, *rest, facts_text) if part) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps({"environment": facts, "tables": figures}, indent=1) + "\n")
    write_text(folder / f"{name}.md", text)
    return folder / f"{name}.md"


_environment = environment  # write_report's argument of that name hides the function


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "unknown" if value is None else str(value)
