"""Reference log-probabilities of a run: measured under the policy that it starts from, and saved for its resumption.

A resumed run has trained weights, from which the starting policy's log-probabilities can no longer be computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data import with_reference_logps
from gapo.data.collate import TOKENIZED
from gapo.data.lazy_rows import WithColumns, joined
from gapo.data.reference_columns import Measure, alpha_column
from gapo.pairs import REFERENCE
from gapo.runs.output.tensors import kept_arrays

Rows = Sequence[dict[str, Any]]


def with_kept_reference(
    train: Rows,
    held_out: Rows,
    measure: Measure,
    path: Path,
    *,
    pad_token_id: int,
    batch_size: int,
    ld_alpha: float | None = None,
) -> tuple[Rows, Rows]:
    """Both lists of rows with the columns `REFERENCE`, read from `path`, or measured now and written there.

    Args:
        train: tokenised training rows.
        held_out: tokenised held-out rows.
        measure: as in `gapo.data.with_reference_logps`; not called when the file exists, so that a resumed run is
            compared with the policy that it first started from.
        path: the run's file, written atomically.
        pad_token_id: as in `with_reference_logps`.
        batch_size: likewise.
        ld_alpha: likewise.

    Raises:
        ConfigError: the file is damaged, or of other pairs or another alpha.
    """
    rows = joined(train, held_out)

    def columns() -> dict[str, np.ndarray]:
        measured = with_reference_logps(
            rows, measure, pad_token_id=pad_token_id, batch_size=batch_size, ld_alpha=ld_alpha
        )
        return {name: np.array([row[name] for row in measured]) for name in REFERENCE}

    arrays = kept_arrays(
        path,
        _digest(rows, ld_alpha),
        columns,
        others="the reference log-probabilities of other pairs, another tokenizer or another ld_alpha: the run has "
        "changed since it began. Give another output_dir, or --overwrite true",
    )
    rows = rows.map(WithColumns(REFERENCE, np.stack([arrays[name] for name in REFERENCE], axis=-1)))
    if alpha := alpha_column(ld_alpha):
        rows = rows.map(WithColumns(tuple(alpha), np.full((len(rows), 1), ld_alpha)))
    return rows[: len(train)], rows[len(train) :]


def _digest(rows: Sequence[dict[str, Any]], ld_alpha: float | None) -> str:
    """A digest of the rows' tokens and their order, and of the alpha that they are measured with."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row[name] for name in TOKENIZED]).encode())
    for value in alpha_column(ld_alpha).values():
        digest.update(repr(value).encode())
    return digest.hexdigest()
