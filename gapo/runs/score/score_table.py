"""From measurements of batches to one row of scores for each pair, and the selection of pairs by their gap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gapo.data.streams import stream
from gapo.runs.output.tables import Row

# A pair's columns, and the field of `gapo.StepResult` that each comes from.
MEASURES = {"margin": "margins", "anchor_margin": "anchor_margins", "gap": "anchor_gaps", "weight": "weights"}
_OWN_COLUMNS = ("id", "is_flipped")  # columns of the pairs that their scores repeat


def plan(pairs: int, batch_size: int, repeats: int, seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(repeat, batch, rows of the batch): every pair once a repeat, shuffled anew, in batches of nearly one size.

    A gap depends on the batch that shares its anchor, so that gaps of a small last batch would be biased.
    """
    count = -(-pairs // batch_size)
    for repeat in range(repeats):
        order = stream(seed, "score batches", repeat).permutation(pairs)
        for batch, rows in enumerate(np.array_split(order, count)):
            yield repeat, batch, rows


def digits(value: float) -> float:
    """`value` to seven significant digits, what float32 holds."""
    return float(f"{value:.7g}")


def score_rows(pairs: Sequence[Row], lines: Sequence[Row], checkpoints: Sequence[str], repeats: int) -> list[Row]:
    """One row for each checkpoint and pair, in this order.

    "row" is the pair's place among the usable ones, from 0. "margin", "anchor_margin", "gap" (nats per token) and
    "weight" are means over the repeats; "batches" are the pair's batches, one for each repeat. With several repeats
    also "gaps", one for each, and "gap_std" and "weight_std", standard deviations over them.

    Args:
        pairs: the usable pairs.
        lines: measurements: "checkpoint", "repeat", "batch", "rows" and the fields of `MEASURES`, one entry for each
            pair of the batch.
        checkpoints: their names, in order.
        repeats: number of repeats.
    """
    measured = {name: np.full((repeats, len(pairs), len(MEASURES)), np.nan) for name in checkpoints}
    batches = np.zeros((repeats, len(pairs)), dtype=int)
    for line in lines:
        measured[line["checkpoint"]][line["repeat"], line["rows"]] = np.stack([line[f] for f in MEASURES.values()], -1)
        batches[line["repeat"], line["rows"]] = line["batch"]
    columns = [name for name in _OWN_COLUMNS if any(name in pair for pair in pairs)]
    return [
        {"row": i, **{k: pair.get(k) for k in columns}, "checkpoint": name, **_measures(measured[name][:, i])}
        | {"batches": batches[:, i].tolist()}
        for name in checkpoints
        for i, pair in enumerate(pairs)
    ]


def _measures(values: np.ndarray) -> Row:
    """Columns of one pair from its measurements (repeats, measures)."""
    columns: Row = {name: digits(mean) for name, mean in zip(MEASURES, values.mean(0), strict=True)}
    if len(values) > 1:
        spread = dict(zip(MEASURES, values.std(0, ddof=1), strict=True))
        columns |= {f"{name}_std": digits(spread[name]) for name in ("gap", "weight")}
        columns["gaps"] = values[:, list(MEASURES).index("gap")].tolist()
    return columns


def by_pair(scores: Sequence[Row], name: str) -> np.ndarray:
    """(n,) column `name` of the scores by pair, the mean over the checkpoints."""
    rows = np.array([score["row"] for score in scores])
    values = np.array([score[name] for score in scores], dtype=float)
    return np.bincount(rows, values) / np.bincount(rows)


def select_pairs(pairs: Sequence[Row], scores: Sequence[Row], which: str, share: float) -> list[Row]:
    """round(share * n) pairs, one at least, with the "lowest" or "highest" gaps: their columns, "gap" and "weight".

    They keep their order. Over several checkpoints a pair's mean counts; among equal gaps the first pairs are taken.
    """
    gap, weight = by_pair(scores, "gap"), by_pair(scores, "weight")
    order = np.argsort(gap if which == "lowest" else -gap, kind="stable")
    chosen = sorted(order[: max(1, round(share * len(pairs)))])
    return [{**pairs[i], "gap": digits(gap[i]), "weight": digits(weight[i])} for i in chosen]
