"""Does a model see the answer that it should predict? The model is asked, since neither class nor config tells it.

The model reads one short row twice. The last tokens of the second row are other ones. A causal model's logits before
the change stay as they were; those of a model like BERT move.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapo.adapters.hf.models.architecture import forward_parameters, innermost, placeholders
from gapo.adapters.hf.models.peft_models import has_virtual_tokens
from gapo.backends.torch.random_state import RandomState
from gapo.data.tokenize import IGNORE_INDEX

logger = logging.getLogger(__name__)

_HALF = 4  # tokens that stay, and tokens after them that change
# The change of the logits before the changed tokens, over that behind them, from which on it is no rounding. Measured:
# causal models 0, or near 1e-8 for experts, which group tokens in another way; models like BERT 6e-4 to 9e-3 with
# fresh weights of width 16 to 32, and 0.02 to 0.1 with width 256.
_SEES, _SEES_IN_16_BITS = 1e-5, 1e-2


def require_causal(model: nn.Module, rows: Mapping[str, Tensor], in_16_bits: bool = False) -> None:
    """Raise ValueError where the logits of a token change with the tokens after it.

    Costs two forwards of one short row, without gradient. Both draw the same random numbers, so that dropout and noise
    change nothing; the caller's random streams are restored. A model that cannot run them is accepted, with a warning.

    Args:
        model: the language model, with or without wrappers.
        rows: of `stack_pairs`; the short row is made of tokens of their answers.
        in_16_bits: whether the forward computes in 16 bits although the weights are wider, as under autocast.
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
    """(2 * _HALF,) token ids of answers, repeated where there are fewer, and the other inputs for these tokens."""
    answer = (rows["labels"] != IGNORE_INDEX) & ~torch.isin(rows["input_ids"], _placeholders(model, rows))
    columns = {
        name: x[answer]
        for name, x in rows.items()
        if x.shape == answer.shape and name in forward_parameters(model) and name not in ("labels", "position_ids")
    }
    count = int(answer.sum())
    places = torch.arange(2 * _HALF if count else 0, device=answer.device) % max(count, 1)
    further = {name: x[places] for name, x in columns.items() if name not in ("input_ids", "attention_mask")}
    return rows["input_ids"][answer][places], further


def _others(model: Any, rows: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """`tokens`, with each one of the second half replaced by another id of the rows."""
    ids = torch.unique(rows["input_ids"][rows["attention_mask"] != 0])
    ids = ids[~torch.isin(ids, _placeholders(model, rows))]
    replaced = ids[(torch.searchsorted(ids, tokens) + 1) % len(ids)]
    return torch.cat([tokens[:_HALF], replaced[_HALF:]])


def _placeholders(model: Any, rows: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(placeholders(model), dtype=rows["input_ids"].dtype, device=rows["input_ids"].device)


def _logits(model: nn.Module, ids: Tensor, further: Mapping[str, Tensor], state: RandomState) -> Tensor:
    """(2 * _HALF, vocab) in float32, of one row without padding."""
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
