"""What every run of a study starts from: the warmed-up policy, tokenised pairs, and the policy's own log-probs.

The study has a batch and a forward of its own, beside those of `gapo.adapters.hf`: pairs are padded on the right, and
the model computes under the causal mask alone. A study is a thousand runs of seconds, which this makes shorter, and its
published numbers depend on it bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gapo
from gapo.backends.base import by_pairs
from gapo.data import collate_pairs, tokenize_pair
from gapo.data.flip import true_labels
from gapo.data.streams import stream
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logps import response_lengths
from gapo.pairs import REFERENCE, SIDES, halves, stacked
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import hold_out_prompts, in_both, read_both, report_in_both
from gapo.runs.models.pretrained import load_model
from gapo.runs.models.tiny import answer_texts, tiny_model
from gapo.runs.output.tensors import kept_arrays
from gapo.study.study_config import StudyConfig

Row = dict[str, Any]
Batch = dict[str, Any]
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Split:
    """The pairs of a study by use: to train on (`pool`), to choose settings on, to test on. Labels as given: true."""

    pool: list[Row]
    validation: list[Row]
    test: list[Row]
    summary: str


def load_split(config: StudyConfig) -> Split:
    """Read the pairs and hold out validation pairs by prompt, so that none of their prompts is trained on."""
    pairs, tested = read_both(config, generated=config.test_pairs, most=config.test_pairs)
    rows, validation = hold_out_prompts(pairs.rows, config.validation_pairs, stream(config.seed, "study validation"))
    if tested is not None:
        test, source = tested.rows[: config.test_pairs], Path(tested.source).name
    else:
        rows, test = hold_out_prompts(rows, config.test_pairs, stream(config.seed, "study test"))
        test, source = test[: config.test_pairs], "held out by prompt from the same file"
    if len(rows) < config.train_pairs:
        raise ConfigError(f"train_pairs={config.train_pairs}, but only {len(rows)} pairs are left to train on")
    lines = [
        pairs.summary(),
        f"{len(rows)} pairs to draw training pairs from, {len(validation)} validation pairs (held out by prompt), "
        f"{len(test)} test pairs ({source})",
        *_warnings(rows, validation, test),
    ]
    pool, validation, test = (list(true_labels(part)) for part in (rows, validation, test))
    return Split(pool, validation, test, "\n".join(lines))


def _warnings(rows: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Lines on labels that are flipped in their file, and on test pairs that are trained or tuned on."""
    every = [*rows, *validation, *test]
    lines = []
    if came_flipped := sum(bool(row.get("is_flipped")) for row in every):
        lines.append(
            f"{came_flipped} of the {len(every)} pairs came flipped (is_flipped); the study takes all by their true "
            "labels, and flips its own"
        )
    if shared := in_both(test, [*rows, *validation]):
        lines.append(report_in_both(shared, len(test), "test"))
    return lines


