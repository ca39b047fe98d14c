"""From a batch of pairs to length-normalised log-probabilities: one forward of chosen and rejected together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gapo
from gapo.backends.base import by_pairs
from gapo.data.collate import PARTS, REFERENCE
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logps import response_lengths
from gapo.objectives import LogProbs

KEYS = tuple(f"{side}_{part}" for side in ("chosen", "rejected") for part in PARTS)
TRL_KEYS = ("input_ids", "attention_mask", "completion_mask")


def stack_pairs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The chosen rows, then the rejected ones: "input_ids", "attention_mask", "labels", each (2N, seq).

    Takes the batch of `PreferenceCollator`, or that of TRL's DPO collator ("completion_mask", already stacked).

    Raises:
        KeyError: the batch is neither; names what it holds.
        ValueError: chosen and rejected are of unequal number or length.
    """
    if all(key in batch for key in KEYS):
        for part in PARTS:
            shapes = [tuple(batch[f"{side}_{part}"].shape) for side in ("chosen", "rejected")]
            if shapes[0][0] != shapes[1][0]:
                raise ValueError(f"chosen and rejected must hold the same number of rows; {part} are {shapes}")
        seq = max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
        return {
            part: torch.cat([_widen(batch[f"{side}_{part}"], seq, value) for side in ("chosen", "rejected")])
            for part, value in fill.items()
        }
    if all(key in batch for key in TRL_KEYS):
        counted = batch["completion_mask"].bool() & batch["attention_mask"].bool()
        labels = batch["input_ids"].masked_fill(~counted, IGNORE_INDEX)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    raise KeyError(
        f"a batch of pairs needs the keys {', '.join(KEYS)} (from gapo.adapters.hf.PreferenceCollator) or "
        f"{', '.join(TRL_KEYS)} (from TRL's collator); got {', '.join(batch)}"
    )


@by_pairs
def pair_logps(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, of a causal language model on a batch of pairs.

    Padding may stand on either side.
    """
    logps = gapo.sequence_logps(*row_logits(model, stack_pairs(batch)), backend="torch")
    half = len(logps) // 2
    return logps[:half], logps[half:]


def row_logits(model: nn.Module, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, labels) of the rows of `stack_pairs`, (rows, seq, vocab) and (rows, seq), from the first to the last
    labelled position where the model can leave the others out. Position t of the logits predicts label t + 1.
    """
    labels = rows["labels"]
    first, last = _labelled_columns(model, rows)
    accepted = forward_parameters(model)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "position_ids" in accepted:  # with padding on the left, positions are not the columns
        options["position_ids"] = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted and first <= last:
        columns = torch.arange(first - 1, last + 1, device=labels.device)
        options["logits_to_keep"], labels = columns, labels[:, columns]
    outputs = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], **options)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            f"the model's forward returns no logits ({type(outputs).__name__}); GAPO needs a causal language model "
            "whose forward returns them: switch a fused linear cross-entropy (Liger's) off, which leaves them out"
        )
    return logits, labels


def log_probs(model: nn.Module, batch: Mapping[str, Any]) -> LogProbs:
    """The same for any objective of `gapo.objectives`: sums and lengths, and the batch's reference log-probabilities.

    These are "ref_chosen_logps" and "ref_rejected_logps", each (N,), summed, nats, as TRL names them; None without.
    """
    lengths = response_lengths(stack_pairs(batch)["labels"])
    ref_chosen, ref_rejected = (batch.get(name) for name in REFERENCE)
    chosen, rejected = pair_logps(model, batch)
    return LogProbs.from_averages(chosen, rejected, lengths, ref_chosen, ref_rejected)


def forward_parameters(model: Any) -> set[str]:
    """Names that the forward of the innermost model accepts."""
    return set(inspect.signature(_innermost(model).forward).parameters)


def _innermost(model: Any) -> Any:
    """The model inside DDP, torch.compile and PEFT."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _labelled_columns(model: Any, rows: Mapping[str, Tensor]) -> tuple[int, int]:
    """First and last column that holds a label in any row, column 0 aside, which nothing predicts; none: first > last.

    Raises ValueError for a token that the model does not know: on a GPU its embedding would end the process. Both are
    read from the device at once, since each reading waits for the work before it.
    """
    ids, labels = rows["input_ids"], rows["labels"]
    labelled = (labels != IGNORE_INDEX).any(0)
    labelled[0] = False
    columns = torch.arange(len(labelled), device=labels.device)
    span = [torch.where(labelled, columns, len(labelled)).min(), torch.where(labelled, columns, -1).max()]
    size = _vocabulary(model)
    outside = torch.zeros_like(labels, dtype=torch.bool) if size is None else (ids < 0) | (ids >= size)
    first, last, wrong = torch.stack([*span, outside.any()]).tolist()
    if wrong and size is not None:
        raise ValueError(
            f"row {int(outside.nonzero()[0, 0])} of input_ids (chosen rows stand first) holds a token id outside "
            f"0..{size - 1}: the tokenizer and the model's vocabulary differ. Use the model's own tokenizer, or "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    return first, last


def _vocabulary(model: Any) -> int | None:
    """Tokens that the model's embedding knows; None if it does not say."""
    inner = _innermost(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def _widen(x: Tensor, seq: int, value: int) -> Tensor:
    """`x` padded on the right to `seq` columns."""
    return x if x.shape[1] == seq else nn.functional.pad(x, (0, seq - x.shape[1]), value=value)
