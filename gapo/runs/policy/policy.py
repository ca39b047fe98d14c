"""The policy: first weights, tokenised pairs, batches, and log-probabilities under the weights of the moment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gapo.data import tokenize_pair
from gapo.pairs import REFERENCE, SIDES
from gapo.runs.models.pretrained import extent, load_model, require_fit, require_model
from gapo.runs.output.tensors import kept_arrays
from gapo.runs.policy.frozen import frozen_layers, require_same, train_last
from gapo.runs.policy.pair_batches import Batch, Row, answer_lengths, batch_of, length, pair_logps
from gapo.runs.policy.states import digest_of, kept_states

EVALUATION_BATCH = 64
_COMPARED = 4  # sequences on which a forward from the saved states is compared with a whole one


class Policy:
    """A causal language model that is trained again and again from the same weights.

    Args:
        folder: of the model and its tokenizer, or a Hub name.
        cache: folder where log-probabilities and states are kept.
        train_layers: train only the last so many layers; the states below are computed once. None trains all weights.
        tokenizer: another tokenizer than the model's: a folder or Hub name.

    Attributes:
        model: the policy, on the CPU in float32; `reset` brings its first weights back.
        pad: id on padding.

    Raises:
        ConfigError: the model cannot be loaded, or has no such layers.
    """

    def __init__(
        self, folder: str | Path, *, cache: str | Path, train_layers: int | None = None, tokenizer: str | None = None
    ) -> None:
        self._name, self._cache, self._train_layers = str(folder), Path(cache), train_layers
        require_model(self._name, tokenizer=tokenizer)
        model, self._tokenizer = load_model(self._name, tokenizer=tokenizer, dtype="float32")
        self.model: Any = model.eval()
        if train_layers is not None:
            train_last(self.model, train_layers)
        pad = self._tokenizer.pad_token_id
        self.pad: int = self._tokenizer.eos_token_id if pad is None else pad
        self._first = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def tokenized(self, rows: Sequence[Row], max_length: int) -> list[Row]:
        """Pairs as `gapo.data.tokenize_pair` returns them."""
        return [tokenize_pair(row, self._tokenizer, max_length=max_length) for row in rows]

    def prepare(self, parts: Mapping[str, Sequence[Row]], folder: Path | None = None) -> dict[str, np.ndarray]:
        """Give tokenised pairs what the weights at the start say of them, measured once and kept on disk.

        Each row gets the columns `gapo.pairs.REFERENCE`, summed, nats; with frozen layers "chosen_states" and
        "rejected_states" too.

        Args:
            parts: the pairs by a name.
            folder: where the log-probabilities are kept; None for one in the cache that is named by the weights.

        Returns:
            For each part the (n, 2) log-probabilities per token of chosen and rejected answers.

        Raises:
            ConfigError: the model has too few embeddings or positions for the pairs, or does not compute the same from
                the states of its frozen layers.
        """
        highest, longest = extent([row for rows in parts.values() for row in rows])
        require_fit(self.model.config, self._name, highest=max(highest, self.pad), longest=longest)
        tokens = digest_of({name: [_tokens(row) for row in rows] for name, rows in parts.items()})
        weights = "" if folder is not None and self._train_layers is None else self.weights
        if self._is_frozen:
            self._attach_states(parts, weights)
        folder = folder or self._cache / f"policy-{weights}"
        folder.mkdir(parents=True, exist_ok=True)
        reference = kept_arrays(
            folder / f"reference-{tokens}.safetensors",
            tokens,
            lambda: {name: self._with_counts(rows) for name, rows in parts.items()},
            others="the log-probabilities of other pairs: remove it, and they are measured anew",
            remedy="remove it, and they are measured anew",
        )
        for name, rows in parts.items():
            for row, sums in zip(rows, reference[name][:, :2].tolist(), strict=True):
                row.update(zip(REFERENCE, sums, strict=True))
        return {name: columns[:, :2] / columns[:, 2:] for name, columns in reference.items()}

    def reset(self) -> None:
        """The policy's weights as they were, bit for bit."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self._first:
                    p.copy_(self._first[name])
                p.grad = None

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The first weights for a while, and then those of now, bit for bit."""
        trained = {name: p for name, p in self.model.named_parameters() if name in self._first}
        now = {name: p.detach().clone() for name, p in trained.items()}
        try:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(self._first[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(now[name])

    def pieces(self, text: str, count: int, length: int) -> list[Row]:
        """The last `count` pieces of plain text: "ids" of `length` tokens, and with frozen layers their "states"."""
        ids = self._tokenizer(text[-32 * count * length :])["input_ids"]  # a token has fewer characters than 32
        starts = range(len(ids) % length, len(ids) - length + 1, length)
        pieces: list[Row] = [{"ids": ids[i : i + length]} for i in starts][-count:]
        if self._is_frozen and pieces:
            states = kept_states(self.model, [x["ids"] for x in pieces], self.pad, self._cache, self.weights)
            pieces = [{**piece, "states": x} for piece, x in zip(pieces, states, strict=True)]
        return pieces

    @property
    def _is_frozen(self) -> bool:
        return self._train_layers is not None and bool(frozen_layers(self.model))

    def batches(self, tokens: Sequence[Row], size: int, order: Sequence[np.ndarray] | None = None) -> list[Batch]:
        """Batches of `tokens` as in `batch_of`. `order` has the pairs of each; without it all pairs, short to long."""
        if order is None:
            by_length = np.argsort([length(row) for row in tokens], kind="stable")
            order = [by_length[i : i + size] for i in range(0, len(tokens), size)]
        return [batch_of([tokens[i] for i in index], index, self.pad) for index in order]

    def logps(self, tokens: Sequence[Row]) -> np.ndarray:
        """(n, 2): log-probability of each chosen and each rejected answer under the model now, nats per token."""
        out = np.empty((len(tokens), 2))
        for batch in self.batches(tokens, EVALUATION_BATCH):
            with torch.no_grad():
                out[batch["index"]] = torch.stack(pair_logps(self.model, batch), -1).numpy()
        return out

    def _with_counts(self, tokens: Sequence[Row]) -> np.ndarray:
        """(n, 4): log-probability at the start of each chosen and rejected answer, summed, and the number of tokens."""
        counts = answer_lengths(tokens)
        with self.at_start():
            return np.concatenate([self.logps(tokens) * counts, counts], 1)

    @cached_property
    def weights(self) -> str:
        """A digest of the first weights, and of where the frozen layers end."""
        digest = hashlib.sha256(f"{self._train_layers}".encode())
        with self.at_start():
            for name, x in self.model.state_dict().items():
                digest.update(f"{name} {tuple(x.shape)}".encode() + x.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _attach_states(self, parts: Mapping[str, Sequence[Row]], weights: str) -> None:
        for rows in parts.values():
            ids = [row[f"{side}_input_ids"] for row in rows for side in SIDES]
            states = iter(kept_states(self.model, ids, self.pad, self._cache, weights))
            for row in rows:
                row |= {f"{side}_states": next(states) for side in SIDES}
        self._require_same([row for rows in parts.values() for row in rows])

    def _require_same(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError unless a forward from the saved states is the whole forward, on the longest pairs."""
        for row in sorted(rows, key=length)[-_COMPARED:]:
            require_same(
                self.model,
                torch.from_numpy(np.array(row["chosen_states"]))[None],
                {"input_ids": torch.tensor([row["chosen_input_ids"]]), "use_cache": False},
                which=f"model {self._name!r} with train_layers={self._train_layers}",
                advice="its layers share more than their states, or the states on disk are damaged; leave train_layers "
                f"out, or remove the states in {self._cache}",
            )


def _tokens(row: Row) -> Row:
    """What a measurement depends on, and none of the columns that `Policy.prepare` adds."""
    return {f"{side}_{part}": row[f"{side}_{part}"] for side in SIDES for part in ("input_ids", "labels")}
