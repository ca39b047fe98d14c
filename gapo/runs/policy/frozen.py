"""The layers of a model below the trained ones: run once for each sequence, and passed over from then on.

    once        embed ─ layer 0 ─ … ─ layer 27 ─┬─ layer 28 ─ layer 29 ─ head
                                    states saved │
    every step  (layers return what they get,   └─ layer 28 ─ layer 29 ─ head     only these are trained
                 the last of them the states)

That is right only where nothing but these states leads from the frozen layers to those above. `require_same` compares
the two ways before anything is trained, and refuses a model for which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gapo.runs.errors import ConfigError

# How far logits may be apart, in norm: those of 32 bits and of 16. Rounding alone makes 7e-7 and 0.014 (SmolLM2-135M).
_TOLERANCES = (1e-3, 0.05)


def last_layers(model: nn.Module, count: int) -> range:
    """The numbers of the last `count` layers of `model`.

    Raises:
        ConfigError: it has no list of layers, or fewer than `count`.
    """
    layers = len(_layers(model))
    if not 1 <= count <= layers:
        raise ConfigError(f"train_layers must be in 1 to {layers}, the layers that the model has; got {count!r}")
    return range(layers - count, layers)


def train_last(model: nn.Module, count: int) -> None:
    """Freeze `model` but for its last `count` layers. Its embeddings, output head and final norm are frozen too.

    Raises:
        ConfigError: as `last_layers`.
    """
    numbers = last_layers(model, count)
    model.requires_grad_(False)
    for number in numbers:
        _layers(model)[number].requires_grad_(True)


def frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model`, from the first, that have no trainable parameter."""
    below: list[nn.Module] = []
    for layer in _layers(model):
        if any(p.requires_grad for p in layer.parameters()):
            break
        below.append(layer)
    return below


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    """The list of layers with most parameters. Raises ConfigError where there is none."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigError(
            f"train_layers needs a model whose layers stand in an nn.ModuleList; {type(model).__name__} has none: "
            "leave train_layers out"
        )
    return max(lists, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()))


def states_of(model: nn.Module, ids: Sequence[Sequence[int]], pad: int) -> list[np.ndarray]:
    """What the frozen layers return for each sequence of token ids: (tokens, width), in the model's dtype as float32.

    Raises:
        ConfigError: a layer returns something else than its states.
    """
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ids], batch_first=True, padding_value=pad)
    saved: list[Any] = []
    handle = frozen_layers(model)[-1].register_forward_hook(lambda *call: saved.append(call[2]))
    try:
        with torch.no_grad():
            model(input_ids=padded, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    if len(saved) != 1 or not isinstance(saved[0], Tensor) or saved[0].shape[:2] != padded.shape:
        raise ConfigError(
            f"train_layers needs a model whose layers return their states alone, once in a forward; those of "
            f"{type(model).__name__} do not: leave train_layers out"
        )
    return [states[: len(x)].float().numpy() for states, x in zip(saved[0], ids, strict=True)]


@contextmanager
def resumed(model: nn.Module, states: Tensor | None) -> Iterator[None]:
    """Let a forward of `model` start at `states` (batch, seq, width), above its frozen layers; None runs all of it."""
    if states is None:
        yield
        return
    below = frozen_layers(model)
    own = [layer.__dict__.get("forward") for layer in below]
    try:
        for layer in below:
            layer.forward = _first_argument
        below[-1].forward = _returning(states)
        yield
    finally:
        for layer, forward in zip(below, own, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def require_same(
    model: nn.Module, states: Tensor, inputs: Mapping[str, Any], *, which: str, advice: str, mask: Tensor | None = None
) -> None:
    """Compare the logits of a forward that starts at `states` with those of a whole one.

    Args:
        model: with frozen layers.
        states: (batch, seq, width), which enter the layers above.
        inputs: the keyword arguments of a forward.
        which: names the model in the error.
        advice: what to do, the end of the error.
        mask: (batch, seq) bool, the tokens that count; None for all.

    Raises:
        ConfigError: they differ by more than rounding, or are not finite.
    """
    with torch.no_grad():
        whole = model(**inputs).logits
        with resumed(model, states):
            short = model(**inputs).logits
    if mask is not None:
        if whole.shape[1] != mask.shape[1]:  # the logits of some columns alone
            columns = inputs["logits_to_keep"]
            mask = mask[:, columns] if isinstance(columns, Tensor) else mask[:, -whole.shape[1] :]
        whole, short = whole[mask], short[mask]
    tolerance = _TOLERANCES[_has_16_bits(whole)]
    if not float((short.float() - whole.float()).norm()) <= tolerance * float(whole.float().norm()):
        raise ConfigError(
            f"{which} computes other values from the states below its trained layers than from the start: {advice}"
        )


def _has_16_bits(x: Tensor) -> bool:
    """Whether `x` was computed in 16 bits, also where it has been cast to more since, as under autocast."""
    return any(torch.equal(x, x.to(dtype).to(x.dtype)) for dtype in (torch.bfloat16, torch.float16))


def _first_argument(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _returning(states: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: states
