"""Whether a model sees the answer that it should predict, asked of the model itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapo.adapters.hf.models.architecture import forward_parameters, has_virtual_tokens, innermost, placeholders
from gapo.backends.torch.random_state import RandomState
from gapo.data.tokenize import IGNORE_INDEX

logger = logging.getLogger(__name__)

_HALF = 4  # tokens that stay, and tokens after them that change
# Where the change of the logits before the changed tokens, over that of the logits behind them, is no rounding. A
# causal model's is 0, or near 1e-8 for experts, which group tokens in another way; that of models like BERT is 6e-4 to
# 9e-3 with fresh weights of width 16 to 32, and 0.02 to 0.1 with width 256.
_SEES, _SEES_IN_16_BITS = 1e-5, 1e-2


def require_decoder(model: nn.Module) -> None:
    """Raise ValueError for an encoder-decoder, whose decoder reads another row than its encoder."""
    inner = innermost(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inner).__name__} is an encoder-decoder: GAPO needs a causal (decoder-only) language model, which "
            "AutoModelForCausalLM loads"
        )


def require_causal(model: nn.Module, rows: Mapping[str, Tensor], in_16_bits: bool = False) -> None:
    """Raise ValueError where the logits of a token change with the tokens after it.

    Two forwards of one short row each, without gradient, which differ in their last tokens. The row is made of answer
    tokens of `rows` (of `stack_pairs`). Both draw the same random numbers, so that dropout and noise change nothing;
    the streams go on from where they were. `in_16_bits` says that the forward computes so whatever the weights are.
    """
    tokens, further = _answer_tokens(model, rows)
    if not len(tokens):
        return
    others = _others(model, rows, tokens)
    state = RandomState(model)
    try:
        with torch.no_grad():
            first, second = (_logits(model, ids, further, state) for ids in (tokens, others))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("%s could not be asked whether it is causal: %s", type(innermost(model)).__name__, error)
        return
    change = (first - second).abs().flatten(1).amax(1)
    before, behind = change[:_HALF].max(), change[_HALF:].max()
    rounded = any(p.element_size() < 4 for p in model.parameters()) or in_16_bits
    if bool(before > (_SEES_IN_16_BITS if rounded else _SEES) * behind):
        raise ValueError(
            f"{type(innermost(model)).__name__} sees the answer that it should predict: its logits for a token change "
            f"with the tokens after it ({float(before / behind):.1%} of the change behind these). GAPO needs a causal "
            "language model: load a decoder, or set is_decoder=True in the config of one that can be both"
        )


def _answer_tokens(model: Any, rows: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(2 * _HALF,) token ids of answers, repeated where they are fewer, and what the rows hold for each of them."""
    answer = (rows["labels"] != IGNORE_INDEX) & ~torch.isin(rows["input_ids"], _placeholders(model, rows))
    columns = {
        name: x[answer]
        for name, x in rows.items()
        if x.shape == answer.shape and name in forward_parameters(model) and name not in ("labels", "position_ids")
    }
    found = int(answer.sum())
    taken = torch.arange(2 * _HALF if found else 0, device=answer.device) % max(found, 1)
    further = {name: x[taken] for name, x in columns.items() if name not in ("input_ids", "attention_mask")}
    return rows["input_ids"][answer][taken], further


def _others(model: Any, rows: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """`tokens`, the second half replaced, each by another one of the rows' ids."""
    known = torch.unique(rows["input_ids"][rows["attention_mask"] != 0])
    known = known[~torch.isin(known, _placeholders(model, rows))]
    replaced = known[(torch.searchsorted(known, tokens) + 1) % len(known)]
    return torch.cat([tokens[:_HALF], replaced[_HALF:]])


def _placeholders(model: Any, rows: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(placeholders(model), dtype=rows["input_ids"].dtype, device=rows["input_ids"].device)


def _logits(model: nn.Module, ids: Tensor, further: Mapping[str, Tensor], state: RandomState) -> Tensor:
    """(2 * _HALF, vocab) in float32."""
    accepted = forward_parameters(model)
    options: dict[str, Any] = {name: x[None] for name, x in further.items()}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "task_ids" in accepted:
        options["task_ids"] = torch.zeros(1, dtype=torch.long, device=ids.device)
    if "position_ids" in accepted and not has_virtual_tokens(model):
        options["position_ids"] = torch.arange(len(ids), device=ids.device)[None]
    with state.replayed():
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **options).logits
    return logits[0, -len(ids) :].float()
