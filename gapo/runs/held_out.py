"""Pairs to train on and pairs held out to evaluate on: read, split, compared.

`gapo train` holds out a random share of the rows, the study whole groups of equal prompts. Which split of a data set is
evaluated on must be clear from its name (`gapo.runs.splits`). Pairs that stand on both sides are counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gapo.data import Pairs, generate_pairs, read_pairs
from gapo.data.rows import selected
from gapo.runs.config_bases import EvaluatedPairs
from gapo.runs.splits import evaluation_split, require_split

Row = dict[str, Any]
Rows = Sequence[Row]


def read_both(
    config: EvaluatedPairs, *, generated: int, strict: bool = False, most: int | None = None
) -> tuple[Pairs, Pairs | None]:
    """The pairs to train on, and those to evaluate on; None for the latter where they are to be held out.

    Args:
        config: the source of the pairs.
        generated: number of pairs to evaluate on that "demo" generates, from other fillings than those trained on.
        strict: stop at the first bad row.
        most: read only so many pairs to evaluate on.

    Raises:
        ConfigError: a data set lacks the split, or which split to evaluate on is not clear.
        gapo.data.PairError: the pairs cannot be read. Those to evaluate on are read first.
    """
    evaluated = None
    if config.eval_pairs is not None:
        split = evaluation_split(config.eval_pairs, config.eval_split)
        evaluated = read_pairs(config.eval_pairs, split=split, strict=strict, limit=most)
    if config.pairs != "demo":
        require_split(config.pairs, config.split)
        return read_pairs(config.pairs, split=config.split, strict=strict, limit=config.limit), evaluated
    if evaluated is None:
        rows = generate_pairs(generated, seed=config.seed, split="test")
        evaluated = Pairs(rows, source="generated, from other fillings")
    rows = generate_pairs(config.demo_size, seed=config.seed)[: config.limit]
    return Pairs(rows, source="generated demonstration pairs"), evaluated


def hold_out_share(rows: Rows, share: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """(the rest, a random `share` of the rows), both in the order of `rows`."""
    order = rng.permutation(len(rows))
    count = round(share * len(order))
    return selected(rows, np.sort(order[count:])), selected(rows, np.sort(order[:count]))


def hold_out_prompts(rows: Rows, count: int, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """(the rest, about `count` rows): whole groups of equal prompts, so that no held-out prompt is trained on."""
    if len(rows) <= count:
        return [], list(rows)
    prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
    rank = {prompts[i]: place for place, i in enumerate(rng.permutation(len(prompts)))}
    ordered = sorted(rows, key=lambda row: rank[json.dumps(row["prompt"])])
    last = ordered[count - 1]["prompt"]
    end = count
    while end < len(ordered) and ordered[end]["prompt"] == last:
        end += 1
    return ordered[end:], ordered[:end]


def report_in_both(shared: int, of: int, what: str = "held-out") -> str:
    """The line on pairs that are both trained and evaluated on."""
    return (
        f"{shared} of the {of} {what} pairs are training pairs too (same prompt, same two answers): what is measured "
        "on these is how well they were learned, not how well the policy generalises"
    )


def in_both(rows: Iterable[Row], others: Iterable[Row]) -> int:
    """The number of `rows` that are in `others` too: same prompt, same two answers, either of them the chosen one."""
    counts = Counter(map(_content, rows))  # of the fewer, since `others` may be a million
    return sum(counts.pop(_content(row), 0) for row in others)


def _content(row: Row) -> str:
    answers = sorted(json.dumps(row[side]) for side in ("chosen", "rejected"))
    return json.dumps([row["prompt"], *answers])


def fingerprint(rows: Sequence[Row]) -> str:
    """A digest of rows, their labels and their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
