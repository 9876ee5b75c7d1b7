"""What the programs tell XLA before JAX starts (a library import leaves it alone), and what its programs tell of
themselves."""

import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

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


class Collective(NamedTuple):
    """One of a program's. arrays: (bytes, dimensions) of each result on one device; turns: how often it runs; devices:
    how many take part."""

    kind: str
    arrays: tuple[tuple[int, tuple[int, ...]], ...]
    turns: int
    devices: int

    @property
    def num_bytes(self) -> int:
        """Of all results of all turns."""
        return self.turns * sum(size for size, _ in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all turns, in rings."""
        share = (self.devices - 1) / self.devices
        factor = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "all-to-all": share}
        return self.num_bytes * factor.get(self.kind, 1)


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*) ({_KINDS})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_BRANCHES = re.compile(r" conditional\(.*(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+))")
_SCATTER = re.compile(r" = (.*) fusion\(.*calls=%?(all-reduce-scatter[\w.-]*)")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
_GROUPS = (re.compile(r"replica_groups=\{\{([\d,]+)\}"), re.compile(r"replica_groups=\[\d+,(\d+)\]"))
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")


def collectives(program: str) -> list[Collective]:
    """All collectives of a compiled program, of its text (`compiled.as_text()`).

    Loops count as often as they run: by the compiler's word, or else by the number that their condition compares with,
    their most. Of branches the one that moves the most bytes counts.
    What starts and is waited for counts once, its result being the second half of what the start gives; so does what
    the TPU compiler writes several times, where it fuses the start, the wait and products between them. Its
    reduce-scatter is a fusion of an all-reduce and a slice. Raises ValueError for a loop whose turns neither says.
    """
    lines, entry = computations(program)
    found: dict[Any, Collective] = {}
    for fused, one in _walk(lines, entry, 1):
        found.setdefault(fused or len(found), one)
    return list(found.values())


def computations(program: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation by its name, the name of the one that is called) of a program's text."""
    lines: dict[str, list[str]] = {}
    entry = ""
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            current = lines.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("  "):
            current.append(line)
    return lines, entry


def loop(line: str, lines: dict[str, list[str]]) -> tuple[str, int] | None:
    """(body, turns) where a line is a loop. Raises ValueError as `collectives`."""
    found = _WHILE.search(line)
    if not found:
        return None
    condition = lines[found[1]]
    inside = [text for line in condition for name in _CALLED.findall(line) for text in lines.get(name, ())]
    return found[2], _turns(line, condition + inside, lines[found[2]])


def branches(line: str) -> list[str]:
    """The computations that a line chooses from, [] where it does not."""
    found = _BRANCHES.search(line)
    return [name.strip(" %,") for part in found.groups("") for name in part.split(",") if name] if found else []


def _walk(lines: dict[str, list[str]], name: str, turns: int) -> Iterator[tuple[str, Collective]]:
    """(what tells those written several times, collective) of each in a computation and in those that it calls."""
    for line in lines.get(name, ()):
        if collective := _COLLECTIVE.search(line):
            result, kind, start = collective.groups()
            arrays = _arrays(result)
            if start and result.startswith("(") and kind != "all-reduce":  # what goes in, what comes out, flags
                arrays = [array for array in arrays if array[0] > 4]
                arrays = arrays[len(arrays) // 2 :]
            yield _fused(line), Collective(kind, tuple(arrays), turns, _devices(line))
        elif scatter := _SCATTER.search(line):
            inside = next(line for line in lines[scatter[2]] if _COLLECTIVE.search(line))
            yield _fused(inside), Collective("reduce-scatter", tuple(_arrays(scatter[1])), turns, _devices(inside))
        elif body := loop(line, lines):
            yield from _walk(lines, body[0], turns * body[1])
        elif choices := branches(line):
            found = [list(_walk(lines, name, turns)) for name in choices]
            yield from max(found, key=lambda one: sum(collective.num_bytes for _, collective in one))
        else:
            for called in _CALLED.finditer(line):
                yield from _walk(lines, called[1], turns)


def _fused(line: str) -> str:
    """What the lines of one collective have in common that is written several times, "" for others."""
    chain, channel = (re.search(pattern, line) for pattern in (r"chain_id=\S+", r"channel_id=\d+"))
    return f"{chain[0]} {channel[0]}" if chain and channel else ""


def _devices(line: str) -> int:
    """How many take part in a collective; 2 where the text says pairs or nothing."""
    if named := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]) if axis in sizes)
    first, second = (pattern.search(line) for pattern in _GROUPS)
    if first:
        return first[1].count(",") + 1
    return int(second[1]) if second else 2


def _arrays(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes, dimensions) of each array of a result as programs write it."""
    return [(_size(array), tuple(int(n) for n in array[2].split(",") if n)) for array in _ARRAY.finditer(text)]


def _turns(line: str, condition: list[str], body: list[str]) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    limits = [number for text in condition for number in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)]
    if len(limits) != 1:
        raise ValueError(f"a loop's condition says no number of turns: {' '.join(condition)[:200]}")
    return math.ceil(int(limits[0]) / _step(condition, body))


def _step(condition: list[str], body: list[str]) -> int:
    """What is added to a loop's counter in a turn: 2 where the compiler has put two turns into one."""
    counter = re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", "\n".join(condition))
    root = next((line for line in body if line.lstrip().startswith("ROOT ")), "")
    entries = re.findall(r"%([\w.-]+)", root.partition(" tuple(")[2])
    if not counter or len(entries) <= int(counter[1]):
        return 1
    text = "\n".join(body)
    added = re.search(rf"%{re.escape(entries[int(counter[1])])} = \S+ add\(%([\w.-]+), %([\w.-]+)\)", text)
    terms = added.groups() if added else ()
    numbers = [re.search(rf"%{re.escape(name)} = \S+ constant\((\d+)\)", text) for name in terms]
    return next((int(number[1]) for number in numbers if number), 1)


def array_bytes(text: str) -> int:
    """Bytes of an array as programs write it: bf16[8,128]."""
    found = _ARRAY.match(text)
    return _size(found) if found else 0


def _size(array: re.Match) -> int:
    """Bytes of an array as programs write it: bf16[8,128]."""
    bits = re.search(r"\d+", array[1])
    width = 1 if array[1] == "pred" or not bits else math.ceil(int(bits[0]) / 8)
    return width * math.prod(int(n) for n in array[2].split(",") if n)
