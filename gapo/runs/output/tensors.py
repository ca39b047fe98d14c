"""Tensors that a run keeps, in safetensors files: reading one never runs code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gapo.files import write_bytes
from gapo.runs.errors import ConfigError

Arrays = dict[str, np.ndarray]

REMEDY = "remove it, or give --overwrite true to start anew"


@contextmanager
def open_tensors(path: Path, remedy: str = REMEDY) -> Iterator[Any]:
    """The safetensors file `path` of a run, opened for NumPy.

    Raises:
        ConfigError: `path` is no such file, or lacks a tensor that is read from it. The message ends in `remedy`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}): {remedy}") from error


def kept_arrays(path: Path, digest: str, measure: Callable[[], Arrays], *, others: str, remedy: str = REMEDY) -> Arrays:
    """The arrays of `path`, or those of `measure`, which are then written there atomically.

    Args:
        path: the file.
        digest: identifies what the arrays were measured on.
        measure: called where the file does not exist.
        others: ends the message "PATH holds ..." where the file has another digest.
        remedy: what to do where the file is damaged.

    Raises:
        ConfigError: the file is damaged, or has another digest.
    """
    from safetensors.numpy import save

    if not path.exists():
        arrays = measure()
        write_bytes(path, save(arrays, metadata={"pairs": digest}))
        return arrays
    with open_tensors(path, remedy) as file:
        if (file.metadata() or {}).get("pairs") != digest:
            raise ConfigError(f"{path} holds {others}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
