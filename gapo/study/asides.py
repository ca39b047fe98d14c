"""Tables of a study beside its accuracies: what the runs fitted, kept and lost; settings chosen on noisy labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from gapo.study import frames as tables
from gapo.study.names import shown
from gapo.study.outcome import Study
from gapo.study.statistics import Interval, bootstrap, differences

Table = dict[str, Any]

_COLUMNS = {  # of a run: heading, factor, digits
    "fitted_flipped": ("flipped pairs fitted to their label, %", 100, 1),
    "fitted_clean": ("clean pairs fitted, %", 100, 1),
    "course_best": ("best accuracy on the way, %", 100, 1),
    "course_last": ("last, same pairs, %", 100, 1),
    "transfer_accuracy": ("accuracy on the other pairs, %", 100, 1),
    "drift": ("KL from the start, nats per token", 1, 3),
    "perplexity": ("perplexity of plain text", 1, 1),
}


def asides(noisy: pd.DataFrame, facts: Mapping[str, Any]) -> Table:
    """What the runs of `noisy` fitted, kept and lost, an arm in each row; columns that were measured."""
    measured = [name for name in _COLUMNS if name in noisy and noisy[name].notna().any()]
    before = {"transfer_accuracy": (facts.get("before_transfer") or {}).get("accuracy"), "drift": 0.0,
              "perplexity": facts.get("perplexity")}  # fmt: skip
    rows = [["before training", *(_number(name, before.get(name)) for name in measured)]]
    for arm, group in noisy.groupby("arm", sort=False):
        rows.append([shown(str(arm)), *(_interval(name, group[name].dropna()) for name in measured)])
    return {"head": ["objective", *(_COLUMNS[name][0] for name in measured)], "rows": rows}


def _number(name: str, value: float | None) -> str:
    _, factor, digits = _COLUMNS[name]
    return "" if value is None else f"{factor * value:.{digits}f}"


def _interval(name: str, values: pd.Series) -> str:
    if not len(values):
        return ""
    interval = bootstrap(values.to_numpy())
    text = _number(name, interval.mean)
    return text if interval.n < 2 else f"{text} ({_number(name, interval.low)} to {_number(name, interval.high)})"


def noisy_choice(study: Study) -> Table | None:
    """Accuracy with settings chosen on noisy validation labels, in each noise, and its difference to the clean one."""
    cells = study.parts.get("noisy choice", [])
    if not cells:
        return None
    runs = tables.frame(study.records, cells)
    runs = runs[runs["failed"].isna()]
    clean = tables.frame(study.records, study.parts["grid"])
    clean = clean[clean["failed"].isna()]
    noises = list(dict.fromkeys(zip(runs["mode"], runs["rate"], strict=True)))
    head = ["objective", "chosen on noisy labels", *(f"{mode} {100 * rate:g} %" if rate else "no flips"
            for mode, rate in noises), "minus the clean choice, paired"]  # fmt: skip
    rows = []
    for arm, group in runs.groupby("arm", sort=False):
        by_noise = {noise: part["accuracy"].to_numpy() for noise, part in group.groupby(["mode", "rate"])}
        both = pd.concat([group.assign(arm="noisy"), clean[clean["arm"] == arm].assign(arm="clean")])
        difference = bootstrap(differences(both, "noisy", "clean", "accuracy"))
        cells_of = [points(bootstrap(by_noise[noise])) if noise in by_noise else "" for noise in noises]
        settings = in_words(study.chosen_by["noisy"][str(arm)])
        rows.append([shown(str(arm)), settings, *cells_of, points(difference, signed=True)])
    return {"head": head, "rows": rows}


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings of an arm as text; those that are switches are left out."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
        if not isinstance(value, bool)
    )


def points(interval: Interval | None, signed: bool = False) -> str:
    """An interval of shares as text in percent, such as "71.2 (70.1 to 72.3)"."""
    if interval is None:
        return ""
    mean = f"{100 * interval.mean:{'+' if signed else ''}.1f}"
    return mean if interval.n < 2 else f"{mean} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
