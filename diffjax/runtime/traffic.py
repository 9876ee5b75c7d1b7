"""Bytes that a compiled program reads from and writes to its device's memory, of its text.

XLA's own count takes the body of a loop once; here it counts as often as it runs. An instruction reads what it is given
and writes what it gives, a fusion the same as a whole: what is inside stays in registers. A slice of a larger array
counts as large as it is, also inside a fusion, and so does the part of an array that is replaced in place. What the TPU
compiler has put into the chip's own fast memory (S(1) in a layout) is not counted.
"""

import re

from diffjax.runtime import xla

_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"[a-z]+\d*\w*\[[\d,]*\](?:\{[^}]*\})?")
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "after-all", "iota",
    "partition-id", "copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "async-done",
    "async-update", "broadcast", "reshape", "slice-start",
))  # fmt: skip
_PARTS = ("slice", "dynamic-slice", "gather")  # which read of their first operand what they give


def accessed(program: str) -> int:
    """Of one call of a compiled program (`compiled.as_text()`). Raises ValueError as `xla.collectives`."""
    lines, entry = xla.computations(program)
    return _of(entry, lines)


def _of(name: str, lines: dict[str, list[str]]) -> int:
    table = _instructions(lines[name])
    total = 0
    for line in lines[name]:
        if body := xla.loop(line, lines):
            total += body[1] * _of(body[0], lines)
        elif branches := xla.branches(line):
            total += max(_of(branch, lines) for branch in branches)
        elif called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
            total += _of(called[1], lines)
        elif found := _LINE.match(line):
            total += _one(*found.groups(), line, table, lines)
    return total


def _one(
    name: str, result: str, kind: str, rest: str, line: str, table: dict[str, tuple[str, str, list[str]]],
    lines: dict[str, list[str]],
) -> int:  # fmt: skip
    """Bytes of one instruction."""
    if kind in _FREE or "AllocateBuffer" in line:
        return 0
    if kind == "slice-done":  # from the memory; to it where the slice does not stay on the chip
        return xla.array_bytes(result) + _bytes(result)
    operands = table[name][2]
    sizes = [_bytes(table[operand][0]) if operand in table else 0 for operand in operands]
    if kind in _PARTS:
        return 2 * _bytes(result)
    if kind == "dynamic-update-slice":
        return 2 * sizes[1]
    if kind.endswith("-start"):  # what goes in stands in the result beside what comes out
        return _bytes(result)
    called = re.search(r"calls=%?([\w.-]+)", line) if kind == "fusion" else None
    if not called:
        return sum(sizes) + _bytes(result)
    read, replaced = _in_fusion(lines[called[1]], sizes)
    return read + max(_bytes(result) - replaced, 0)


def _in_fusion(body: list[str], sizes: list[int]) -> tuple[int, int]:
    """(bytes that a fusion reads of its operands, bytes of its results that stay as they are in place)."""
    table = _instructions(body)
    given = {name: int(rest[0]) for name, (_, kind, rest) in table.items() if kind == "parameter"}
    read, replaced = 0, 0
    for name, index in given.items():
        users = [(user, kind, operands) for user, (_, kind, operands) in table.items() if name in operands]
        if users and all(kind in _PARTS and operands[0] == name for _, kind, operands in users):
            read += sum(_bytes(table[user][0]) for user, _, _ in users)
        elif users and all(kind == "dynamic-update-slice" and operands[0] == name for _, kind, operands in users):
            replaced += sizes[index] - _bytes(table[users[0][2][1]][0])
        else:
            read += sizes[index]
    return read, replaced


def _instructions(body: list[str]) -> dict[str, tuple[str, str, list[str]]]:
    """Name -> (type of the result, kind, names of the operands; the number of a parameter)."""
    table = {}
    for line in body:
        if found := _LINE.match(line):
            name, result, kind, rest = found.groups()
            inside = rest.partition(")")[0]
            operands = [inside] if kind == "parameter" else re.findall(r"%([\w.-]+)", inside)
            table[name] = result, kind, operands
    return table


def _bytes(result: str) -> int:
    """Of the arrays of a type that are in the device's memory."""
    return sum(xla.array_bytes(text) for text in _ARRAY.findall(result) if "S(1)" not in text)
