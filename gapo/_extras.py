"""What is told where an optional library is not installed: the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def missing(what: str, extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to raise from `error` where `what`, such as "gapo.adapters.hf", needs the libraries of `extra`."""
    why = f"needs {error.name}, which is not installed" if error.name else f"cannot be imported ({error})"
    return ModuleNotFoundError(f'{what} {why}: pip install "gapo[{extra}]"', name=error.name)


@contextmanager
def named_extra(what: str, extra: str) -> Iterator[None]:
    """Around imports, before any work: raises `missing` for what is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(what, extra, error) from error
