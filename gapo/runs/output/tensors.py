"""Tensors that a run keeps, in safetensors files: no file of theirs can run code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gapo.runs.errors import ConfigError


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The safetensors file `path` of a run, opened for NumPy.

    Raises:
        ConfigError: it is no such file, or lacks what is looked for in it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it, or give --overwrite true to start anew") from error
