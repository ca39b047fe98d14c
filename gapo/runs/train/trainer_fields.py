"""The fields of `transformers.TrainingArguments` as options of `gapo train`.

Importing transformers takes seconds, and a misspelt option should be refused at once. So their names are read from its
source. Their values are checked against their types when PyTorch's loop has imported it.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gapo.runs.errors import ConfigError

_CLASS = "TrainingArguments"


@cache
def declared_fields() -> dict[str, str]:
    """{name: annotation} of the installed `transformers.TrainingArguments`, without an import; {} without it."""
    spec = importlib.util.find_spec("transformers")
    path = Path(spec.origin).with_name("training_args.py") if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        return {}
    classes = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)]
    body = next((node.body for node in classes if node.name == _CLASS), [])
    lines = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: ast.unparse(node.annotation) for node in lines if isinstance(node.target, ast.Name)}


def typed_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields of `TrainingArguments`, each of its field's type.

    Raises:
        ConfigError: a value is of another type; names the field.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from transformers import TrainingArguments

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
        raise ConfigError(" ".join(str(error).split())) from error
    return settings
