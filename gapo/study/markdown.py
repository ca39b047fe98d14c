"""The tables of a study as Markdown."""

from __future__ import annotations

import html
from typing import Any

_ASIDES = (
    "A pair is fitted if its margin is above 0 as it is labelled, so a fitted flip is a wrong label that was learned."
)
_NOISY = (
    "Who has noisy labels chooses by noisy labels. The same tries, judged on validation pairs of which the same share "
    "is flipped."
)
_PAIRED = (
    "Points of reward accuracy on clean test pairs, seed by seed on the same pairs and flips, with the standard error "
    "over seeds."
)


def render_markdown(values: dict[str, Any]) -> str:
    """`found` of `report.content`, as text."""
    parts = [
        "# Study",
        "",
        values["verdict"],
        "",
        *(f"- {html.escape(line, quote=False)}" for line in facts(values)),
        "",
    ]  # names of files
    for table in values["accuracy"]:
        parts += [f"## {table['title']}: {table['what']}", "", _table(table), ""]
    if table := values.get("differences"):
        parts += [f"## {table['title']}", "", table["text"], "", _table(table), ""]
    parts += [f"## Weights and flips, {values['diagnosed_at']}", "", _table(values["diagnostics"]), ""]
    parts += [f"## Margins, log-probabilities and cost, {values['diagnosed_at']}", "", _table(values["logps"]), ""]
    for table in values["curves"]:
        parts += [f"## GAPO against {table['head'][0]}", "", _table(table), ""]
    if values["valuation"]:
        parts += ["## Which pairs are worth training on", "", _table(values["valuation"]), ""]
    parts += [f"## What else the runs did, {values['diagnosed_at']}", "", _ASIDES, "", _table(values["asides"]), ""]
    if table := values["noisy_choice"]:
        parts += ["## Settings chosen on noisy labels", "", _NOISY, "", _table(table), ""]
    parts += ["## Settings", "", _table(values["settings"]), ""]
    return "\n".join(parts)


def paired_text(detectable: float | None) -> str:
    """What a table of paired differences shows, and how small a difference it can show; None where that is unknown."""
    if detectable is None:
        return _PAIRED
    return f"{_PAIRED} Four of five such studies would find a true difference of {100 * detectable:.1f} points."


def facts(values: dict[str, Any]) -> list[str]:
    """Lines on data, policy and runs, for the page and the Markdown."""
    config, run = values["config"], values["facts"]
    lines = [line.strip() for line in run["data"].splitlines()]
    lines += [
        f"policy: {run['parameters']:,} parameters, {run['trained']:,} of them trained; reward accuracy "
        f"{100 * run['before']['accuracy']:.1f} % before training",
        f"a run: {config['train_pairs']} pairs, {config['epochs']} epoch(s), batches of {config['batch_size']}; "
        f"{config['seeds']} seeds, the same pairs, order and flips for every objective",
        "means with 95 % intervals over the seeds (expanded percentile bootstrap)",
        f"{values['runs']} runs beside the tries, {values['failed']} failed; {values['cpu_seconds']:,} CPU seconds of "
        "training",
        *(f"failed, and in no mean: {name}" for name in values.get("failed_runs", [])),
        *([run["others"]] if run.get("others") else []),
        f"gapo {run['versions']['gapo']}, commit {run['commit'] or 'unknown'}, Python "
        f"{run['versions']['python']}, torch {run['versions'].get('torch')}; this call took {run['seconds']:,} s "
        f"on {run['cores']} cores",
    ]
    return [*lines, *(f"left out: {reason}" for reason in values["left_out"])]


def _table(table: dict[str, Any]) -> str:
    rows = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
