"""Reference log-probabilities of a run: computed from the policy that it starts from, and kept for when it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data import with_reference_logps
from gapo.data.collate import REFERENCE, TOKENIZED
from gapo.data.reference import Measure
from gapo.files import write_bytes
from gapo.runs.errors import ConfigError
from gapo.runs.output.tensors import open_tensors

Rows = list[dict[str, Any]]


def with_kept_reference(
    train: Rows, held_out: Rows, measure: Measure, path: Path, *, pad_token_id: int, batch_size: int
) -> tuple[Rows, Rows]:
    """Both lists of rows with the columns `REFERENCE`, read from `path`, or measured now and written there.

    Args:
        train: tokenised training rows.
        held_out: tokenised held-out rows.
        measure: as in `gapo.data.with_reference_logps`; not called when the file is there, so that a resumed run is
            held against the policy that it first started from.
        path: the run's file, whole or not there at all.
        pad_token_id: as in `with_reference_logps`.
        batch_size: likewise.

    Raises:
        ConfigError: the file is of other pairs.
    """
    from safetensors.numpy import save

    rows, digest = [*train, *held_out], _digest([*train, *held_out])
    if path.exists():
        columns = _read(path, digest)
        rows = [{**row, **{name: float(columns[name][i]) for name in REFERENCE}} for i, row in enumerate(rows)]
    else:
        rows = with_reference_logps(rows, measure, pad_token_id=pad_token_id, batch_size=batch_size)
        columns = {name: np.array([row[name] for row in rows]) for name in REFERENCE}
        write_bytes(path, save(columns, metadata={"pairs": digest}))
    return rows[: len(train)], rows[len(train) :]


def _read(path: Path, digest: str) -> dict[str, np.ndarray]:
    with open_tensors(path) as file:
        if file.metadata().get("pairs") != digest:
            raise ConfigError(
                f"{path} holds the reference log-probabilities of other pairs, or of another tokenizer: the data of "
                "this run have changed since it began. Give another output_dir, or --overwrite true"
            )
        return {name: file.get_tensor(name) for name in REFERENCE}


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    """What identifies the rows' tokens and their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([row[name] for name in TOKENIZED]).encode())
    return found.hexdigest()
