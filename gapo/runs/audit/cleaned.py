"""The cleaned pairs: the most suspicious ones flipped or left out, a person's marks above all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gapo.data.flip import swapped
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.audit_result import Row, rounded

KEEP, FLIP, DROP = 0, 1, 2


def actions(config: AuditConfig, p_wrong: np.ndarray, marks: Mapping[int, str], share: float) -> np.ndarray:
    """(n,) what becomes of each pair: `KEEP`, `FLIP` or `DROP`.

    Pairs that a person marked right or wrong are decided by that. The others follow by their probability, the most
    suspicious first: round(flip * n) are flipped, then dropped until round(drop * n) are either, as far as they reach
    the threshold. Marked pairs do not count towards the shares.

    Args:
        config: its `drop`, `flip`, `threshold` and `marked`.
        p_wrong: (n,) probability that each label is wrong.
        marks: "right", "wrong" or "unsure" by the place of a pair; one that is unsure counts as not marked.
        share: of the labels, those taken to be wrong: the `drop` of "auto".
    """
    n = len(p_wrong)
    out = np.full(n, KEEP)
    decided = np.zeros(n, dtype=bool)
    for row, mark in marks.items():
        decided[row] = mark in ("right", "wrong")
        if mark == "wrong":
            out[row] = {"flip": FLIP, "drop": DROP, "leave": KEEP}[config.marked]
    order = np.argsort(-p_wrong, kind="stable")
    order = order[~decided[order]]
    if config.threshold is not None:
        order = order[p_wrong[order] >= config.threshold]
    flips = round((config.flip or 0) * n)
    drop = share if config.drop == "auto" else config.drop
    if drop is not None:
        touched = round(float(drop) * n)
    else:
        touched = len(order) if config.flip is None and config.threshold is not None else flips
    out[order[:touched]] = DROP
    out[order[:flips]] = FLIP
    return out


def cleaned_rows(rows: Sequence[Row], action: np.ndarray, p_wrong: np.ndarray | None) -> list[Row]:
    """The pairs that stay, in their order, with all columns.

    They get "p_wrong", where it can be told, of the label that they then have; and "flipped_by_audit", where any pair
    is flipped.
    """
    flips = bool((action == FLIP).any())
    out = []
    for i, row in enumerate(rows):
        if action[i] != DROP:
            pair = dict(row) if p_wrong is None else {**row, "p_wrong": rounded(p_wrong[i])}
            pair = swapped(pair) if action[i] == FLIP else pair
            if flips:
                pair["flipped_by_audit"] = bool(action[i] == FLIP)
            out.append(pair)
    return out
