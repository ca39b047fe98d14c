"""The fields of `transformers.TrainingArguments` as options of `gapo train`.

Importing transformers takes seconds, and a misspelt option should be refused at once. So their names, types and choices
are read from its source. Their values are checked against their types when PyTorch's loop has imported it.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gapo.runs.errors import ConfigError

_CLASS = "TrainingArguments"
_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")  # that of the class, and those of its enumerations


@cache
def declared_fields() -> dict[str, str]:
    """{name: annotation} of the installed `transformers.TrainingArguments`, without an import; {} without it."""
    return {name: ast.unparse(line.annotation) for name, line in _lines().items()}


def accepted_values() -> dict[str, str]:
    """{name: "{first, second}" of a field with choices, else its type}, of the fields of `declared_fields`."""
    enums = {name: values for file in _FILES for name, values in _enums(file).items()}
    accepted = {}
    for name, line in _lines().items():
        names = {node.id for node in ast.walk(line.annotation) if isinstance(node, ast.Name)}
        values = [value for enum in names & enums.keys() for value in enums[enum]] or _choices(line)
        types = ast.unparse(line.annotation).split(" | ")
        accepted[name] = f"{{{', '.join(values)}}}" if values else " | ".join(t for t in types if t != "None")
    return accepted


@cache
def _lines() -> dict[str, ast.AnnAssign]:
    body = next((node.body for node in _classes(_FILES[0]) if node.name == _CLASS), [])
    lines = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: node for node in lines if isinstance(node.target, ast.Name)}


@cache
def _classes(file: str) -> list[ast.ClassDef]:
    spec = importlib.util.find_spec("transformers")
    path = Path(spec.origin).with_name(file) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        return []
    return [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)]


def _enums(file: str) -> dict[str, list[str]]:
    """{class: its values} of the classes of a file that list texts."""
    classes = [node for node in _classes(file) if any(ast.unparse(base).endswith("Enum") for base in node.bases)]
    return {node.name: _texts(line.value for line in node.body if isinstance(line, ast.Assign)) for node in classes}


def _choices(line: ast.AnnAssign) -> list[str]:
    """The choices in the metadata of a field, where they stand there as a list."""
    for node in ast.walk(line):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    return _texts(value.elts)
    return []


def _texts(nodes: Iterable[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def typed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields of `TrainingArguments`, each of its field's type.

    Raises:
        ConfigError: a value is of another type; names the field.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from transformers import TrainingArguments

    from gapo.runs.options import in_own_words

    hints: dict[str, Any] = typing.get_type_hints(TrainingArguments)
    hints["fsdp"] |= bool  # the new form, which the annotation lacks
    parser = ArgumentParser(exit_on_error=False)
    plain = dict(values)
    for name, value in values.items():
        parser.add_argument(f"--{name}", type=hints[name])
        if value is False and bool not in typing.get_args(hints[name]) and str in typing.get_args(hints[name]):
            plain[name] = "no"  # as YAML reads the word
    try:
        settings: dict[str, Any] = parser.parse_object(plain).as_dict()
    except (ArgumentError, ValueError) as error:
        raise ConfigError(in_own_words(error)) from error
    return settings
