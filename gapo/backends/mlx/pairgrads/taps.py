"""Records what each layer received, and the derivative of the outputs by what it returned, in one backward.

Each layer's result passes through an identity with a backward of its own (a tap). When MLX propagates the outputs'
derivative, the tap sees it. MLX is asked for the derivative by one scalar that every tap receives, not by parameters:
no product with a layer's input is then evaluated, and what is left is the propagation itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from gapo.backends.mlx.pairgrads.contributions import Contribution
from gapo.backends.mlx.pairgrads.instances import subclassed
from gapo.backends.mlx.pairgrads.layer_rules import Call, Rule, rows_when_sorted, rule_of, sorts_entries


class Refused(ValueError):
    """The groups' gradients cannot be told apart, or are not MLX's own: use MLX's."""


class GroupGradients:
    """The gradients of each group, in parts, by parameter name."""

    def __init__(self, parts: dict[str, list[Contribution]], like: Mapping[str, mx.array], groups: int) -> None:
        self._parts, self._like, self.groups = parts, like, groups

    def weighted(self, w: mx.array, names: Iterable[str]) -> dict[str, mx.array]:
        """`sum_i w[i] grad_i` of the named parameters, w (groups,)."""
        return {name: self._sum([part.weighted(w) for part in self._parts[name]], name) for name in names}

    def _sum(self, terms: list[mx.array], name: str) -> mx.array:
        like = self._like[name]
        return sum(terms[1:], start=terms[0]).astype(like.dtype) if terms else mx.zeros(like.shape, like.dtype)

    def along(self, delta: Callable[[str, mx.array], mx.array], names: Iterable[str]) -> mx.array:
        """`<grad_i, delta>` over the named parameters for each group i, (groups,)."""
        total: Any = mx.zeros(())
        for name in names:
            if parts := self._parts[name]:
                direction = delta(name, self._like[name])
                total = sum((part.along(direction) for part in parts), start=total)
        return total


class _Layer(NamedTuple):
    path: str
    rules: dict[str, Rule]  # by the method that runs the layer
    trained: frozenset[str]  # names of its own trained parameters


class _Record(NamedTuple):
    layer: _Layer
    rule: Rule
    call: Call
    g: mx.array


class _Frame:
    """A call in progress, and what the calls within it leave there."""

    def __init__(self) -> None:
        self.dropped: mx.array | None = None
        self.rows: mx.array | None = None


