"""What the commands share: flags of their own, configs with the nearest name for a typo, errors without a stack.

A command is a module with a docstring (its help), `define(values, argv)` that adds flags to an absl FlagValues, and
`main(values)`. Nothing here imports JAX before `main`, so help is immediate:

    if __name__ == "__main__":
        sys.exit(flags.run(__doc__, define, main))

A command that takes words beside flags names them in POSITIONAL, and gets them behind the flags: main(values, source,
out) with flags.run(__doc__, define, main, positional=POSITIONAL). Words whose name is in brackets may be left out.

Errors that diffjax (or a config) raises on purpose end the command with code 2 and their message; `--traceback` shows
where they come from. An error with an `exit_code` of its own ends with that. Any other error is a bug and keeps its
stack.
"""

import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from diffjax.core import names
from diffjax.runtime import launchers, xla

if TYPE_CHECKING:
    from diffjax.runtime.distributed import Ending

USAGE_ERROR = 2
# valid in every config, though none writes it down: see runtime.configs
_ALWAYS_KNOWN = ("allow_config_change",)
_MISSPELT = 0.85  # likeness from which on a new key is taken for a typo; "keep_every_steps" is 0.79 from another one
_PACKAGE = Path(__file__).parent.parent
_EXAMPLE = "configs/quick/edm_digits.py"


def run(
    doc: str,
    define: Callable[[absl_flags.FlagValues, Sequence[str]], None],
    main: Callable[..., None],
    argv: Sequence[str] | None = None,
    positional: Sequence[str] = (),
) -> int:
    """Parse `argv` (default: sys.argv) and call `main(values, *words)`; returns the exit code: 0, or after an error
    message 2 or what the error asks for.

    doc: the help text. define: adds the command's flags. positional: names of the words that the command takes beside
    its flags, all of them needed but those like "[FOLDER]". With --print_config the command ends after the config.
    """
    argv = list(sys.argv if argv is None else argv)
    values = absl_flags.FlagValues()
    define(values, argv)
    absl_flags.DEFINE_bool("traceback", False, "show the stack of an error", flag_values=values)
    if any(arg in ("-h", "-help", "--help", "--helpfull") for arg in argv[1:]):
        print(f"{doc.strip()}\n\nFlags:\n{_help(values)}")
        return 0
    try:
        words = values(argv)[1:]
        _check_words(words, positional)
        if "print_config" in values and values.print_config:
            needed(values, "config", _EXAMPLE)
            print(expand(values.config))
            return 0
        xla.set_flags()
        main(values, *words)
    except Exception as error:
        if "--traceback" in argv or not _is_message(error):
            raise
        print(f"error: {_text(error)}", file=sys.stderr)
        return getattr(error, "exit_code", USAGE_ERROR)
    return 0


def define_config(values: absl_flags.FlagValues, argv: Sequence[str], *, new_keys: bool) -> None:
    """Add --config=FILE.py[:ARG], --config.SECTION.KEY=VALUE for every key of the config, and --print_config.

    new_keys: also keys that a section leaves at their default; who uses the section then refuses unknown ones.
    """
    absl_flags.DEFINE_bool("print_config", False, "print the config with its overrides and end", flag_values=values)
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, with an argument after a colon: configs/quick/sfd_digits.py:2; --config.SECTION.KEY=VALUE sets "
        "one of its values",
        flag_values=values,
        lock_config=not new_keys,
        accept_new_attributes=new_keys,
        sys_argv=list(argv),
    )
    values["config"].parser = _ConfigParser(argv, new_keys)


def define_workdir(values: absl_flags.FlagValues, help_text: str) -> None:
    """Add --workdir=FOLDER."""
    absl_flags.DEFINE_string("workdir", None, help_text, flag_values=values)


def define_processes(values: absl_flags.FlagValues) -> None:
    """Add --processes=HOW, for commands that several processes can do together."""
    absl_flags.DEFINE_enum(
        "processes",
        "auto",
        launchers.HOW,
        "what started this process beside others, see diffjax.runtime.launchers; auto: what the environment says",
        flag_values=values,
    )


@contextlib.contextmanager
def joined(values: absl_flags.FlagValues, config: ConfigDict) -> Iterator[None]:
    """Do the work inside together with the other processes that --processes finds, all with the same config; see
    `diffjax.runtime.distributed`. Raises ValueError, TogetherError."""
    place = launchers.find(os.environ, values.processes)
    if place is None:
        yield
        return
    from diffjax.runtime import distributed  # imports JAX

    with distributed.session(place, {"config": expand(config)}, ending=ending(values)):
        yield


def ending(values: absl_flags.FlagValues) -> Callable[[BaseException], "Ending"]:
    """For `distributed.session`: message and exit code of an error as `run` has them."""
    from diffjax.runtime import distributed

    def ending(error: BaseException) -> "Ending":
        if _is_message(error):
            code = getattr(error, "exit_code", USAGE_ERROR)
            return distributed.Ending(_text(error), code, stack=values.traceback)
        return distributed.ending(error)

    return ending


