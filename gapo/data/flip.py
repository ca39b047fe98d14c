"""Deliberate label noise: swap chosen and rejected in a stated share of the pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data.layouts import listed_columns
from gapo.data.lazy_rows import mapped
from gapo.data.messages import text_of
from gapo.pairs import SIDES
from gapo.records import as_sequence, require_row

MODES = ("random", "length")
FAVOURS = ("longer", "shorter")
_EVALUATION = "test tests testing eval evals evaluation valid validation val dev heldout holdout"


def flip_pairs(
    rows: Sequence[dict[str, Any]], *, mode: str = "random", rate: float, seed: int = 0, favour: str = "longer"
) -> Sequence[dict[str, Any]]:
    """A copy of `rows` with round(rate * n) pairs flipped, and "is_flipped" on every row.

    What else a row holds of either answer, such as reference log-probabilities, is swapped with the answers.

    Of the rows of `read_pairs` it is a read-only view, of others a list.

    Args:
        rows: pairs: a list of dicts, a `datasets.Dataset` or a `pandas.DataFrame`. An "is_flipped" is inverted on the
            rows that are flipped, and kept on the others.
        mode: "random" draws among all pairs; "length", among the pairs whose flip makes the labels favour a length.
        rate: share of ALL pairs to flip, in [0, 1].
        seed: of the draw.
        favour: for mode "length". "longer" flips pairs whose chosen answer has fewer characters, as the paper's authors
            do; "shorter", the reverse.

    Raises:
        TypeError: `rows` are no rows.
        ValueError: an argument is out of range, a row has no two answers, or fewer pairs can be flipped than `rate`
            asks for.

    >>> rows = [{"prompt": "1+1?", "chosen": "2", "rejected": "three"}, {"prompt": "", "chosen": "b", "rejected": "a"}]
    >>> for row in flip_pairs(rows, mode="length", rate=0.5):
    ...     print(row.get("chosen"), row.get("is_flipped"))
    three True
    b False
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'random' or 'length', got {mode!r}")
    if favour not in FAVOURS:
        raise ValueError(f"favour must be 'longer' or 'shorter', got {favour!r}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")
    rows = as_sequence(rows, "rows")
    eligible = (
        [i for i, row in enumerate(rows) if _flip_favours(i, row, favour)] if mode == "length" else range(len(rows))
    )
    count = round(rate * len(rows))
    if count > len(eligible):
        raise ValueError(
            f"rate={rate} asks for {count} flips, but only {len(eligible)} of {len(rows)} pairs can be flipped to "
            f"favour {favour} answers: the greatest rate here is {len(eligible) / len(rows):.4g}"
        )
    drawn = np.zeros(len(rows), dtype=bool)
    drawn[[eligible[i] for i in np.random.default_rng(seed).permutation(len(eligible))[:count]]] = True
    return mapped(rows, _Flips(drawn))


class _Flips:
    """A row of a place with "is_flipped", and flipped where it was drawn."""

    def __init__(self, drawn: np.ndarray) -> None:
        self._drawn = drawn

    def __call__(self, place: int, row: dict[str, Any]) -> dict[str, Any]:
        marked = {**require_row(row, place, "rows"), "is_flipped": bool(row.get("is_flipped"))}
        try:
            return swapped(marked) if self._drawn[place] else marked
        except ValueError as error:
            raise ValueError(f"row {place} of rows: {error}") from None


def true_labels(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """`rows`, with the answers of those whose "is_flipped" is true swapped back, for evaluation."""
    return mapped(rows, _with_true_label)


def _with_true_label(place: int, row: dict[str, Any]) -> dict[str, Any]:
    return swapped(row) if row.get("is_flipped") else row


def evaluation_name(source: str | Path, split: str = "train") -> str | None:
    """The name by which `source` is marked as evaluation data, or None.

    Flipped labels would falsify every measure on such data. The words of a file's own name count ("test", "eval",
    "valid", "dev", "held-out", ...), or those of a data set's name and split. Names of parent folders do not.

    >>> evaluation_name("runs/test/pairs_dev.jsonl.gz"), evaluation_name("runs/test/latest.jsonl")
    ('pairs_dev.jsonl.gz', None)
    """
    path = Path(source)
    names = [path.name] if path.is_file() else [path.name, split]
    return next((name for name in names if names_evaluation(name)), None)


def names_evaluation(name: str) -> bool:
    """Whether a word of `name` means evaluation: "test_prefs", "valid", "heldOut"."""
    return bool(_words(name) & set(_EVALUATION.split()))


def _words(name: str) -> set[str]:
    """The words of a name in lower case: "heldOut-pairs" and "held_out_pairs" give "heldout" and "pairs"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return set(re.findall("[a-z]+", re.sub(r"(held|hold)[^a-z]out(?![a-z])", r"\1out", spaced)))


def _flip_favours(place: int, row: dict[str, Any], favour: str) -> bool:
    if missing := [name for name in SIDES if name not in require_row(row, place, "rows")]:
        raise ValueError(f"row {place} of rows: column {missing[0]!r} is missing")
    # A flip makes the rejected answer the chosen one.
    growth = len(text_of(row["rejected"])) - len(text_of(row["chosen"]))
    return growth > 0 if favour == "longer" else growth < 0


def swapped(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pair with its answers swapped, and with them every two columns whose names differ in chosen and rejected.

    What is said of the label is inverted: "is_flipped", whether it is the true one's opposite, and "p_wrong", the
    probability of that by `gapo audit`.

    Raises:
        ValueError: the row holds nothing of either answer, so that there is nothing to swap.

    >>> swapped({"prompt": "1+1?", "chosen": "3", "rejected": "2", "score_chosen": 7.0, "score_rejected": 4.0})
    {'prompt': '1+1?', 'chosen': '2', 'rejected': '3', 'score_chosen': 4.0, 'score_rejected': 7.0}
    """
    chosen, rejected = SIDES
    others = {name: other for name in row if (other := name.replace(chosen, rejected)) != name and other in row}
    if not others:
        raise ValueError(f"it has no chosen and rejected to swap, but {listed_columns(row)}")
    columns = dict(row)
    for name, other in others.items():
        columns[name], columns[other] = row[other], row[name]
    if row.get("is_flipped") is not None:
        columns["is_flipped"] = not row["is_flipped"]
    if "p_wrong" in row:
        columns["p_wrong"] = _complement(row["p_wrong"])
    return columns


def _complement(probability: Any) -> Any:
    """1 minus it, as text where it is text; what is no number in [0, 1] stays."""
    try:
        complement = round(1 - float(probability), 15)  # without the digits that binary fractions add
    except (TypeError, ValueError):
        return probability
    if not 0 <= complement <= 1:
        return probability
    return str(complement) if isinstance(probability, str) else complement
