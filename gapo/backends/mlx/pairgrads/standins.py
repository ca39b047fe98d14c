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

from gapo.backends.mlx.pairgrads.mlx_state import ModuleState

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
        elif isinstance(value, mx.array) and (_is_parameter(key, value) or not _is_readable(value)):
            if is_dict:
                dict.__setitem__(container, key, _drawn(value, drawn))
            else:
                container[key] = _drawn(value, drawn)


def _is_readable(x: mx.array) -> bool:
    """Whether `x` has values: within `mx.compile`, what it is called with has none."""
    try:
        mx.eval(x)
    except (RuntimeError, ValueError):
        return False
    return True


def _is_parameter(key: Any, value: mx.array) -> bool:
    return mx.issubdtype(value.dtype, mx.floating) and not str(key).startswith("_")


def _drawn(like: mx.array, drawn: dict[Any, mx.array]) -> mx.array:
    """The array for the shape and dtype of `like`: matrices of about norm 1, vectors around 1, as norms have them."""
    dtype, shape = like.dtype, like.shape
    if (shape, dtype) not in drawn:
        key = mx.random.key(len(drawn))
        if not mx.issubdtype(dtype, mx.floating):
            drawn[shape, dtype] = _integers(shape, dtype, key)
        else:
            wide = mx.float64 if dtype == mx.float64 else mx.float32
            matrix = mx.random.normal(shape, key=key) / math.sqrt(shape[-1]) if len(shape) > 1 else None
            x = mx.random.uniform(0.5, 1.5, shape, key=key) if matrix is None else matrix
            drawn[shape, dtype] = x.astype(wide)
    return drawn[shape, dtype]


def _integers(shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> mx.array:
    if dtype == mx.uint32:  # packed weights
        return mx.random.randint(0, 2**31 - 1, shape, key=key).astype(dtype)
    return mx.full(
        shape, 118 if dtype == mx.uint8 else 0, dtype=dtype
    )  # uint8: a scale's exponent, which is to be small


def stand_in_batch(batch: Any, module: nn.Module) -> Any:
    """`batch`, with an array drawn at random for each one whose values cannot be read; integers are rows of a table."""
    tables = [m.weight.shape[0] for m in module.modules() if hasattr(m, "as_linear") and "weight" in m]
    return _concrete(batch, min(tables, default=2))


def _concrete(batch: Any, rows: int) -> Any:
    if isinstance(batch, mx.array) and not _is_readable(batch):
        key = mx.random.key(len(batch.shape))
        if mx.issubdtype(batch.dtype, mx.floating):
            return mx.random.normal(batch.shape, key=key).astype(batch.dtype)
        return mx.random.randint(0, rows, batch.shape, key=key).astype(batch.dtype)
    if isinstance(batch, dict):
        return {name: _concrete(x, rows) for name, x in batch.items()}
    if type(batch) in (list, tuple):
        concrete = [_concrete(x, rows) for x in batch]
        return concrete if type(batch) is list else tuple(concrete)
    return batch


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