class Recorder:
    """The plan of a module's layers, and the record of one forward and backward through them.

    Args:
        module: the module.
        parameters: its trained parameters by name.

    Raises:
        Refused: a parameter belongs to a layer without a rule.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, mx.array]) -> None:
        self._parameters = parameters
        self._layers: dict[int, _Layer] = {}
        self._sorting: set[int] = set()
        self._checkpointed: set[int] = set()
        self._observed: list[nn.Module] = []
        self._frames: list[_Frame] = []
        self._records: list[_Record] = []
        self._seed: mx.array | None = None
        own: dict[str, set[str]] = {}
        for name in parameters:
            path, _, key = name.rpartition(".")
            own.setdefault(path, set()).add(key)
        for path, m in module.named_modules():
            if path in own:
                self._layers[id(m)] = self._layer(path, m, frozenset(own.pop(path)))
            elif not self._has_a_part(m):
                continue
            self._observed.append(m)
        if own:
            raise Refused(f"{next(iter(own)) or 'the module'} holds parameters outside of any layer")

    def _layer(self, path: str, m: nn.Module, trained: frozenset[str]) -> _Layer:
        methods = {method: getattr(type(m), method, None) for method in ("__call__", "as_linear")}
        rules = {method: rule_of(m, function) for method, function in methods.items() if function}
        where = f"{path or 'the module'}, a {type(m).__name__}"
        if any(rule is None or not trained <= rule.parameters for rule in rules.values()):
            raise Refused(f"there is no rule for {', '.join(sorted(trained))} of {where}")
        if id(m) in self._layers:
            raise Refused(f"{where}, is {self._layers[id(m)].path} as well")
        return _Layer(path, {method: rule for method, rule in rules.items() if rule}, trained)

    def _has_a_part(self, m: nn.Module) -> bool:
        """Whether the calls of a module without trained parameters of its own matter."""
        function: Any = type(m).__call__
        if sorts_entries(function):
            self._sorting.add(id(m))
        elif getattr(function, "__name__", "") == "checkpointed_fn":  # mlx-lm's grad_checkpoint
            self._checkpointed.add(id(m))
        else:
            return isinstance(m, nn.Dropout)
        return True

    def run(
        self, function: Callable[[], Sequence[mx.array]], signs: Sequence[int], by_row: bool
    ) -> tuple[tuple[mx.array, ...], GroupGradients, Hashable]:
        """Run the module once, and propagate once.

        Args:
            function: runs the module, and returns the outputs, (N,) each.
            signs: of each output.
            by_row: whether each row is a group: there are len(outputs) N then, and N otherwise.

        Returns:
            the outputs; the gradients of `sum_j signs[j] outputs[j]` by group; which layers were called, and how.

        Raises:
            Refused: a layer received something else than the batch's rows, or was called in a way that has no rule.
        """
        outputs: list[mx.array] = []

        def total(seed: mx.array) -> mx.array:
            self._seed = seed
            outputs[:] = function()
            sums = [sign * mx.sum(output.astype(mx.float32)) for sign, output in zip(signs, outputs, strict=False)]
            return mx.sum(mx.stack(sums))

        token = _active.set(self)
        try:
            with subclassed(self._observed, _tapping):
                mx.vjp(total, [mx.zeros(())], [mx.ones(())])
            groups = outputs[0].shape[0] * (len(outputs) if by_row else 1)
            return (tuple(outputs), *self._gradients(groups))
        finally:  # the taps hold this object, which must not hold in turn what they hang on
            _active.reset(token)
            self._records, self._frames, self._seed = [], [], None

    def _gradients(self, groups: int) -> tuple[GroupGradients, Hashable]:
        parts: dict[str, list[Contribution]] = {name: [] for name in self._parameters}
        calls: list[Hashable] = []
        for (path, _, trained), rule, call, g in self._records:
            x = call.args[0]
            blocks, rest = divmod(x.shape[0] if x.ndim > 1 else 0, groups)
            if call.rows is None and (rest or blocks not in (1, 2) or g.shape[0] != x.shape[0]):
                raise Refused(f"{path} receives an array of shape {tuple(x.shape)}, not one with the batch's rows")
            calls.append((path, rule.parameters, blocks, x.ndim, call.rows is None))
            for key, part in rule.contributions(call._replace(groups=groups), g):
                if key in trained:
                    parts[f"{path}.{key}" if path else key].append(part)
        _unmark([x for of_one in parts.values() for part in of_one for x in part.arrays()])
        return GroupGradients(parts, self._parameters, groups), tuple(calls)

    def call(self, m: nn.Module, method: str, function: Callable[..., Any], args: Any, options: Any) -> Any:
        """The result of `function(m, *args, **options)`, the class's own `method`, with a tap on it."""
        if id(m) in self._checkpointed and args and isinstance(args[0], mx.array):
            # Its backward is a function of what it receives: this makes it depend on the seed.
            args = (_tap(args[0], self._seed, lambda g: None), *args[1:])
        frame = _Frame()
        if id(m) in self._sorting:
            frame.rows = rows_when_sorted(args[1])
        self._frames.append(frame)
        try:
            y = function(m, *args, **options)
        finally:
            self._frames.pop()
        if isinstance(m, nn.Dropout) and self._frames:
            self._frames[-1].dropped = y
        layer = self._layers.get(id(m))
        if layer is None:
            return y
        call = self._described(m, method, function, args, options, y, frame)
        rule = layer.rules[method]
        return _tap(y, self._seed, lambda g: self._records.append(_Record(layer, rule, call, g)))

    def _described(
        self, m: nn.Module, method: str, function: Any, args: Any, options: dict[str, Any], y: mx.array, frame: _Frame
    ) -> Call:
        is_sorted = bool(options.pop("sorted_indices", False))
        rows = None
        if is_sorted:
            rows = next((outer.rows for outer in reversed(self._frames) if outer.rows is not None), None)
        if options or (is_sorted and rows is None):
            raise Refused(f"{self._layers[id(m)].path} is called in a way that has no rule")
        return Call(m, function, args, is_sorted, y, frame.dropped, rows)


def _tap(y: mx.array, seed: Any, see: Callable[[mx.array], None]) -> mx.array:
    """`y`, at which the backward calls `see` with the derivative by it."""
    identity: Any = mx.custom_function(lambda y, seed: y)

    @identity.vjp
    def look(primals: Any, g: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
        see(g)
        return g, mx.zeros(())

    tapped: mx.array = identity(y, seed)
    return tapped


def _unmark(arrays: list[mx.array]) -> None:
    """Let what is behind `arrays` go as it is evaluated, also while a gradient surrounds this.

    MLX keeps the graph behind every array that it marks as differentiated. Its `vjp` takes the marks off all that its
    function closes over.
    """
    mx.vjp(lambda seed: seed + sum(mx.sum(x) for x in arrays), [mx.zeros(())], [mx.ones(())])


_active: ContextVar[Recorder] = ContextVar("_active")


@cache
def _tapping(cls: Any) -> Any:
    """A subclass of `cls` whose calls go through the active recorder."""

    def __call__(self: Any, *args: Any, **options: Any) -> Any:
        return _active.get().call(self, "__call__", cls.__call__, args, options)

    def as_linear(self: Any, *args: Any, **options: Any) -> Any:
        return _active.get().call(self, "as_linear", cls.as_linear, args, options)

    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__call__": __call__}
    if hasattr(cls, "as_linear"):
        members["as_linear"] = as_linear
    return type(cls.__name__, (cls,), members)
