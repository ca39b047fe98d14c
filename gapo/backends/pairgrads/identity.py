"""Objects as keys of what was found out about them: equal only where the code that runs is the same."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import Any

_DEEPEST = 4  # containers and functions within each other in what a function closes over
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_GATHERS = (int, float, complex, list, dict, set)


class Itself:
    """An object as a key that is equal only to itself, and that does not keep it alive."""

    __slots__ = ("_hash", "_ref")

    def __init__(self, thing: Any) -> None:
        self._hash = id(thing)
        try:
            self._ref: Any = weakref.ref(thing)
        except TypeError:  # such as a dtype, a slice, a NumPy scalar: nothing large
            self._ref = lambda: thing

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self._ref() is not None and self._ref() is other._ref()


class Identities:
    """Keys of the objects of one framework.

    Args:
        array: its class of arrays. An array as the attribute of an object does not count: it is gathered from step to
            step.
        module: its class of modules, each of which is equal only to itself.
        of_array: the key of an array that a function closes over.
    """

    def __init__(self, array: type, module: type, of_array: Callable[[Any], Hashable] = Itself) -> None:
        self._array, self._module, self._of_array = array, module, of_array

    def of(self, thing: Any, depth: int = _DEEPEST) -> Hashable:
        """`thing` as a key: a function by its code and what it closes over, an object that is called by its class and
        attributes, a plain value by itself; any other object by its identity (held weakly where it can be, so that
        another one at its address is not taken for it).
        """
        if isinstance(thing, _PLAIN):
            return type(thing), thing
        if isinstance(thing, self._array):
            return self._of_array(thing)
        if depth == 0:
            return Itself(thing)
        inner = functools.partial(self._each, depth=depth - 1)
        if isinstance(thing, types.MethodType):
            return self.of(thing.__func__, depth - 1), self._attributes(thing.__self__, depth)
        if isinstance(thing, types.FunctionType):
            defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).items())
            outer = tuple(self.of(x) if isinstance(x, _PLAIN) else Itself(x) for x in _globals(thing))
            return thing.__code__, inner(_cells(thing)), inner(defaults), outer
        if isinstance(thing, functools.partial):
            return functools.partial, self.of(thing.func, depth - 1), inner(thing.args), inner(thing.keywords.items())
        if type(thing) is tuple:
            return tuple, inner(thing)
        return (type(thing).__call__, self._attributes(thing, depth)) if callable(thing) else Itself(thing)

    def _attributes(self, thing: Any, depth: int) -> Hashable:
        """An object by its class and attributes: made anew each step, it is the same. Left out is what counts and
        gathers from step to step: numbers, lists, arrays.
        """
        own = getattr(thing, "__dict__", None)
        if isinstance(thing, (type, self._module, types.BuiltinFunctionType)) or type(own) is not dict:
            return Itself(thing)
        gathers = (*_GATHERS, self._array)
        stable = {name: x for name, x in own.items() if isinstance(x, (bool, str)) or not isinstance(x, gathers)}
        return type(thing), self._each(stable.items(), depth - 1)

    def _each(self, things: Iterable[Any], depth: int) -> tuple[Hashable, ...]:
        return tuple(self.of(thing, depth) for thing in things)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


def _globals(function: types.FunctionType) -> Iterator[Any]:
    names = function.__globals__
    return (names[name] for name in function.__code__.co_names if name in names)
