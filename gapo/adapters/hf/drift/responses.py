"""Lengths of the responses that a policy generates, for `DriftCallback`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapo.adapters.hf.generation import generation_config, left_padded
from gapo.data.tokenize import IGNORE_INDEX

_AT_ONCE = 16


@dataclass(frozen=True)
class Responses:
    """How responses are generated.

    Args:
        max_new_tokens: most tokens of a response.
        temperature: 0 for greedy responses, else they are sampled at it, from the whole distribution.
    """

    max_new_tokens: int
    temperature: float

    def lengths(
        self, model: Any, prompts: Sequence[Tensor], ends: Sequence[int], **options: Any
    ) -> Iterator[list[float]]:
        """Yield [tokens before the closing one, 1.0 if there is a closing one, else 0.0] for each response.

        Args:
            model: generates; a causal language model of transformers.
            prompts: token ids (seq,) of each prompt.
            ends: ids that close a response.
            options: of `generate`.

        Sampling draws from the global random state.
        """
        config = generation_config(max_new_tokens=self.max_new_tokens, temperature=self.temperature, ends=ends)
        for start in range(0, len(prompts), _AT_ONCE):
            ids, mask = left_padded(prompts[start : start + _AT_ONCE], model.device)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **options)
            closing = torch.isin(output[:, ids.shape[1] :], torch.tensor(list(ends), device=output.device))
            for row in closing.int().cpu():
                ended = bool(row.any())
                yield [float(row.argmax() if ended else len(row)), float(ended)]


def prompt_of(rows: dict[str, Tensor]) -> Tensor:
    """(seq,) token ids of a pair's prompt: those before the first answered token of the chosen row."""
    ids, mask, labels = (rows[name][0] for name in ("input_ids", "attention_mask", "labels"))
    first = int((labels != IGNORE_INDEX).int().argmax())
    return ids[:first][mask[:first].bool()]