def needed(values: absl_flags.FlagValues, name: str, example: str) -> Any:
    """The value of a flag that the command cannot do without. Raises ValueError with an example."""
    if values[name].value in (None, ""):
        raise ValueError(f"--{name} is missing; for example --{name}={example}")
    return values[name].value


def workdir(values: absl_flags.FlagValues) -> Path:
    """--workdir as a path that is a folder or can become one. Raises ValueError, NotADirectoryError."""
    path = Path(needed(values, "workdir", "runs/digits_teacher"))
    taken = next((p for p in (path, *path.parents) if p.exists()), Path())
    if not taken.is_dir():
        raise NotADirectoryError(f"--workdir={path}: {taken} is a file, expected a folder or a new name")
    return path


def run_folder(values: absl_flags.FlagValues) -> Path:
    """--workdir as the folder of an existing run. Raises FileNotFoundError, and as `workdir`."""
    path = workdir(values)
    if not (path / "config.json").exists():
        near = sorted(str(found.parent) for found in path.parent.glob("*/config.json"))
        hint = f"; runs beside it: {', '.join(near)}" if near else "; train it first with diffjax.cli.train"
        raise FileNotFoundError(f"--workdir={path} is no run folder (it has no config.json){hint}")
    return path


class _ConfigParser(absl_flags.ArgumentParser):
    """Loads the config, and answers overrides of keys that it does not have with the nearest one."""

    def __init__(self, argv: Sequence[str], new_keys: bool):
        self._argv, self._new_keys = argv, new_keys

    def parse(self, path: str) -> ConfigDict:
        config = load_config(path)
        for key in re.findall(r"^--?config\.([\w.]+)", "\n".join(self._argv), flags=re.MULTILINE):
            check_key(config, key, self._new_keys)
        if not self._new_keys:
            config.lock()
        return config


def load_config(path: str) -> ConfigDict:
    """get_config(ARG) of 'FILE.py:ARG'. Raises FileNotFoundError with the configs there are, ValueError for a file
    without get_config."""
    file, colon, arg = path.partition(":")
    if not Path(file).is_file():
        known = sorted(str(found) for found in Path("configs").glob("*/*.py"))
        hint = names.nearest(file, known) if known else "start in the checkout, where configs/ is"
        raise FileNotFoundError(f"config file {file!r} does not exist; {hint}")
    module = runpy.run_path(file)
    if "get_config" not in module:
        raise ValueError(f"{file} has no function get_config(arg), see configs/quick/edm_digits.py")
    return module["get_config"](*([arg] if colon else []))


def check_key(config: Mapping[str, Any], key: str, new_keys: bool) -> None:
    """Raise ValueError, with the nearest name, unless 'a.b.c' is a key of `config`. With `new_keys` a new last name in a
    section passes, unless it looks like a misspelt one."""
    section, before = config, ""
    parts = key.split(".")
    for depth, name in enumerate(parts):
        if not isinstance(section, Mapping | ConfigDict):
            raise ValueError(f"unknown key config.{key}: config.{before[:-1]} is a value, not a section")
        if name not in section:
            new = new_keys and 0 < depth == len(parts) - 1 and not difflib.get_close_matches(name, section, 1, _MISSPELT)
            if new or key in _ALWAYS_KNOWN:
                return
            raise ValueError(f"unknown key config.{key}; {names.nearest(before + name, [before + k for k in section])}")
        section, before = section[name], f"{before}{name}."


def expand(config: ConfigDict) -> str:
    """One line 'section.key = value' for each value, sorted."""
    from diffjax.runtime import configs  # imports JAX

    flat = configs.flatten(config.to_dict())
    return "\n".join(f"{key} = {flat[key]!r}" for key in sorted(flat))


def _check_words(words: Sequence[str], positional: Sequence[str]) -> None:
    if len(words) > len(positional):
        surplus, beside = words[len(positional)], f" beside {' '.join(positional)}" if positional else ""
        raise ValueError(f"found {surplus!r}, which is no flag: flags{beside} are --NAME=VALUE, see --help")
    needed_words = [name for name in positional if not name.startswith("[")]
    if len(words) < len(needed_words):
        absent = " ".join(needed_words[len(words) :])
        raise ValueError(f"{absent} is missing: give {' '.join(positional)} and flags --NAME=VALUE, see --help")


def _help(values: absl_flags.FlagValues) -> str:
    flags = sorted(values.flags_by_module_dict().items())
    unique = {flag.name: flag for _, group in flags for flag in group}
    lines = []
    for name, flag in unique.items():
        default = "" if flag.value in (None, "", False) else f" (default: {flag.value})"
        form = f"--{name}" if flag.boolean else f"--{name}=..."
        lines.append(f"  {form:22s} {flag.help}{default}")
    return "\n".join(lines)


def _is_message(error: BaseException) -> bool:
    """Whether the error was raised for the user: by the file system, the flag parser, diffjax or a config."""
    if isinstance(error, OSError | absl_flags.Error):
        return True
    if not isinstance(error, ValueError | RuntimeError | ImportError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith(str(_PACKAGE)) or frame.name == "get_config"


def _text(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, absl_flags.IllegalFlagValueError):
        # the parser puts the value and its own words before the message
        text = re.sub(r"^flag --config=\S+: ", "", text)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return text
