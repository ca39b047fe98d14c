"""What was found out about a model, and for whom it holds: answers by module and by everything that they rest on.

A verdict rests on the code that ran: the function of the outputs with all that it closes over, and the classes, modes
and `forward`s of the module's layers. Where one of these changes, the verdict does not hold.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

_MOST = 16  # of one module: a function that is another one at each step leaves no more behind
_DEEPEST = 4  # containers and functions within each other in what a function closes over
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_GATHERS = (int, float, complex, list, dict, set, torch.Tensor)


class Verdicts:
    """Answers by subject, module and key. Whoever takes the steps holds them, so that another one starts with none.

    They go with the module; of too many under one subject, the oldest go.
    """

    def __init__(self) -> None:
        self._answers: weakref.WeakKeyDictionary[nn.Module, dict[str, OrderedDict[Hashable, Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, subject: str, module: nn.Module, key: Hashable) -> Any:
        """The answer kept for `key`, or None."""
        answers = self._answers.get(module, {}).get(subject)
        return None if answers is None else answers.get(key)

    def keep(self, subject: str, module: nn.Module, key: Hashable, answer: Any) -> None:
        """Keep an answer."""
        answers = self._answers.setdefault(module, {}).setdefault(subject, OrderedDict())
        answers[key] = answer
        if len(answers) > _MOST:
            answers.popitem(last=False)

    def first(self, subject: str, module: nn.Module, key: Hashable) -> bool:
        """Whether this is asked for the first time: what is said once."""
        if self.get(subject, module, key):
            return False
        self.keep(subject, module, key, True)
        return True


def basis(function: Any, module: nn.Module) -> Hashable:
    """All that a verdict on `function(module, batch)` rests on, the batch aside; equal only where all of it is."""
    layers = hash(
        tuple((type(m), type(m).forward, identity(vars(m).get("forward")), m.training) for m in module.modules())
    )
    trained = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return identity(function), layers, trained, autocast


def identity(thing: Any, depth: int = _DEEPEST) -> Hashable:
    """`thing` as a key: a function by its code and what it closes over, an object that is called by its class and
    attributes, a plain value by itself; any other object by its identity (held weakly where it can be, so that another
    one at its address is not taken for it).
    """
    if isinstance(thing, _PLAIN):
        return type(thing), thing
    if depth == 0:
        return _Itself(thing)
    inner = functools.partial(_identities, depth=depth - 1)
    if isinstance(thing, types.MethodType):
        return identity(thing.__func__, depth - 1), _attributes(thing.__self__, depth)
    if isinstance(thing, types.FunctionType):
        defaults = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).items())
        return thing.__code__, inner(_cells(thing)), inner(defaults), tuple(map(_global, _globals(thing)))
    if isinstance(thing, functools.partial):
        return functools.partial, identity(thing.func, depth - 1), inner(thing.args), inner(thing.keywords.items())
    if type(thing) is tuple:
        return tuple, inner(thing)
    return (type(thing).__call__, _attributes(thing, depth)) if callable(thing) else _Itself(thing)


def _attributes(thing: Any, depth: int) -> Hashable:
    """An object by its class and attributes: made anew each step, it is the same. Left out is what counts and gathers
    from step to step: numbers, lists, tensors.
    """
    own = getattr(thing, "__dict__", None)
    if isinstance(thing, (type, nn.Module, types.BuiltinFunctionType)) or type(own) is not dict:
        return _Itself(thing)
    stable = {name: x for name, x in own.items() if isinstance(x, (bool, str)) or not isinstance(x, _GATHERS)}
    return type(thing), _identities(stable.items(), depth - 1)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that has no value yet
            yield cell.cell_contents


def _globals(function: types.FunctionType) -> Iterator[Any]:
    names = function.__globals__
    return (names[name] for name in function.__code__.co_names if name in names)


def _global(thing: Any) -> Hashable:
    return identity(thing) if isinstance(thing, _PLAIN) else _Itself(thing)


def _identities(things: Iterable[Any], depth: int) -> tuple[Hashable, ...]:
    return tuple(identity(thing, depth) for thing in things)


class _Itself:
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
        return isinstance(other, _Itself) and self._ref() is not None and self._ref() is other._ref()
