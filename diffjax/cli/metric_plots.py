"""Report of measured values: tables, plots over calls, images seen and guidance, and rows of earlier reports beside
them."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.cli import comparison_report
from diffjax.metrics import protocol
from diffjax.metrics.protocol import Protocol, Result, Spread
from diffjax.runtime import report

# column -> words of the axis
_AXES = {"nfe": "network calls per image", "images_seen": "training images seen", "guidance_scale": "guidance scale"}
_FACTS = ("images_seen", "guidance_scale")
_VALUE = "The value is the minimum over seed ranges where lower is better, else the mean."


class Row(NamedTuple):
    """A value of a set; facts: further columns, images_seen and guidance_scale."""

    run: str
    result: Result
    facts: dict[str, float]

    def at(self, column: str) -> float | None:
        """Its place on the axis `column`, None where it has none."""
        return self.result.nfe if column == "nfe" else self.facts.get(column)


def tables(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """`metrics` and `protocols`, see `protocol.tables`; with the columns of the facts."""
    made = protocol.tables([(row.run, row.result) for row in rows])
    for line, row in zip(made["metrics"], rows, strict=True):
        line.update(row.facts)
    return made


def read(folder: Path) -> list[Row]:
    """The rows of an earlier report. Raises FileNotFoundError where there is none, ValueError for a report of another
    kind."""
    path = folder / "report.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: evaluate that folder first, or leave it out of config.beside")
    found = json.loads(path.read_text(encoding="utf-8"))["tables"]
    if not {"metrics", "protocols"} <= set(found):
        raise ValueError(
            f"{path} has the tables {', '.join(found)}, expected metrics and protocols: give an evaluation of kind "
            "'metrics'"
        )
    protocols = {
        line["protocol"]: Protocol(**{key: line[key] for key in Protocol._fields}) for line in found["protocols"]
    }
    rows = []
    for line in found["metrics"]:
        seeds = tuple(line["seeds"].split("; ")) if line["seeds"] else ()
        spread = Spread(line["min"], line["mean"], line["max"])
        result = Result(line["value"], protocols[line["protocol"]], seeds, line["nfe"], spread)
        rows.append(Row(line["run"], result, {key: line[key] for key in _FACTS if key in line}))
    return rows


def check_beside(protocols: Iterable[Protocol], earlier: Iterable[Row]) -> None:
    """Raises ValueError where a metric was measured by another protocol in an earlier report."""
    earlier = list(earlier)
    for own in protocols:
        same = [row.result for row in earlier if row.result.protocol[:2] == own[:2]]  # metric and features
        protocol.check_comparable([own, *same])


def write(folder: Path, rows: Sequence[Row], failed: Sequence[dict[str, str]], command: str, seconds: float) -> Path:
    """`report.md`, `report.json` and the plots; returns the first."""
    pictures = draw(rows, folder)
    shown = "\n\n".join(f"![{name}]({file})" for name, file in pictures.items())
    sections = [
        ("Metrics", f"{_VALUE}\n\n<!-- table: metrics -->"),
        ("Plots", shown or "Nothing was measured at two places of an axis."),
        ("Protocols", "Values of different protocols cannot be compared.\n\n<!-- table: protocols -->"),
    ]
    made = {**tables(rows), "evaluation": [{"seconds": seconds}]}
    if failed:
        made["failed"] = list(failed)
        sections.insert(0, ("What could not be measured", "<!-- table: failed -->"))
    sections.append(("Reproduce", f"```bash\n{command}\n```"))
    return report.write_report(folder, "Metrics", sections, made)


def draw(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """A PNG for each metric and axis along which some set has two places; returns file names by title.

    Values of one picture have one protocol.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(protocol.identity(row.result.protocol), []).append(row)
    made = {}
    for identity, group in groups.items():
        protocol.check_comparable(row.result for row in group)
        name = protocol.title(group[0].result.protocol.metric, group[0].result.protocol.features)
        for column, words in _AXES.items():
            lines = _lines(group, column)
            if any(len(points) > 1 for points in lines.values()):
                file = f"{re.sub('[^a-z0-9]+', '_', name.lower())}_by_{column}_{identity}.png"
                _draw_one(lines, name, words, folder / file)
                made[f"{name} against {words}"] = file
    return made


def _lines(rows: Iterable[Row], column: str) -> dict[str, list[tuple[float, Spread]]]:
    """By set: (place, spread) in the order of the axis; the places of the other axes tell lines of one set apart."""
    lines: dict[str, dict[float, Spread]] = {}
    for row in rows:
        place = row.at(column)
        if place is not None:
            others = [f"{other} {row.at(other):g}" for other in _AXES if other != column and row.at(other) is not None]
            name = f"{row.run} ({', '.join(others)})" if others else row.run
            value = row.result.value
            lines.setdefault(name, {})[place] = row.result.spread or Spread(value, value, value)
    return {name: sorted(points.items()) for name, points in lines.items()}


def _draw_one(lines: dict[str, list[tuple[float, Spread]]], title: str, words: str, path: Path) -> None:
    """Means, with a band from the lowest to the highest value of the seed ranges."""
    figure = comparison_report.figure_class()(figsize=(7.5, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        places = [place for place, _ in points]
        axes.plot(places, [spread.mean for _, spread in points], "o-", label=name)
        axes.fill_between(places, [s.min for _, s in points], [s.max for _, s in points], alpha=0.2)
    values = [value for points in lines.values() for _, spread in points for value in spread]
    axes.set(xlabel=words, ylabel=title)
    if min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
