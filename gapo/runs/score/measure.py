"""One measurement of `gapo score`: a batch of pairs through the step, as far as its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from gapo.adapters.hf import PreferenceCollator
from gapo.adapters.hf.margins import pair_logps, stack_pairs
from gapo.adapters.hf.models import require_causal
from gapo.backends import get_backend
from gapo.config import GAPOConfig
from gapo.data.streams import stream
from gapo.runs.models.pretrained import extent, require_fit
from gapo.runs.output.tables import Row
from gapo.runs.score.score_config import ScoreConfig
from gapo.runs.score.score_table import MEASURES, digits
from gapo.runs.score.sources import Source, load
from gapo.step import StepResult, run

logger = logging.getLogger(__name__)


class Measure:
    """One loaded model, and its measurement of a batch.

    Args:
        source: the model to load.
        pairs: every pair that is scored.
        config: of the scoring.
        step_config: settings of the step.

    Raises:
        gapo.runs.errors.ConfigError: the model cannot be loaded. When called, FloatingPointError or ValueError:
            the step failed; names the rows of the batch. The weights are as before.
    """

    def __init__(self, source: Source, pairs: Sequence[Row], config: ScoreConfig, step_config: GAPOConfig) -> None:
        self._name, self._pairs, self._seed, self._step_config = source.name, pairs, config.seed, step_config
        self._model, tokenizer = load(source, config)
        self._is_causal = False  # until the first batch has shown it
        self._collate = PreferenceCollator(tokenizer, max_length=config.max_length)
        # No update follows. So one pass is worth its memory only where it saves the anchor's forward.
        first_order = step_config.anchor == "first_order" or (
            step_config.anchor == "auto" and config.dtype.endswith("16")
        )
        self._backend = get_backend("torch", one_pass=first_order)
        self._warned = False
        self._rows = [self._tokenized(i, pair) for i, pair in enumerate(pairs)]
        highest, longest = extent(self._rows)
        require_fit(self._model.config, self._name, highest=max(highest, tokenizer.pad_token_id or 0), longest=longest)

    def __call__(self, batch: tuple[int, int, np.ndarray]) -> Row:
        """The line of the log on a batch of `plan`."""
        repeat, number, rows = batch
        try:
            result = self._run([self._rows[i] for i in rows], (repeat, number))
        except (FloatingPointError, ValueError) as error:
            named = ", ".join(_named(i, self._pairs[i]) for i in rows)
            text = f"{self._name}, repeat {repeat}, batch {number}: {error}. Its pairs, from 0: rows {named}"
            raise (FloatingPointError if isinstance(error, FloatingPointError) else ValueError)(text) from error
        stays = result.radius is not None and float(result.radius) == 0
        if stays and self._step_config.moves and not self._warned:
            self._warned = True
            logger.warning("%s: abs(theta) * g is 0 for every selected parameter, so that every gap is 0", self._name)
        values = {field: [digits(v) for v in getattr(result, field).tolist()] for field in MEASURES.values()}
        ratio = result.first_order_ratio
        ratios = {"first_order_ratio": None if ratio is None else digits(float(ratio))}
        return {"repeat": repeat, "batch": number, "rows": rows.tolist(), **values, **ratios}

    def _tokenized(self, row: int, pair: Row) -> Row:
        try:
            return self._collate.tokenize(pair)
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}. It is row {_named(row, pair)}, from 0") from error

    def _run(self, pairs: list[Row], place: tuple[int, int]) -> StepResult:
        device = next(self._model.parameters()).device
        batch = {name: x.to(device) for name, x in self._collate(pairs).items()}
        if not self._is_causal:
            require_causal(self._model, stack_pairs(batch))
            self._is_causal = True
        rng = torch.Generator().manual_seed(int(stream(self._seed, "score direction", *place).integers(2**53)))
        try:
            forward = self._backend.forward(pair_logps, self._model, batch, self._step_config)
            return run(forward, self._step_config, self._backend, rng=rng)[0]
        except torch.OutOfMemoryError as error:
            raise ValueError("out of memory: lower batch_size or max_length") from error


def _named(row: int, pair: Row) -> str:
    return f"{row} (id {pair['id']})" if "id" in pair else str(row)
