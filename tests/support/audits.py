"""Results of an audit for the tests of its page: generated pairs and figures of a plausible shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from gapo import data
from gapo.runs.audit.audit_result import AuditResult

DIGEST = "ab12" * 16


def audited(n: int = 60, *, flips: bool | None = None, learned: bool = True, **summary: Any) -> AuditResult:
    """An audit of n generated pairs, most suspicious first: the margin of the pair of rank k grows with k."""
    rng = np.random.default_rng(0)
    pairs, rows = data.generate_pairs(n), rng.permutation(n)
    result = []
    for i, row in enumerate(rows.tolist()):
        share = (i + 0.5) / n
        result.append(
            {
                "rank": i + 1,
                "row": row,
                "line": row + 1,
                "id": pairs[row]["id"],
                "p_wrong": round(0.99 * (1 - share) ** 2, 4),
            }
            | {"margin": 3 * share - 1.2, "gap": 0.9 - share, "weight": 2.5 / (1 + np.exp(2.5 * (0.9 - share) - 0.25))}
            | {"against": max(0, 5 - int(10 * share)), "policies": 5, "mark": None}
            | {"is_flipped": None if flips is None else share < 0.2}
            | {name: pairs[row][name] for name in ("prompt", "chosen", "rejected")}
        )
    about = {
        "pairs": n, "source": "pairs.jsonl", "learned": learned, "share": {"mean": 0.18, "low": 0.15, "high": 0.22},
        "held_out_accuracy": 0.71, "held_out_low": 0.69, "held_out_high": 0.73, "folds": 5, "seeds": 1, "model": "tiny",
        "advice": None, "chosen_longer": {"share": 0.5, "pairs": n},
        "fifths": [0.6, 0.2, 0.1, 0.05, 0.05], "settings": {"rho": 0.3}, "seconds": 93.2,
        "versions": {"gapo": "0.0"}, "digest": DIGEST, "table": "pairs.audit.parquet",
    }  # fmt: skip
    if flips is not None:
        about["detection"] = {
            "auroc": {"p_wrong": 0.912, "margin": 0.904},
            "precision": {"p_wrong": 0.71},
            "flipped_share": 0.2,
        }
    if not learned:
        result = [row | {"rank": None, "p_wrong": None} for row in sorted(result, key=lambda row: row["row"])]
        about |= {"share": None, "held_out_accuracy": 0.51, "advice": "try a larger model"}
    return AuditResult(result, {**about, **summary})
