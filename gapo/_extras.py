"""Errors for optional libraries that are absent: they name the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def missing(what: str, extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise from `error` if `what`, such as "gapo.adapters.hf", lacks a library of `extra`."""
    reason = f"needs {error.name}, which is not installed" if error.name else f"cannot be imported ({error})"
    return ModuleNotFoundError(f'{what} {reason}: pip install "gapo[{extra}]"', name=error.name)


@contextmanager
def named_extra(what: str, extra: str) -> Iterator[None]:
    """A context for imports alone: raises `missing` for the library that is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, extra, error) from error
