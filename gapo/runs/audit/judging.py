"""One policy of an audit: trained on all folds but one, and asked about that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gapo
from gapo.config import GAPOConfig
from gapo.data.streams import stream
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.folds import divided, prompt_groups
from gapo.runs.audit.training_anchor import training_anchor
from gapo.runs.models.tiny import answer_texts, tiny_model
from gapo.runs.output.tensors import Arrays
from gapo.runs.policy.fit import bucketed, fit
from gapo.runs.policy.policy import Policy
from gapo.runs.policy.rows import length, pair_logps

Row = dict[str, Any]

# What suits the models: (learning rate of a tiny policy, of the last layers of a pretrained one), and DPO's beta.
_RATES = (2e-3, 3e-4)
_SETTINGS: dict[str, dict[str, Any]] = {"dpo": {"beta": 0.1}}
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
        start: (n, 2) log-probabilities of chosen and rejected answers before any training, nats per token.

    Raises:
        ConfigError: the model cannot be used, or the pairs have too few prompts.
    """

    def __init__(self, config: AuditConfig, rows: Sequence[Row]) -> None:
        self._config, self._is_tiny = config, config.model == "tiny"
        layers = config.train_layers
        folder: str | Path = config.model
        if self._is_tiny:
            folder = tiny_model(config, answer_texts(rows))
        elif layers is None:
            layers = _LAST_LAYERS
        self._policy = Policy(folder, cache=config.cache_dir, train_layers=layers)
        self._tokens = self._policy.tokenized(rows, config.max_length)
        self.start = self._policy.prepare({"pairs": self._tokens})["pairs"]
        self._lengths = np.array([length(row) for row in self._tokens])
        self._groups = prompt_groups(rows)

    @property
    def weights(self) -> str:
        """A digest of the model that every policy starts from."""
        return self._policy.weights

    def measure(self, member: Member) -> Arrays:
        """Train a policy, and ask it about its fold.

        Returns:
            "rows" (m,): places of the judged pairs. "logps" (m, 2): of chosen and rejected answers, nats per token, and
            "anchor_logps" the same at the anchor of training pairs.

        Raises:
            FloatingPointError: log-probabilities are not finite.
        """
        config, policy = self._config, self._policy
        folds = divided(self._groups, config.folds, stream(config.seed, "audit folds", member.seed))
        trained, judged = np.flatnonzero(folds != member.fold), np.flatnonzero(folds == member.fold)
        rng = stream(config.seed, "audit order", member.seed, member.fold)
        lengths = self._lengths[trained]
        order = [trained[b] for _ in range(config.epochs) for b in bucketed(lengths, config.batch_size, rng)]
        settings = config.objective_settings or _SETTINGS.get(config.objective, {})
        step = gapo.value_and_grad(
            pair_logps, GAPOConfig(rho=config.rho), config.objective, backend="torch", objective_settings=settings
        )
        rate = config.learning_rate or _RATES[0 if self._is_tiny else 1]
        fit(policy, self._tokens, order, step, learning_rate=rate, warmup_ratio=config.warmup_ratio)
        tokens = [self._tokens[i] for i in judged]
        drawn = rng.permutation(trained)[:_ANCHOR_PAIRS]
        logps = policy.logps(tokens)
        with training_anchor(policy, [self._tokens[i] for i in drawn], GAPOConfig(rho=config.rho)):
            anchor_logps = policy.logps(tokens)
        if not (np.isfinite(logps).all() and np.isfinite(anchor_logps).all()):
            raise FloatingPointError(
                f"log-probabilities of the policy {member.name} are not finite: lower learning_rate ({rate}) or rho"
            )
        return {"rows": judged, "logps": logps, "anchor_logps": anchor_logps}
