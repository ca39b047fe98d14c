"""The command line and the YAML of `gapo train` and `gapo study`: data classes in, checked instances out."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from gapo._fields import choices_of
from gapo.runs.errors import ConfigError
from gapo.runs.shipped import configuration, configuration_names
from gapo.runs.yaml_file import require_plain_yaml


def parser_of(classes: Sequence[type], **about: str) -> Any:
    """A parser of the fields of data classes, from YAML and from the command line.

    Types and defaults are the fields', the help is that of their docstrings, and the choices those of their metadata.
    `about` goes to `argparse.ArgumentParser`: prog, description, epilog.
    """
    # Abbreviated, `--conf` would read a file that `config_files` does not see, and so does not check.
    parser = ArgumentParser(**about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", metavar="CONFIG.yaml", help="the same as the first argument")
    for cls in classes:
        add_fields(parser, cls)
    return parser


def add_fields(parser: Any, cls: type, skip: Collection[str] = ()) -> None:
    """Add the fields of a data class to a parser, but those of `skip`."""
    parser.add_class_arguments(cls, skip=set(skip))
    for name, choices in choices_of(cls).items():
        if name not in skip:
            # The class itself checks the value, and words the error.
            parser._option_string_actions[f"--{name}"].metavar = f"{{{','.join(choices)}}}"


def parse_fields(
    parser: Any, arguments: Sequence[str], classes: Sequence[type], check: Callable[..., Any] | None = None
) -> list[Any]:
    """`[CONFIG.yaml] [--key value ...]` by a parser of the fields of these data classes: one instance of each.

    `check` is called with the instances. A ValueError that it raises becomes a ConfigError like any other.

    Raises:
        ConfigError: a key or a value is not accepted, or a file cannot be read.
    """
    arguments = with_config(arguments)
    try:
        for path in config_files(arguments):
            require_plain_yaml(path)
        values = parser.parse_args(_with_values(arguments, classes))
        instances = [cls(**_checked(values, cls)) for cls in classes]
        if check is not None:
            check(*instances)
        return instances
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("a value is nested too deeply") from error
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_with_closest_key(_short(" ".join(str(error).split())), classes)) from error


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` before a file that stands first; the name of a shipped one becomes its path."""
    completed = list(arguments)
    if completed and not completed[0].startswith("-"):
        completed.insert(0, "--config")
    for i, argument in enumerate(completed):
        if argument.startswith("--config="):
            completed[i] = f"--config={configuration(argument.removeprefix('--config='))}"
        elif argument == "--config" and i + 1 < len(completed):
            completed[i + 1] = configuration(completed[i + 1])
    return completed


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The configuration files of a command line. Raises ConfigError for one that does not exist."""
    names = values_of("config", arguments)
    for name in names:
        if not os.path.isfile(name):
            raise ConfigError(
                f"there is no configuration file {name!r}, and gapo ships none of that name: it has "
                f"{', '.join(configuration_names())} (gapo examples lists them)"
            )
    return [Path(name) for name in names]


def values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """Every value that the command line itself has for a key, as text."""
    option = f"--{name}"
    joined = [argument.removeprefix(f"{option}=") for argument in arguments if argument.startswith(f"{option}=")]
    return joined + [following for argument, following in pairwise(arguments) if argument == option]


def _checked(values: Any, cls: type) -> dict[str, Any]:
    """The fields of one data class; the parser accepts null for everything, and numbers that are not finite."""
    settings = {f.name: values[f.name] for f in fields(cls)}
    for f in fields(cls):
        value = settings[f.name]
        if value is None and "None" not in str(f.type):
            raise ValueError(f"{f.name} must not be null")
        parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        if not all(math.isfinite(part) for part in parts if isinstance(part, float)):
            raise ValueError(f"{f.name} must be finite, got {value!r}")
    return settings


def _short(message: str, most: int = 500) -> str:
    return message if len(message) <= most else f"{message[: most - 4]} ..."


def _with_values(arguments: list[str], classes: Sequence[type]) -> list[str]:
    """`--strict` alone is `--strict true`; so for every switch."""
    switches = {f"--{f.name}" for cls in classes for f in fields(cls) if f.type in ("bool", bool)}
    completed = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        completed.append(argument)
        if argument in switches and following.startswith("--"):
            completed.append("true")
    return completed


def known_keys(classes: Sequence[type]) -> list[str]:
    """Every key of these data classes."""
    return [f.name for cls in classes for f in fields(cls)]


def _with_closest_key(message: str, classes: Sequence[type]) -> str:
    keys = known_keys(classes)
    words = [word.strip("'\"-,.:").split("=")[0] for word in message.split()]
    for word in words:
        if word not in keys and (close := difflib.get_close_matches(word, keys, n=1, cutoff=0.75)):
            return f"{message}. Did you mean {close[0]!r}?"
    return message
