"""The command line and the YAML of `gapo train`, `study` and `score`: data classes in, checked instances out."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from gapo._fields import choices_of, docstring_entries
from gapo.runs.errors import ConfigError
from gapo.runs.shipped import configuration, configuration_names
from gapo.runs.yaml_file import require_plain_yaml

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, such as [1, 2]",
    "tuple": "a list, such as [1, 2]",
    "dict": "a mapping, such as {name: value}",
    "NoneType": "null",
}
_PAIRS = (".jsonl", ".csv", ".tsv", ".parquet", ".gz")


class _LinesOfEpilog(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the epilog's lines as they are."""


def parser_of(classes: Sequence[type], **about: str) -> Any:
    """A parser of the fields of data classes, from YAML and from the command line.

    Types and defaults are the fields', the help is that of their docstrings, and the choices those of their metadata.
    `about` goes to `argparse.ArgumentParser`: prog, description, epilog.
    """
    # Abbreviated, `--conf` would read a file that `config_files` does not see, and so does not check.
    parser = ArgumentParser(**about, exit_on_error=False, allow_abbrev=False, formatter_class=_LinesOfEpilog)
    parser.add_argument("--config", action="config", metavar="CONFIG.yaml", help="the same as the first argument")
    for cls in classes:
        add_fields(parser, cls)
    return parser


def parser_with_first(first: str, classes: Sequence[type], by_hand: Collection[str] = (), **about: str) -> Any:
    """A parser of the fields of data classes, from the command line alone, whose first word is the field `first`.

    Fields of the first class that are false unless said otherwise need no value. The caller adds those of `by_hand`,
    whose help is `help_of`. `about` is as for `parser_of`.
    """
    parser = ArgumentParser(**about, exit_on_error=False, allow_abbrev=False)
    texts = help_of(classes[0])
    parser.add_argument(first, help=texts[first])
    switches = [f.name for f in fields(classes[0]) if f.name not in by_hand and f.default is False]
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=texts[switch])
    for cls in classes:
        add_fields(parser, cls, skip={first, *switches, *by_hand})
    return parser


def help_of(cls: type) -> dict[str, str]:
    """{field: its help} of a data class, from its docstring and those that it inherits from."""
    return {name: text for c in reversed(cls.__mro__) for name, text in docstring_entries(c.__doc__ or "").items()}


def add_fields(parser: Any, cls: type, skip: Collection[str] = ()) -> None:
    """Add the fields of a data class to a parser, but those of `skip`."""
    parser.add_class_arguments(cls, skip={*skip, *(f.name for f in fields(cls) if not _is_option(f))})
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
    with option_errors(known_keys(classes)):
        values = stated(parser, with_config(arguments), switches=switches_of(classes))
        instances = instances_of(values, classes)
        if check is not None:
            check(*instances)
        return instances


@contextmanager
def option_errors(keys: Collection[str]) -> Iterator[None]:
    """Raise what a parser or a data class raises as a ConfigError of one line; for an unknown key, with the nearest."""
    try:
        yield
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError("a value is nested too deeply") from error
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_with_advice(_short(in_own_words(error)), keys)) from error


def stated(
    parser: Any, arguments: Sequence[str], switches: Collection[str] = (), lists: Collection[str] = ()
) -> dict[str, Any]:
    """The keys that a command line and its files set, with their values; those left at their defaults are not there.

    Args:
        arguments: of the command line, files with `--config` before them.
        switches: keys that need no value: `--strict` is `--strict true`, and `--no_strict` is `--strict false`.
        lists: keys that take several words, as text with commas.

    Raises:
        ConfigError, ValueError, ArgumentError: see `option_errors`.
    """
    for path in config_files(arguments):
        require_plain_yaml(path)
    values: dict[str, Any] = parser.parse_args(_spelt_out(arguments, switches, lists), defaults=False).as_dict()
    values.pop("config", None)
    return values


def instances_of(values: Mapping[str, Any], classes: Sequence[type]) -> list[Any]:
    """An instance of each data class, of those values that are its fields. Raises ValueError for what none accepts."""
    return [cls(**_checked(values, cls)) for cls in classes]


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
        if is_pairs_file(name):
            raise ConfigError(f"{name!r} is a file of pairs and no configuration: give pairs with --pairs {name}")
        if not os.path.isfile(name):
            raise ConfigError(
                f"there is no configuration file {name!r}, and gapo ships none of that name: it has "
                f"{', '.join(configuration_names())} (gapo examples lists them)"
            )
    return [Path(name) for name in names]


