"""Reference log-probabilities as columns of tokenised pairs: computed once, before the policy moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gapo.data.collate import TOKENIZED, collate_pairs
from gapo.pairs import REFERENCE, require_reference  # noqa: F401

Measure = Callable[[Mapping[str, np.ndarray]], tuple[Any, Any]]


def with_reference_logps(
    tokenized: Sequence[dict[str, Any]],
    measure: Measure,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    progress: str | None = "reference log-probabilities",
) -> list[dict[str, Any]]:
    """The rows with "ref_chosen_logps" and "ref_rejected_logps": summed log-probabilities under the reference, nats.

    Rows of like length share a batch. In the same order, the same rows give the same numbers.

    Args:
        tokenized: rows of `tokenize_pair`.
        measure: gives (chosen, rejected), each (N,), summed, for a batch of `collate_pairs`: by the model that training
            starts from, before it starts.
        pad_token_id: pads the rows of a batch.
        batch_size: pairs in a batch.
        progress: what the progress bar says, which needs tqdm; None for no bar.

    Returns:
        New rows, in the order of `tokenized`.

    Raises:
        ValueError: a row is not tokenised.
        FloatingPointError: a log-probability is not finite, naming the row.
    """
    lengths = [max(len(row.get(name, ())) for name in TOKENIZED) for row in tokenized]
    order = sorted(range(len(tokenized)), key=lambda i: -lengths[i])  # too long a batch fails at once
    batches: Any = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if progress is not None:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc=progress, unit="batch")
    found = np.empty((len(tokenized), 2))
    for index in batches:
        batch = collate_pairs([tokenized[i] for i in index], pad_token_id=pad_token_id, pad_to_multiple_of=32)
        found[index] = np.stack([np.asarray(side, dtype=np.float64) for side in measure(batch)], axis=-1)
    for i, pair in enumerate(found):
        if not np.isfinite(pair).all():
            raise FloatingPointError(
                f"the reference log-probabilities of row {tokenized[i].get('id', i)} are {pair[0]} (chosen) and "
                f"{pair[1]} (rejected): look at its tokens, or at the model"
            )
    return [
        {**row, **dict(zip(REFERENCE, map(float, pair), strict=True))}
        for row, pair in zip(tokenized, found, strict=True)
    ]
