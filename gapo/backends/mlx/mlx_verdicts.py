"""What was found out about a module, and for what it holds: answers by module and by all that they rest on."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import suppress
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

_MOST = 16  # a function that is another one at each step leaves no more behind
_DEEPEST = 4  # functions within each other in what a function closes over
_PLAIN = (type(None), bool, int, float, str, bytes)


class MlxVerdicts:
    """Answers by module and key; of too many, the oldest go."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Hashable, str] = OrderedDict()

    def get(self, module: nn.Module, key: Hashable) -> str | None:
        """The answer for `key`, or None."""
        return self._answers.get((_Itself(module), key))

    def keep(self, module: nn.Module, key: Hashable, answer: str) -> None:
        """Keep an answer."""
        self._answers[_Itself(module), key] = answer
        if len(self._answers) > _MOST:
            self._answers.popitem(last=False)

    def first(self, module: nn.Module, text: str) -> bool:
        """Whether this is asked for the first time: what is said once."""
        if self.get(module, ("said", text)) is not None:
            return False
        self.keep(module, ("said", text), text)
        return True


def basis(function: Any, module: nn.Module) -> Hashable:
    """All that a verdict on `function(module, batch)` rests on, the batch aside."""
    layers = tuple((type(m), type(m).__call__, m.training) for m in module.modules())
    return identity(function), layers, tuple(name for name, _ in tree_flatten(module.trainable_parameters()))


def identity(thing: Any, depth: int = _DEEPEST) -> Hashable:
    """`thing` as a key: a function by its code and what it closes over, a plain value by itself, else by identity.

    An array is data, as the batch is: it counts by shape and dtype.
    """
    if isinstance(thing, _PLAIN):
        return type(thing), thing
    if isinstance(thing, mx.array):
        return mx.array, thing.shape, str(thing.dtype)
    inner = functools.partial(identity, depth=depth - 1)
    if depth and isinstance(thing, types.MethodType):
        return inner(thing.__func__), _Itself(thing.__self__)
    if depth and isinstance(thing, types.FunctionType):
        defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        names = (thing.__globals__.get(name) for name in thing.__code__.co_names)
        outer = (x if isinstance(x, _PLAIN) else _Itself(x) for x in names)
        return thing.__code__, tuple(map(inner, (*_cells(thing), *defaults))), tuple(map(inner, outer))
    if depth and isinstance(thing, functools.partial):
        return inner(thing.func), tuple(map(inner, (*thing.args, *thing.keywords.values())))
    return thing if isinstance(thing, _Itself) else _Itself(thing)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


class _Itself:
    """An object as a key that is equal only to itself, and that does not keep it alive."""

    __slots__ = ("_hash", "_ref")

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._ref: Any = weakref.ref(thing)
        except TypeError:  # such as a number, a list: nothing large
            self._ref = lambda: thing

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._ref() is not None and self._ref() is other._ref()
