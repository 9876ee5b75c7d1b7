"""What the programs tell XLA before JAX starts (a library import leaves it alone), and what its programs tell of
themselves."""

import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

_YNN = "--xla_cpu_experimental_ynn_fusion_type"


def set_flags(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep XLA's own convolutions on the CPU: up to jaxlib 0.11 it hands them to YNNPACK, where a train step of
    DDPM++ takes 1.5 times as long. A flag that the user has set stays; other backends do not read it, and a JAX that
    has been imported may have read its flags already, so nothing is changed then.
    """
    if "jax" in sys.modules:
        return
    release = importlib.metadata.version("jaxlib").split(".")
    flags = environ.get("XLA_FLAGS", "")
    if (int(release[0]), int(release[1])) < (0, 12) and _YNN not in flags:
        environ["XLA_FLAGS"] = f"{flags} {_YNN}=-individual_convolution".strip()


class Moved(NamedTuple):
    """How often a kind of collective runs in a program, and the bytes of all its results on one device."""

    number: int
    num_bytes: int


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*) ({_KINDS})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?([^,}]*(?:, %[^,}]*)*)")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")


def collectives(program: str) -> dict[str, Moved]:
    """Kind -> how much of it there is in one call of a compiled program, of its text (`compiled.as_text()`).

    Loops count as often as they run: by the compiler's word, or else by the number that their condition compares with.
    What starts and is waited for counts once, its result being the second half of what the start gives. Raises
    ValueError for a loop whose turns neither says.
    """
    lines: dict[str, list[str]] = {}
    entry = ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            current = lines.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            current.append(line)
    found: dict[str, Moved] = {}
    for kind, num_bytes, turns in _walk(lines, entry, 1):
        number, total = found.get(kind, (0, 0))
        found[kind] = Moved(number + turns, total + turns * num_bytes)
    return dict(sorted(found.items()))


def _walk(lines: dict[str, list[str]], name: str, turns: int) -> Iterator[tuple[str, int, int]]:
    """(kind, bytes, turns) of each collective in a computation and in those that it calls."""
    for line in lines.get(name, ()):
        if collective := _COLLECTIVE.search(line):
            result, kind, start = collective.groups()
            sizes = [_size(array) for array in _ARRAY.finditer(result)]
            if start and result.startswith("(") and kind != "all-reduce":  # what goes in, what comes out, flags
                sizes = [size for size in sizes if size > 4]
                sizes = sizes[len(sizes) // 2 :]
            yield kind, sum(sizes), turns
        elif loop := _WHILE.search(line):
            yield from _walk(lines, loop[2], turns * _turns(line, lines[loop[1]]))
        else:
            for called in _CALLED.finditer(line):
                for other in called[1].split(","):
                    yield from _walk(lines, other.strip(" %"), turns)


def _turns(line: str, condition: list[str]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    limits = [number for text in condition for number in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)]
    if known or len(limits) == 1:
        return int(known[1] if known else limits[0])
    raise ValueError(f"a loop's condition says no number of turns: {' '.join(condition)[:200]}")


def _size(array: re.Match) -> int:
    """Bytes of an array as programs write it: bf16[8,128]."""
    bits = re.search(r"\d+", array[1])
    width = 1 if array[1] == "pred" or not bits else math.ceil(int(bits[0]) / 8)
    return width * math.prod(int(n) for n in array[2].split(",") if n)
