"""Data classes whose fields say what they are: help and choices as metadata, from one definition.

A setting's help is its entry in the docstring of its class, and its choices stand at its field. Both travel as metadata
into other data classes and into command lines, so that no text and no list is written twice.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def choice(*choices: str) -> Any:
    """A dataclass field that takes one of these words, by default the first; its metadata has "choices"."""
    return field(default=choices[0], metadata={"choices": list(choices)})


def described(cls: type[T]) -> type[T]:
    """Class decorator, below `dataclass`: each field's docstring entry becomes "help" in its metadata.

    Under `python -OO`, which drops docstrings, no field has a help.
    """
    entries = docstring_entries(cls.__doc__ or "")
    for name in inspect.get_annotations(cls):
        value = cls.__dict__.get(name, MISSING)
        default, metadata = (value.default, value.metadata) if isinstance(value, Field) else (value, {})
        setattr(cls, name, field(default=default, metadata={"help": entries.get(name), **metadata}))
    return cls


def docstring_entries(docstring: str) -> dict[str, str]:
    """{name: text} of the section "Attributes:" or "Args:" of a Google-style docstring, each text on one line."""
    _, _, section = re.sub("^Args:$", "Attributes:", inspect.cleandoc(docstring), flags=re.M).partition("Attributes:\n")
    section = section.partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def choices_of(cls: Any) -> dict[str, list[str]]:
    """{field: its choices} of a data class, of the fields that have choices."""
    return {f.name: f.metadata["choices"] for f in fields(cls) if "choices" in f.metadata}


def carried(cls: Any, name: str) -> Any:
    """A field with the default, the help and the choices of the field `name` of another data class."""
    source = next(f for f in fields(cls) if f.name == name)
    return field(default=source.default, metadata=source.metadata)
