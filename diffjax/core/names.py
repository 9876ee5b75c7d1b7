"""Names in configs: looked up in a table, or answered with the nearest one that exists."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of `known`, then all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.0)[0]
    return f"did you mean {close!r}? Known: {', '.join(known)}"


def lookup(table: Mapping[str, Value], name: Any, what: str) -> Value:
    """table[name]; raises ValueError for an unknown name, with the nearest. `what` says what is named."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, table)}")
    return table[name]


def check_options(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless every name in `options` is a parameter with a default of `function`."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    for name in options:
        if not known:
            raise ValueError(f"{what} has no options, found {name!r}: leave it out")
        if name not in known:
            raise ValueError(f"unknown option {name!r} of {what}; {nearest(name, known)}")
