"""Which of an MLX module's parameters are the output head: those of the layer that made the logits.

mlx-lm's models share no name for their head, and a tied head has no layer of its own: the embedding is called by
`as_linear`. MLX has neither forward hooks nor a readable graph. So `watched` gives every instance in the module a
subclass of its class for the length of one clean forward, whose calls note what each module returned. `head_names`
reads the head from those notes: the last layer to return an array of the vocabulary's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from gapo.backends.mlx.pairgrads.instances import subclassed
from gapo.selection import HEAD_NAME


class Calls:
    """What the modules returned in one forward.

    Attributes:
        outermost: for each call that no watched call surrounds, (module, width) of every (batch, seq, width) array
            returned within it, in order. The last one is the call's own.
        embeddings: modules that were called as embeddings, by look-up or by `as_linear`.
    """

    def __init__(self) -> None:
        self.outermost: list[list[tuple[nn.Module, int]]] = []
        self.embeddings: list[nn.Module] = []
        self._depth = 0

    def run(self, module: nn.Module, call: Callable[[], Any], noted: bool) -> Any:
        """The result of `call()`. With `noted` it counts as one that `module` returned."""
        if self._depth == 0:
            self.outermost.append([])
        self._depth += 1
        try:
            result = call()
        finally:
            self._depth -= 1
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        sequences = isinstance(first, mx.array) and first.ndim == 3
        if noted and sequences:
            self.outermost[-1].append((module, int(first.shape[-1])))
        elif self._depth == 0 and not sequences:  # a score for each sequence: this call made no logits
            self.outermost[-1].clear()
        return result


@contextmanager
def watched(module: nn.Module) -> Iterator[Calls]:
    """The calls of `module` and of every module in it within this context."""
    calls = Calls()
    token = _active.set(calls)
    try:
        with subclassed(module.modules(), _watching):
            yield calls
    finally:
        _active.reset(token)


_active: ContextVar[Calls] = ContextVar("_active")


@cache
def _watching(cls: Any) -> Any:
    """A subclass of `cls` that notes its calls. Of an embedding, only what `as_linear` returns counts."""
    is_embedding = hasattr(cls, "as_linear")

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = _active.get()
        if is_embedding:
            calls.embeddings.append(self)
        return calls.run(self, lambda: cls.__call__(self, *args, **kwargs), noted=not is_embedding)

    def as_linear(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = _active.get()
        calls.embeddings.append(self)
        return calls.run(self, lambda: cls.as_linear(self, *args, **kwargs), noted=True)

    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    if any("__call__" in vars(base) for base in cls.__mro__):
        members["__call__"] = __call__
    if is_embedding:
        members["as_linear"] = as_linear
    return type(cls.__name__, (cls,), members)


def head_names(module: nn.Module, calls: Calls) -> set[str]:
    """Names of the parameters of `module`, frozen ones too, that belong to the output head.

    The first of these that exists is the head:

    1. the module that made the logits last: a layer, or an embedding by `as_linear` (a tied head);
    2. the parameters with a name that heads commonly have;
    3. the one matrix of the logits' width outside the embeddings;
    4. the embedding, whose matrix the forward then multiplied by without a call that could be seen.

    Without an embedding, only names count.

    Raises:
        ValueError: several matrices could be the head.
    """
    parameters = dict(tree_flatten(module.parameters()))
    named = {name for name in parameters if HEAD_NAME.search(name)}
    widths = [returned[-1][1] for returned in calls.outermost if returned and returned[-1][1] > 1]
    if not calls.embeddings or not widths:
        return named
    # Logits are as wide as the embedding has rows. If padded to another width, they are the last array returned.
    logits = set(widths) & {x.shape[0] for m in calls.embeddings for x in _matrices(m)} or {widths[-1]}
    last = [m for returned in calls.outermost if (m := _last_matrix(returned, calls.embeddings, logits))]
    if last or named:
        return _under(module, last, parameters) if last else named
    tied = [m for m in calls.embeddings if any(x.shape[0] in logits for x in _matrices(m))]
    inside = _under(module, calls.embeddings, parameters)
    others = {name for name, x in parameters.items() if x.ndim > 1 and logits & set(x.shape)} - inside
    if not tied:
        return set()
    if len({name.rpartition(".")[0] for name in others}) > 1:
        raise ValueError(
            f'perturb="backbone" leaves the output head out, which could be any of {", ".join(sorted(others)[:4])}: '
            "set perturb='all', or a regular expression on the names of the parameters to perturb"
        )
    return others or _under(module, tied, parameters)


def _last_matrix(
    returned: list[tuple[nn.Module, int]], embeddings: list[nn.Module], widths: set[int]
) -> nn.Module | None:
    """The last module with parameters of its own to return, if it holds a matrix to one of `widths`."""
    ids = {id(m) for m in embeddings}
    for m, width in reversed(returned):
        whole_model = id(m) not in ids and any(id(inner) in ids for inner in m.modules())
        if whole_model or not any(isinstance(x, mx.array) for x in m.values()):
            continue
        if width in widths and any(width in x.shape for x in _matrices(m)):
            return m
        if not m.children():
            return None
    return None


def _matrices(m: nn.Module) -> list[mx.array]:
    """The matrices that `m` holds itself."""
    return [x for x in m.values() if isinstance(x, mx.array) and x.ndim > 1]


def _under(module: nn.Module, owners: list[nn.Module], names: Iterable[str]) -> set[str]:
    """Those of `names` that belong to one of `owners`, wherever in `module` it stands."""
    ids = {id(m) for m in owners}
    prefixes = tuple(f"{path}." if path else "" for path, m in module.named_modules() if id(m) in ids)
    return {name for name in names if prefixes and name.startswith(prefixes)}
