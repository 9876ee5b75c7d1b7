"""How values are measured, written from what is registered: the README's section "Metric protocol".

    python -m diffjax.cli.protocols                        # prints it
    python -m diffjax.cli.protocols --readme=README.md     # writes it between the section's two marks
"""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from diffjax.cli import flags

BEGIN = "<!-- protocol: written by python -m diffjax.cli.protocols --readme=README.md -->"
END = "<!-- protocol: end -->"


def define(values: absl_flags.FlagValues, argv: Sequence[str]) -> None:
    """Flags of this command."""
    del argv
    absl_flags.DEFINE_string("readme", "", "file to write the section into, between its marks", flag_values=values)


def main(values: absl_flags.FlagValues) -> None:
    """Print the section, or write it."""
    if not values.readme:
        print(markdown())
        return
    from diffjax.runtime import report

    text = Path(values.readme).read_text(encoding="utf-8")
    old = f"{BEGIN}\n{section(text)}\n{END}"
    report.write_text(values.readme, text.replace(old, f"{BEGIN}\n{markdown()}\n{END}"))
    print(f"written: {values.readme}")


def section(text: str) -> str:
    """What is between the marks of a README. Raises ValueError where they are not there once, in this order."""
    before, begin, rest = text.partition(BEGIN + "\n")
    found, end, after = rest.partition("\n" + END)
    if not (begin and end) or BEGIN in after or BEGIN in before:
        marks = f"{BEGIN!r} and {END!r}"
        raise ValueError(f"expected the marks {marks} once each, a line each: put them around the section")
    return found


def markdown() -> str:
    """The section."""
    from diffjax.metrics import protocol, stats
    from diffjax.runtime import report

    fields = ", ".join(f"`{name}`" for name in protocol.Protocol._fields)
    rules = (
        f"Each value is written with its protocol: {fields}. Eight hex digits stand for it, in tables, plots and "
        "`metrics.jsonl`; values whose protocols differ are not compared: the error names the fields. A reference "
        "is known by the hash of its images, or of its file.\n\n"
        f"Networks see images as `{protocol.ROUNDED}`, as EDM rounds; the space `pixels` takes samples as they "
        "are, neither clipped nor rounded. Means and covariances (n - 1) are float64, summed in blocks of "
        f"{stats.BLOCK:,} by the number of the sample and merged in a fixed order, so that the numbers of "
        "devices and processes leave no trace. Fréchet distances are squared, |Δμ|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), without an "
        "offset for singular covariances. Of several seed ranges the value is the minimum where lower is better, "
        "as EDM reports FID, else the mean; minimum, mean and maximum are beside it. Seeds fix noise and class of "
        "each image. Reports of quick runs print the distance between two halves of the data and the spread over "
        "seeds, so that the noise can be held against the gaps."
    )
    tables = {
        "Metrics, by their name in a config. Only Inception features make an FID:": _metrics(),
        "Feature spaces. Nothing is downloaded; a missing file is named:": _spaces(),
        "Resizing, before a network:": _resizes(),
    }
    return "\n\n".join([rules, *(f"{title}\n\n{report.markdown_table(rows)}" for title, rows in tables.items())])


def _metrics() -> list[dict[str, str]]:
    from diffjax.build import measures
    from diffjax.metrics import protocol

    rows = []
    for name, metric in protocol.METRICS.items():
        rows.append(
            {
                "metric": f"`{name}`",
                "value": ", ".join(metric.gives) or "; ".join(metric.titles.values()),
                "spaces": ", ".join(f"`{space}`" for space in metric.titles),
                "reference": "yes" if metric.reference else "no",
                "better": "lower" if metric.lower else "higher",
                "settings": measures.settings(name, {}),
                "source": metric.source,
            }
        )
    return rows


def _spaces() -> list[dict[str, str]]:
    from diffjax.build import feature_networks, feature_spaces

    networks = feature_networks.NETWORKS
    return [
        {"space": f"`{name}`", "network": networks[name].files if name in networks else _said(maker)}
        for name, maker in feature_spaces.SPACES.items()
    ]


def _resizes() -> list[dict[str, str]]:
    from diffjax.metrics import resize

    return [{"name": f"`{name}`", "how": _said(function)} for name, function in resize.RESIZES.items()]


def _said(function: object) -> str:
    """The first paragraph of its docstring, one line."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main))
