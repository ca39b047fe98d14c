"""A class of its own for each of some modules, while a context lasts: how calls are observed without patching a class.

Python looks `__call__` up on the class. MLX has no forward hooks, and other code may hold a module by any reference, so
that replacing it within its parent would miss calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx import nn


@contextmanager
def subclassed(modules: Iterable[nn.Module], subclass: Callable[[Any], Any]) -> Iterator[None]:
    """Give each of `modules` the class `subclass(type(module))` within this context."""
    classes = {id(m): (m, type(m)) for m in modules}
    try:
        try:
            for m, cls in classes.values():
                m.__class__ = subclass(cls)
            yield
        finally:
            _put_back(classes.values())
    finally:  # repeated, since a Ctrl-C may interrupt the line above
        _put_back(classes.values())


def _put_back(classes: Iterable[tuple[nn.Module, type]]) -> None:
    for m, cls in classes:
        m.__class__ = cls