class Material:
    """The policy and the pairs, made once and read in every worker.

    Attributes:
        model: the policy; `reset` brings its first weights back.
        tokens: tokenised pairs of "pool", "validation" and "test", with the log-probabilities of their answers under
            the policy at the start: the columns `gapo.pairs.REFERENCE`, summed, nats.
        start: for each of them (n, 2), the same per token.
        folder: of the policy.
        fingerprint: of policy and pairs.
    """

    def __init__(self, config: StudyConfig, split: Split) -> None:
        self.split = split
        self.folder = tiny_model(config, answer_texts(split.pool))
        model, tokenizer = load_model(str(self.folder), dtype="float32")
        self.model: Any = model.eval()
        self.pad: int = tokenizer.pad_token_id
        self._first = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        parts = {"pool": split.pool, "validation": split.validation, "test": split.test}
        self.tokens = {
            name: [tokenize_pair(row, tokenizer, max_length=config.max_length) for row in rows]
            for name, rows in parts.items()
        }
        tokens = hashlib.sha256(json.dumps(self.tokens, sort_keys=True).encode()).hexdigest()[:16]
        self.fingerprint = f"{self.folder.name}-{tokens}"
        reference = self._references(self.folder / f"reference-{tokens}.safetensors", tokens)
        self.start = {name: columns[:, :2] / columns[:, 2:] for name, columns in reference.items()}
        for name, rows in self.tokens.items():
            for row, sums in zip(rows, reference[name][:, :2].tolist(), strict=True):
                row.update(zip(REFERENCE, sums, strict=True))

    def reset(self) -> None:
        """The policy's weights as they were, bit for bit."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self._first[name])
                p.grad = None

    def batches(self, tokens: Sequence[Row], size: int, order: Sequence[np.ndarray] | None = None) -> list[Batch]:
        """Batches of `tokens` as in `_batch`. `order` has the pairs of each; without it all pairs, short to long."""
        if order is None:
            by_length = np.argsort([length(row) for row in tokens], kind="stable")
            order = [by_length[i : i + size] for i in range(0, len(tokens), size)]
        return [_batch([tokens[i] for i in index], index, self.pad) for index in order]

    def logps(self, tokens: Sequence[Row]) -> np.ndarray:
        """(n, 2): log-probability of each chosen and each rejected answer under the model now, nats per token."""
        out = np.empty((len(tokens), 2))
        with torch.no_grad():
            for batch in self.batches(tokens, EVALUATION_BATCH):
                out[batch["index"]] = torch.stack(pair_logps(self.model, batch), -1).numpy()
        return out

    def _references(self, path: Path, tokens: str) -> dict[str, np.ndarray]:
        return kept_arrays(
            path,
            tokens,
            lambda: {name: self._with_counts(rows) for name, rows in self.tokens.items()},
            others="the log-probabilities of other pairs: remove it, and they are measured anew",
            remedy="remove it, and they are measured anew",
        )

    def _with_counts(self, tokens: Sequence[Row]) -> np.ndarray:
        """(n, 4): log-probability of each chosen and each rejected answer, summed, and the number of their tokens."""
        counts = np.array([[sum(t != IGNORE_INDEX for t in row[f"{side}_labels"]) for side in SIDES] for row in tokens])
        return np.concatenate([self.logps(tokens) * counts, counts], 1)


def flipped(row: Row) -> Row:
    """The tokenised pair with its answers swapped, and their reference log-probabilities with them."""
    chosen, rejected = SIDES
    columns = [name for name in row if chosen in name]
    swapped = [name.replace(chosen, rejected) for name in columns]
    return {x: row[y] for x, y in zip(columns + swapped, swapped + columns, strict=True)}


def length(row: Row) -> int:
    """Tokens of the longer side."""
    return max(len(row[f"{side}_input_ids"]) for side in SIDES)


def _batch(rows: Sequence[Row], index: np.ndarray, pad: int) -> Batch:
    """N pairs, chosen rows above rejected ones.

    "input_ids" (2N, seq) are padded on the right: under causal attention no answer sees its padding, so that no
    attention mask is needed. "columns" (kept,) are the positions whose logits are needed, and "labels" (2N, kept) the
    labels there. "index" (N,) are the pairs. Besides, lengths and `REFERENCE`, each (N,), are as `gapo.pairs` names
    them.
    """
    padded = {name: torch.from_numpy(x) for name, x in collate_pairs(rows, pad_token_id=pad).items()}
    ids, labels = stacked(padded, "input_ids", "labels")
    used = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()
    columns = torch.arange(int(used[0]), int(used[-1]) + 2)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), halves(response_lengths(labels)), strict=True))
    reference = {name: padded[name] for name in REFERENCE if name in padded}
    return {
        "input_ids": ids,
        "labels": labels[:, columns],
        "columns": columns,
        "index": np.asarray(index),
        **lengths,
        **reference,
    }


@by_pairs
def pair_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_logps, rejected_logps), each (N,), nats per token."""
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=batch["columns"]).logits
    return halves(gapo.sequence_logps(logits, batch["labels"], backend="torch"))
