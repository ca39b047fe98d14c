"""Arrays in place of a module's own, on which two ways to its gradients are compared.

Within `mx.compile` the module's arrays are placeholders without values; arrays that are made there can be read. And on
arrays drawn at random no gradient is 0 by chance, as half of them are for adapters that begin at 0. Arrays of one shape
are one array: a model of many equal layers needs little memory for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from gapo._namespace import is_concrete
from gapo.backends.mlx.mlx_state import ModuleState

_TOLERANCE = 2e-3  # of a gradient's norm, in float32 and through other kernels
_FLOOR = 2e-6  # of the norm of all gradients: a sum that cancels is rounding


@contextmanager
def stand_ins(module: nn.Module) -> Iterator[None]:
    """Within this context the floating-point arrays of `module` are random, in float32 or wider.

    All other arrays stay, where their values can be read.
    """
    before = ModuleState(module)
    try:
        try:
            _replace(module, {})
            yield
        finally:
            before.put_back()
    finally:  # repeated, since a Ctrl-C may interrupt the line above
        before.put_back()


def _replace(container: Any, drawn: dict[Any, mx.array]) -> None:
    is_dict = isinstance(container, dict)
    for key, value in list(container.items() if is_dict else enumerate(container)):
        if isinstance(value, (dict, list)):
            _replace(value, drawn)
        elif isinstance(value, mx.array) and (_is_parameter(key, value) or not is_concrete(value)):
            (dict if is_dict else list).__setitem__(container, key, _drawn(value, drawn))


def _is_parameter(key: Any, value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating) and not str(key).startswith("_")


def _drawn(like: mx.array, drawn: dict[Any, mx.array]) -> mx.array:
    """The array for the shape and dtype of `like`: matrices of about norm 1, vectors around 1, as norms have them."""
    kind, shape = like.dtype, like.shape
    if (shape, kind) not in drawn:
        key = mx.random.key(len(drawn))
        if mx.issubdtype(kind, mx.floating):
            width = math.sqrt(shape[-1]) if len(shape) > 1 else 1
            x = mx.random.normal(shape, key=key) / width if len(shape) > 1 else mx.random.uniform(0.5, 1.5, shape, key=key)
            drawn[shape, kind] = x.astype(mx.float64) if kind == mx.float64 else x
        elif kind == mx.uint32:  # packed weights
            drawn[shape, kind] = mx.random.bits(shape, key=key)
        else:  # small, as an exponent of 8 bits has to be
            drawn[shape, kind] = mx.full(shape, 118 if kind == mx.uint8 else 0, kind)
    return drawn[shape, kind]


def stand_in_batch(batch: Any, module: nn.Module) -> Any:
    """`batch`, with an array drawn at random for each one whose values cannot be read; integers are rows of a table."""
    tables = [m.weight.shape[0] for m in module.modules() if hasattr(m, "as_linear") and "weight" in m]
    return _concrete(batch, min(tables, default=2))


def _concrete(batch: Any, rows: int) -> Any:
    if isinstance(batch, mx.array) and not is_concrete(batch):
        key = mx.random.key(len(batch.shape))
        if mx.issubdtype(batch.dtype, mx.floating):
            return mx.random.normal(batch.shape, key=key).astype(batch.dtype)
        return mx.random.randint(0, rows, batch.shape, key=key).astype(batch.dtype)
    if isinstance(batch, dict):
        return {name: _concrete(x, rows) for name, x in batch.items()}
    return type(batch)(_concrete(x, rows) for x in batch) if type(batch) in (list, tuple) else batch


def disagreement(ours: Mapping[str, mx.array], theirs: Mapping[str, mx.array]) -> str | None:
    """The name of the first gradient that differs between the two, or is not finite; None where they agree."""
    norms = {name: (_norm(x), _norm(ours[name] - x)) for name, x in theirs.items()}
    floor = _FLOOR * math.hypot(*(norm for norm, _ in norms.values()))
    for name, (norm, difference) in norms.items():
        if not difference <= _TOLERANCE * norm + floor:
            return name
    return None


def _norm(x: mx.array) -> float:
    return float(mx.sqrt(mx.sum(mx.square(x.astype(mx.float32)))))
