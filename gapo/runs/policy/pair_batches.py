"""Tokenised pairs of a policy, their batches, and the log-probabilities of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

import gapo
from gapo.backends.base import by_pairs
from gapo.data import collate_pairs
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logps import response_lengths
from gapo.pairs import REFERENCE, SIDES, halves, stacked
from gapo.runs.policy.frozen import resumed

Row = dict[str, Any]
Batch = dict[str, Any]

_go_on: WeakSet[nn.Module] = WeakSet()  # models that go on behind their head, as those with capped logits do


def length(row: Row) -> int:
    """Tokens of the longer side."""
    return max(len(row[f"{side}_input_ids"]) for side in SIDES)


def answer_lengths(rows: Sequence[Row]) -> np.ndarray:
    """(n, 2): the numbers of tokens of each chosen and each rejected answer."""
    return np.array([[sum(t != IGNORE_INDEX for t in row[f"{side}_labels"]) for side in SIDES] for row in rows])


def batch_of(rows: Sequence[Row], index: np.ndarray, pad: int) -> Batch:
    """N pairs, chosen rows above rejected ones.

    "input_ids" (2N, seq) are padded on the right: under causal attention no answer sees its padding, so that no
    attention mask is needed. "columns" (kept,) are the positions whose logits are needed, and "labels" (2N, kept) the
    labels there. "index" (N,) are the pairs. Besides, lengths and `REFERENCE`, each (N,), are as `gapo.pairs` names
    them. "states" (2N, seq, width) are those that enter the trained layers, where the rows have them.
    """
    padded = {name: torch.from_numpy(x) for name, x in collate_pairs(rows, pad_token_id=pad).items()}
    ids, labels = stacked(padded, "input_ids", "labels")
    used = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()
    columns = torch.arange(int(used[0]), int(used[-1]) + 2)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), halves(response_lengths(labels)), strict=True))
    reference = {name: padded[name] for name in REFERENCE if name in padded}
    batch = {
        "input_ids": ids,
        "labels": labels[:, columns],
        "columns": columns,
        "index": np.asarray(index),
        **lengths,
        **reference,
    }
    if "chosen_states" in rows[0]:
        states = [row[f"{side}_states"] for side in SIDES for row in rows]
        batch["states"] = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(x)) for x in states], True)
    return batch


@by_pairs
def pair_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_logps, rejected_logps), each (N,), nats per token."""
    with resumed(model, batch.get("states")):
        if (logps := _logps_of_frozen_head(model, batch)) is not None:
            return halves(logps)
        return halves(gapo.sequence_logps(_logits(model, batch), batch["labels"], backend="torch"))


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=batch["columns"]).logits
    return logits


class _Rows(torch.autograd.Function):
    """Its argument. It tells the one-pass step, which asks whose rows are whose, that here each answer has its own."""

    rows_first = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _logps_of_frozen_head(model: nn.Module, batch: Batch) -> Tensor | None:
    """(2N,), with the output head run on the tokens of the answers alone; None where that is not possible.

    With a large vocabulary the head is most of the work. Here it has none with prompts and padding. It returns each
    token's log-probability in the place of its logits, so that what the model returns still has a row for each answer.
    """
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or model in _go_on or any(p.requires_grad for p in head.parameters()):
        return None
    labels = batch["labels"][:, 1:]
    is_counted = labels != IGNORE_INDEX
    is_predicting = nn.functional.pad(is_counted, (0, 1))
    returned: list[Tensor] = []

    def answers(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][is_predicting],)

    def token_logps(_: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(logits.float(), labels[is_counted], reduction="none")
        returned.append(_Rows.apply(losses.new_zeros(labels.shape).masked_scatter(is_counted, -losses)))
        return returned[0]

    handles = [head.register_forward_pre_hook(answers), head.register_forward_hook(token_logps)]
    try:
        output = _logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if output is not returned[0]:
        _go_on.add(model)
        return None
    return output.sum(1) / is_counted.sum(1)
