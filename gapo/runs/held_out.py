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

from gapo.data import Pairs, Problem, generate_pairs, read_pairs
from gapo.data.layouts import parse_columns
from gapo.data.lazy_rows import joined, selected
from gapo.data.raw_rows import takes
from gapo.data.streams import stream
from gapo.runs.config_bases import READING, EvaluatedPairs, PairSource, source_of
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
    if (source := config.evaluated) is not None:
        own = source == config.pairs  # configuration and revision are of the data set that pairs names
        split = evaluation_split(source, config.eval_split, *_dataset(config if own else None))
        evaluated = read_source(_reading(config, source, split, own), strict=strict, limit=most)
    if config.mixture:
        return read_mixture(config, strict=strict), evaluated
    if config.pairs != "demo":
        trained = _reading(config, config.pairs, config.split, own=True)
        return read_source(trained, strict=strict, limit=config.limit), evaluated
    if evaluated is None:
        rows = generate_pairs(generated, seed=config.seed, split="test")
        evaluated = Pairs(rows, source="generated, from other fillings")
    rows = generate_pairs(config.demo_size, seed=config.seed)[: config.limit]
    return Pairs(rows, source="generated demonstration pairs"), evaluated


def read_source(source: PairSource, *, strict: bool, limit: int | None) -> Pairs:
    """The pairs of a source, whose split must exist.

    Raises:
        ConfigError: a data set lacks the split.
        gapo.data.PairError: the pairs cannot be read.
    """
    config, revision = _dataset(source)
    require_split(source.pairs, source.split, config=config, revision=revision)
    return read_pairs(
        source.pairs,
        split=source.split,
        strict=strict,
        limit=limit,
        columns=parse_columns(source.columns),
        preference=source.preference,
        encoding=source.encoding,
        config=config,
        revision=revision,
        streaming=source.streaming,
    )


def _dataset(source: PairSource | None) -> tuple[str | None, str | None]:
    return (None, None) if source is None else (source.dataset_config, source.dataset_revision)


def _reading(config: EvaluatedPairs, pairs: str, split: str, own: bool) -> PairSource:
    """One source, read as `config` says; `own` where it is that of the training pairs."""
    settings = {name: getattr(config, name) for name in READING} | _of_others(config, pairs)
    if not own:
        settings |= {"dataset_config": None, "dataset_revision": None}
    return PairSource(pairs=pairs, split=split, **settings)


def _of_others(config: EvaluatedPairs, pairs: str) -> dict[str, Any]:
    """The defaults of those of `encoding` and `streaming` that this source does not take, but another one does."""
    sources = [part["pairs"] for part in config.mixture] or ([] if config.pairs == "demo" else [config.pairs])
    sources += [] if config.evaluated is None else [config.evaluated]
    plain = {"encoding": PairSource.encoding, "streaming": PairSource.streaming}
    return {n: v for n, v in plain.items() if not takes(pairs, n) and any(takes(other, n) for other in sources)}


def read_mixture(config: EvaluatedPairs, *, strict: bool) -> Pairs:
    """The pairs of the sources of `config.mixture`, behind each other; `limit` is of them all.

    With weights, the mixture has as many pairs as the sources can give in these shares. Those of a source are drawn
    without replacement, by `config.seed`. The shares hold exactly, up to one pair, which drawing the source of each
    pair at random, as `datasets.interleave_datasets` does, would not give.

    Raises:
        ConfigError, gapo.data.PairError: as `read_source`.
    """
    described = [source_of(config, {**_of_others(config, part["pairs"]), **part}) for part in config.mixture]
    sources = [read_source(source, strict=strict, limit=config.limit) for source in described]
    sizes = np.array([len(pairs.rows) for pairs in sources])
    weights = np.array([part.get("weight") or 0 for part in config.mixture], dtype=np.float64)
    shares = weights / weights.sum() if weights.any() else sizes / sizes.sum()
    total = int(min(sizes.sum() if config.limit is None else config.limit, np.floor((sizes / shares).min() + 1e-9)))
    counts = np.diff(np.rint(np.cumsum(shares) * total).astype(int), prepend=0)
    parts, lines = [], []
    for i, (pairs, count) in enumerate(zip(sources, np.minimum(counts, sizes), strict=True)):
        drawn = stream(config.seed, "mixture", i).permutation(len(pairs.rows))[:count]
        parts.append(selected(pairs.rows, np.sort(drawn)))
        lines.append(f"  {count} of the {len(pairs.rows)} pairs of {pairs.source}")
    problems = [Problem(p.line, f"{pairs.source}: {p.reason}") for pairs in sources for p in pairs.problems]
    name = "mixture of\n" + "\n".join(lines) + "\n  together"
    return Pairs(joined(*parts), problems, name, sum(pairs.ties for pairs in sources))


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