def is_pairs_file(name: str) -> bool:
    """Whether a name is that of a file of pairs: by its ending, or a JSON file that holds a list."""
    if name.lower().endswith(_PAIRS):
        return True
    if not name.lower().endswith(".json") or not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """Every value that the command line itself has for a key, as text."""
    option = f"--{name}"
    joined = [argument.removeprefix(f"{option}=") for argument in arguments if argument.startswith(f"{option}=")]
    return joined + [following for argument, following in pairwise(arguments) if argument == option]


def _checked(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The fields of one data class; the parser accepts null for everything, and numbers that are not finite."""
    settings = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    for f in fields(cls):
        value = settings.get(f.name)
        if value is None and f.name in settings and "None" not in str(f.type):
            raise ValueError(f"{f.name} must not be null")
        parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        if not all(math.isfinite(part) for part in parts if isinstance(part, float)):
            raise ValueError(f"{f.name} must be finite, got {value!r}")
    return settings


def in_own_words(error: Exception) -> str:
    r"""The message of an error of jsonargparse, in one line; that on a value of another type as this project says it.

    >>> in_own_words(ValueError("Parser key \"seed\": Expected a <class 'int'>. Got value: 1.5"))
    "seed must be a whole number, got '1.5'"
    """
    message = " ".join(str(error).split())
    key = re.match(r'Parser key "(\w+)": (?:Expected a |Does not validate)', message)
    kinds = dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
    values = re.findall(r"(?:Got|Given) value: (.*?)(?= - Expected| Given value type|$)", message)
    if key is None or not values or not kinds.keys() <= _KINDS.keys():
        return message
    accepted = " or ".join(dict.fromkeys(_KINDS[kind] for kind in kinds))
    each = "each of " if "Given value type: <class 'list'>" in message and not kinds.keys() & {"list", "tuple"} else ""
    return f"{each}{key[1]} must be {accepted}, got {values[0]!r}"


def _short(message: str, most: int = 500) -> str:
    return message if len(message) <= most else f"{message[: most - 4]} ..."


def switches_of(classes: Sequence[type]) -> set[str]:
    """The fields of these data classes that are true or false."""
    return {f.name for cls in classes for f in fields(cls) if str(f.type) in ("bool", "<class 'bool'>", "bool | None")}


def _spelt_out(arguments: Sequence[str], switches: Collection[str], lists: Collection[str]) -> list[str]:
    """The arguments with a value for every switch, and with the words of a list as one."""
    complete: list[str] = []
    i = 0
    while i < len(arguments):
        argument, following = arguments[i], arguments[i + 1] if i + 1 < len(arguments) else "--"
        name, i = argument.removeprefix("--"), i + 1
        if argument == name:
            complete.append(argument)
        elif name.startswith("no_") and name.removeprefix("no_") in switches:
            complete += [f"--{name.removeprefix('no_')}", "false"]
        elif name in lists and not following.startswith("-"):
            end = next((j for j in range(i, len(arguments)) if arguments[j].startswith("-")), len(arguments))
            complete += [argument, ",".join(arguments[i:end])]
            i = end
        else:
            complete += [argument, "true"] if name in switches and following.startswith("--") else [argument]
    return complete


def known_keys(classes: Sequence[type]) -> list[str]:
    """Every key of these data classes."""
    return [f.name for cls in classes for f in fields(cls) if _is_option(f)]


def keys_of(parser: Any) -> set[str]:
    """Every key of a parser."""
    return {option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")}


def _is_option(field: Any) -> bool:
    """Whether a field is set by its name, and not from several options."""
    return bool(field.metadata.get("option", True))


def _with_advice(message: str, keys: Collection[str]) -> str:
    """The message of an unknown option with the nearest key, and that of a file beside the options with its option."""
    words = [word.strip("'\"-,.:").split("=")[0] for word in message.split()]
    if words[:1] == ["Parser"] or words[0] in keys:  # of a value, whose key is known
        return message
    for word in words:
        if word not in keys and (close := difflib.get_close_matches(word, keys, n=1, cutoff=0.75)):
            return f"{message}. Did you mean {close[0]!r}?"
    extra = message.removeprefix("unrecognized arguments: ").split()[0]
    if message.startswith("unrecognized") and is_pairs_file(extra) and "pairs" in keys:
        return f"{message}. Give pairs with --pairs {extra}"
    return message
