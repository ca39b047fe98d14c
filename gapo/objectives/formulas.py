"""From a formula to an `Objective` and to the public function of plain arrays: checks, namespace, reduction, docstring.

A formula takes a `LogProbs`. Users of DPO know the same loss as a function of four arrays, which is made here. So the
formula stands once, and its file holds mathematics alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from gapo._namespace import Array, namespace
from gapo.objective import REDUCTIONS, check_batches, check_objective, reduce, require_choice
from gapo.objectives.registry import OBJECTIVES, Objective, check_settings, parameters_of
from gapo.pairs import LogProbs


def objective(**about: Any) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a formula as an `Objective`, and return the public function of plain arrays.

    The formula takes a `LogProbs` and keyword-only settings, and returns (N,) losses. The public function takes arrays
    in DPO's order: the policy's two, then the reference's or the anchor's.

    Args:
        about: fields of `Objective`; `lengths`, the sides whose number of tokens the function of arrays takes too.
    """
    lengths = tuple(f"{side}_lengths" for side in about.pop("lengths", ()))

    def register(formula: Callable[..., Array]) -> Callable[..., Array]:
        entry = Objective(name=formula.__name__, function=formula, **about)
        OBJECTIVES[entry.name] = entry
        return _of_arrays(entry, lengths)

    return register


def _of_arrays(entry: Objective, lengths: tuple[str, ...]) -> Callable[..., Array]:
    """The public function of an objective: checks, namespace and reduction around its formula."""
    prefixes = ["", *(["ref_"] if entry.needs_reference else []), *(["anchor_"] if entry.needs_anchor else [])]
    sides = [prefix + side for prefix in prefixes for side in ("chosen", "rejected")]
    names = [f"{side}_logps" for side in sides] + list(lengths)

    @functools.wraps(entry.function)
    def function(*args: Any, reduction: str = "mean", backend: str | None = None, **options: Any) -> Array:
        arrays = _bound(entry, names, args, options)
        settings = {**entry.defaults, **options}
        check_settings(**settings)
        require_choice("reduction", reduction, REDUCTIONS)
        counts = {name: arrays.pop(name) for name in lengths}
        xp = namespace(backend, **arrays, **counts)
        check_batches(arrays | {name: xp.astype(x, arrays[names[0]].dtype) for name, x in counts.items()}, xp)
        if "gamma" in settings:
            check_objective(settings["beta"], settings["gamma"], "sigmoid", 0.0, n=arrays[names[0]].shape[0])
        by_side = dict(zip(sides, arrays.values(), strict=True))
        sums, averages = ({}, by_side) if entry.average else (by_side, {})
        by_length = {name.removesuffix("_lengths"): x for name, x in counts.items()}
        logps = LogProbs.of_arrays(sums, averages, by_length)
        return reduce(entry.losses(logps, **settings), reduction, xp)

    P = inspect.Parameter
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [P(name, P.POSITIONAL_OR_KEYWORD, annotation="Array") for name in names]
        + [p for p in parameters_of(entry.function) if p.kind is p.KEYWORD_ONLY]
        + [P("reduction", P.KEYWORD_ONLY, default="mean", annotation="str")]
        + [P("backend", P.KEYWORD_ONLY, default=None, annotation="str | None")],
        return_annotation="Array",
    )
    function.__annotations__ = {p.name: p.annotation for p in function.__signature__.parameters.values()}  # type: ignore[attr-defined]
    function.__doc__ = _documented(entry, names)
    return function


def _bound(entry: Objective, names: list[str], args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name; they leave `options`, in which settings stay. Raises TypeError as Python does."""
    if len(args) > len(names):
        raise TypeError(f"{entry.name}() takes {len(names)} positional arguments but {len(args)} were given")
    arrays = dict(zip(names, args, strict=False))
    for name in names[len(args) :]:
        if name not in options:
            raise TypeError(f"{entry.name}() is missing the argument {name!r}")
        arrays[name] = options.pop(name)
    if unknown := [name for name in options if name not in entry.defaults]:
        raise TypeError(f"{entry.name}() got an unexpected keyword argument {unknown[0]!r}")
    return arrays


_MEANING = {
    "chosen_logps": "(N,) {kind} log-probability of each chosen response under the policy, {unit}.",
    "rejected_logps": "(N,) the same of each rejected response.",
    "ref_chosen_logps": "(N,) the same of each chosen response under the reference. Carries no gradient, ever.",
    "ref_rejected_logps": "(N,) the same of each rejected response under the reference.",
    "anchor_chosen_logps": "(N,) the same of each chosen response under the anchor. Carries no gradient, ever.",
    "anchor_rejected_logps": "(N,) the same of each rejected response under the anchor.",
    "chosen_lengths": "(N,) number of tokens of each chosen response, >= 1, integers or floats.",
    "rejected_lengths": "(N,) the same of each rejected response.",
}


def _documented(entry: Objective, names: list[str]) -> str:
    """The formula's docstring with the arguments that all functions share around those of its settings."""
    kind, unit = ("length-normalised", "nats per token") if entry.average else ("summed", "nats")
    arrays = [f"    {name}: {_MEANING[name].format(kind=kind, unit=unit)}" for name in names]
    shared = [
        '    reduction: "mean", "sum" or "none".',
        '    backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.',
        "",
        "Returns:",
        '    Scalar, or (N,) for reduction="none"; float32 or wider, differentiable in the first two arguments.',
        "",
        "Raises:",
        "    TypeError: an argument is not an array, not floating point, or not of the library of the others.",
        "    ValueError: shapes differ or are not (N,) with N >= 1, or a setting is out of its range.",
    ]
    before, _, source = inspect.cleandoc(entry.function.__doc__ or "").partition("Source:")
    head, _, settings = before.rstrip("\n").partition("Args:\n")
    own = [settings] if settings else []
    return "\n".join([f"{head.rstrip()}\n\nArgs:", *arrays, *own, *shared, "", f"Source:{source}"])
