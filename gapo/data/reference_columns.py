"""Reference log-probabilities as columns of tokenised pairs: computed once, before training changes the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gapo.columns import REFERENCE_ALPHA
from gapo.data.collate import TOKENIZED, collate_pairs, padding_multiple
from gapo.data.lazy_rows import WithColumns, mapped
from gapo.objective import require_number
from gapo.pairs import REFERENCE
from gapo.records import in_memory, require_row

Measure = Callable[[Mapping[str, np.ndarray]], tuple[Any, Any]]


def with_reference_logps(
    tokenized: Sequence[dict[str, Any]],
    measure: Measure,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    ld_alpha: float | None = None,
    progress: str | None = "reference log-probabilities",
) -> Sequence[dict[str, Any]]:
    """The rows with "ref_chosen_logps" and "ref_rejected_logps": summed log-probabilities under the reference, nats.

    Rows of similar length share a batch. The result is reproducible: the same rows in the same order give the same
    numbers.

    Args:
        tokenized: rows of `tokenize_pair`.
        measure: takes a batch of `collate_pairs` and returns (chosen, rejected), each (N,): log-probabilities summed
            over the answer's tokens. The reference is the model that training starts from.
        pad_token_id: pads the rows of a batch.
        batch_size: pairs in a batch.
        ld_alpha: LD-DPO's alpha that `measure` measures with (`gapo.pairs.pair_logps`), None for 1. The rows then also
            have the column "ref_ld_alpha", by which a training with another alpha is refused.
        progress: label of the progress bar, which needs tqdm; None for no bar.

    Returns:
        New rows, in the order of `tokenized`.

    Raises:
        TypeError: `tokenized` are no rows.
        ValueError: a row is not tokenised, or `ld_alpha` is not in [0, 1].
        FloatingPointError: a log-probability is not finite; names the row.

    >>> rows = [{"chosen_input_ids": [1, 2], "chosen_labels": [-100, 2],
    ...          "rejected_input_ids": [1, 3], "rejected_labels": [-100, 3]}]
    >>> half = lambda batch: (np.log([0.5]), np.log([0.25]))
    >>> row, = with_reference_logps(rows, half, pad_token_id=0, progress=None)
    >>> round(row["ref_chosen_logps"], 3), round(row["ref_rejected_logps"], 3)
    (-0.693, -1.386)
    """
    if ld_alpha is not None:
        require_number("ld_alpha", ld_alpha, "in [0, 1], or None", lambda v: 0 <= v <= 1)
    tokenized = in_memory(tokenized, "tokenized")
    of_reference = (*REFERENCE, REFERENCE_ALPHA)  # columns of an earlier measurement, which this one replaces
    rows_before = (require_row(row, i, "tokenized") for i, row in enumerate(tokenized))
    tokenized = [{name: x for name, x in row.items() if name not in of_reference} for row in rows_before]
    lengths = [max(len(row.get(name, ())) for name in TOKENIZED) for row in tokenized]
    order = sorted(range(len(tokenized)), key=lambda i: -lengths[i])  # if memory runs out, it does so at once
    batches: Any = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if progress is not None:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc=progress, unit="batch")
    logps, multiple = np.empty((len(tokenized), 2)), padding_multiple(tokenized)
    for index in batches:
        batch = collate_pairs([tokenized[i] for i in index], pad_token_id=pad_token_id, pad_to_multiple_of=multiple)
        logps[index] = np.stack([np.asarray(side, dtype=np.float64) for side in measure(batch)], axis=-1)
    for i, (chosen, rejected) in enumerate(logps):
        if not np.isfinite([chosen, rejected]).all():
            raise FloatingPointError(
                f"the reference log-probabilities of row {tokenized[i].get('id', i)} are {chosen} (chosen) and "
                f"{rejected} (rejected): look at its tokens, or at the model"
            )
    rows = mapped(tokenized, WithColumns(REFERENCE, logps))
    alpha = alpha_column(ld_alpha)
    return mapped(rows, WithColumns(tuple(alpha), np.full((len(rows), 1), ld_alpha))) if alpha else rows


def alpha_column(ld_alpha: float | None) -> dict[str, float]:
    """The column of a row by which a training with another alpha is refused; none where alpha changes nothing."""
    return {} if ld_alpha is None or ld_alpha == 1 else {REFERENCE_ALPHA: float(ld_alpha)}
