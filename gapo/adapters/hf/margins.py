"""From a batch of pairs to length-normalised log-probabilities: one forward of chosen and rejected together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapo.adapters.hf.batches import further_inputs, stack_pairs, to_the_right
from gapo.adapters.hf.models import (
    forward_parameters,
    has_virtual_tokens,
    learned_positions,
    most_positions,
    padding_may_stand_left,
    placeholders,
    vocabulary,
)
from gapo.backends.base import by_pairs
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logp_options import LogpOptions, PairLogps
from gapo.logps import response_lengths
from gapo.pairs import REFERENCE, BatchConstants, LogProbs, halves

__all__ = ["constants_of", "log_probs", "pair_logps", "row_logits", "rows_logps", "stack_pairs"]

_PLAIN = LogpOptions()


@by_pairs
def pair_logps(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, of a causal language model on a batch of pairs.

    Padding may stand on either side. Further inputs of the model's forward that the batch holds (images, token types,
    task ids) are passed on: see `stack_pairs`. A reference that was measured with an `ld_alpha` is refused.
    """
    return _PLAIN.logps(*row_logits(model, stack_pairs(_PLAIN.checked(batch), forward_parameters(model))))


def rows_logps(options: LogpOptions = _PLAIN) -> PairLogps:
    """The same as a margin function of the rows of `stack_pairs`, made for this model: a step stacks its batch once."""
    return PairLogps(row_logits, options)


def row_logits(model: nn.Module, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the rows of `stack_pairs`, (rows, seq, vocab) and (rows, seq), from the first to the last
    labelled position where the model can leave the others out. Position t of the logits predicts label t + 1.
    """
    further = further_inputs(rows)
    if further or not padding_may_stand_left(model):
        rows = to_the_right(rows)
        further = further_inputs(rows)
    labels = rows["labels"]
    first, last = _labelled_columns(model, rows)
    accepted = forward_parameters(model)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    # With padding on the left, positions are not the columns. A model that sees counts its own, in three directions;
    # a learned prompt shifts them.
    if "position_ids" in accepted and not further and not has_virtual_tokens(model):
        options["position_ids"] = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted and first <= last:
        if has_virtual_tokens(model):  # they may come first, so that columns are counted from the end
            options["logits_to_keep"], labels = labels.shape[1] - first + 1, labels[:, first - 1 :]
        else:
            columns = torch.arange(first - 1, last + 1, device=labels.device)
            options["logits_to_keep"], labels = columns, labels[:, columns]
    outputs = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], **options, **further)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            f"the model's forward returns no logits ({type(outputs).__name__}); GAPO needs a causal language model "
            "whose forward returns them: switch a fused linear cross-entropy (Liger's) off, which leaves them out"
        )
    if has_virtual_tokens(model):
        logits = logits[:, -labels.shape[1] :]
    return logits, labels.to(logits.device)  # a model over several devices ends on another one than it began on


def log_probs(model: nn.Module, batch: Mapping[str, Any], options: LogpOptions = _PLAIN) -> LogProbs:
    """The log-probabilities of a batch, for any objective; with the reference's where the batch has them."""
    rows = stack_pairs(batch, forward_parameters(model))
    return LogProbs.of_step(rows_logps(options)(model, rows), constants_of(options.checked(batch), rows))


def constants_of(batch: Mapping[str, Any], rows: Mapping[str, Tensor]) -> BatchConstants:
    """Lengths of the responses in the `rows` of a batch, and its reference log-probabilities under TRL's names."""
    chosen_lengths, rejected_lengths = halves(response_lengths(rows["labels"]))
    ref_chosen, ref_rejected = map(batch.get, REFERENCE)
    return BatchConstants(
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )


def _labelled_columns(model: Any, rows: Mapping[str, Tensor]) -> tuple[int, int]:
    """First and last column that holds a label in any row, column 0 aside, which nothing predicts; none: first > last.

    Raises ValueError for a token that the model does not know, where its embedding would end the process on a GPU; for
    one that stands for an image where there is none; and for a row longer than the model. All are read from the device
    at once, since each reading waits for the work before it.
    """
    ids, labels = rows["input_ids"], rows["labels"]
    labelled = (labels != IGNORE_INDEX).any(0)
    labelled[0] = False
    columns = torch.arange(len(labelled), device=labels.device)
    span = [torch.where(labelled, columns, len(labelled)).min(), torch.where(labelled, columns, -1).max()]
    size, special = vocabulary(model), torch.tensor(placeholders(model), device=ids.device, dtype=ids.dtype)
    standing_in = torch.isin(ids, special) if len(special) else torch.zeros_like(ids, dtype=torch.bool)
    outside = torch.zeros_like(standing_in) if size is None else ((ids < 0) | (ids >= size)) & ~standing_in
    longest = rows["attention_mask"].sum(1).max()
    first, last, wrong, unseen, tokens = torch.stack([*span, outside.any(), standing_in.any(), longest]).tolist()
    if wrong and size is not None:
        raise ValueError(
            f"row {int(outside.nonzero()[0, 0])} of input_ids (chosen rows stand first) holds a token id outside "
            f"0..{size - 1}: the tokenizer and the model's vocabulary differ. Use the model's own tokenizer, or "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if unseen and all(x.shape == ids.shape for x in further_inputs(rows).values()):  # numbers of tokens are no image
        raise ValueError(
            f"row {int(standing_in.nonzero()[0, 0])} of input_ids (chosen rows stand first) holds a token that stands "
            "for an image, video or sound, but the batch holds none: use a collator that puts them into the batch, "
            "such as trl.trainer.dpo_trainer.DataCollatorForVisionPreference"
        )
    _require_room(model, tokens, labels.shape[1])
    return first, last


def _require_room(model: Any, tokens: int, columns: int) -> None:
    """Raise ValueError for a row that is longer than the positions that the model learned."""
    limit = most_positions(model)
    needed = tokens if "position_ids" in forward_parameters(model) else columns
    if limit is not None and needed > limit and learned_positions(model):
        raise ValueError(
            f"a row of {needed} tokens is longer than the model, which knows {limit} positions: set max_length={limit} "
            "in PreferenceCollator (GAPOTrainer: in GAPOConfig)"
        )
