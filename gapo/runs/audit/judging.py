"""One policy of an audit: trained on all folds but one, and asked about that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import gapo
from gapo.config import GAPOConfig
from gapo.data.streams import stream
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.folds import divided, prompt_groups
from gapo.runs.audit.training_anchor import training_anchor
from gapo.runs.config_bases import TrainingConfig
from gapo.runs.models.tiny import answer_texts, tiny_model
from gapo.runs.output.tensors import Arrays
from gapo.runs.policy.fit import bucketed, fit
from gapo.runs.policy.pair_batches import answer_lengths, length, pair_logps
from gapo.runs.policy.policy import Policy

Row = dict[str, Any]

_RATES = (1e-3, 3e-4)  # learning rates of a tiny policy, and of the last layers of a pretrained one
_LAST_LAYERS = 2
_ANCHOR_PAIRS = 256  # training pairs, drawn, that form an anchor


@dataclass(frozen=True, order=True)
class Member:
    """A policy by the number of its division of the pairs, and by the fold that it judges."""

    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-fold-{self.fold}"


class Judges:
    """The policies of an audit, one after the other in the same model.

    Args:
        config: of the audit.
        rows: the pairs.

    Attributes:
        policy: its model is the policy of the moment.
        start: (n, 2) log-probabilities of chosen and rejected answers before any training, nats per token.
        counts: (n, 2) the numbers of their tokens.

    Raises:
        ConfigError: the model cannot be used, or the pairs have too few prompts.
    """

    def __init__(self, config: AuditConfig, rows: Sequence[Row]) -> None:
        self._config, self._is_tiny = config, config.model == "tiny"
        layers = config.train_layers
        folder: str | Path = config.model
        if self._is_tiny:
            # It reads the fields that both configurations inherit from `TinyPolicy`, max_length and seed.
            folder = tiny_model(cast(TrainingConfig, config), answer_texts(rows))
        elif layers is None:
            layers = _LAST_LAYERS
        self.policy = Policy(folder, cache=config.cache_dir, train_layers=layers, tokenizer=config.tokenizer)
        self._tokens = self.policy.tokenized(rows, config.max_length)
        self.start = self.policy.prepare({"pairs": self._tokens})["pairs"]
        self.counts = answer_lengths(self._tokens)
        self._lengths = np.array([length(row) for row in self._tokens])
        self._groups = prompt_groups(rows)

    def measure(self, member: Member, watched: bool = False) -> Arrays:
        """Train a policy, and ask it about its fold at the end of each epoch.

        Args:
            member: which policy.
            watched: whether it is asked about the pairs that it trains on, too.

        Returns:
            "rows" (m,): places of the judged pairs. "logps" (epochs, m, 2): of chosen and rejected answers, nats per
            token; "anchor_logps" (m, 2): the same at the anchor of training pairs, after the last epoch. Where it is
            watched, "trained" (t,) and "trained_logps" (epochs, t, 2) of the pairs that it trained on.

        Raises:
            FloatingPointError: log-probabilities are not finite.
        """
        config, policy = self._config, self.policy
        folds = divided(self._groups, config.folds, stream(config.seed, "audit folds", member.seed))
        trained, judged = np.flatnonzero(folds != member.fold), np.flatnonzero(folds == member.fold)
        asked = {"logps": judged} | ({"trained_logps": trained} if watched else {})
        rng = stream(config.seed, "audit order", member.seed, member.fold)
        epochs = [bucketed(self._lengths[trained], config.batch_size, rng) for _ in range(config.epochs)]
        ends = np.cumsum([len(batches) for batches in epochs]).tolist()
        answers: dict[str, list[np.ndarray]] = {name: [] for name in asked}

        def ask(step: int) -> None:
            if step in ends:
                for name, rows in asked.items():
                    answers[name].append(policy.logps(self._of(rows)))

        order = [trained[batch] for batches in epochs for batch in batches]
        fit(
            policy, self._tokens, order, self._step(), learning_rate=self._rate, warmup_ratio=config.warmup_ratio,
            after_step=ask,
        )  # fmt: skip
        with training_anchor(policy, self._of(rng.permutation(trained)[:_ANCHOR_PAIRS]), GAPOConfig(rho=config.rho)):
            moved = policy.logps(self._of(judged))
        arrays = {name: np.stack(values) for name, values in answers.items()} | {"anchor_logps": moved}
        if not all(np.isfinite(x).all() for x in arrays.values()):
            raise FloatingPointError(
                f"log-probabilities of the policy {member.name} are not finite: lower rho, or the learning_rate "
                f"({self._rate})"
            )
        return {"rows": judged, **arrays, **({"trained": trained} if watched else {})}

    @property
    def _rate(self) -> float:
        return self._config.learning_rate or _RATES[not self._is_tiny]

    def _step(self) -> Any:
        step, own = self._config.step_settings()
        return gapo.value_and_grad(pair_logps, step, self._config.objective, backend="torch", objective_settings=own)

    def _of(self, rows: np.ndarray) -> list[Row]:
        return [self._tokens[i] for i in rows]
