"""The tables of a study as Markdown."""

from __future__ import annotations

import html
from typing import Any


def render_markdown(found: dict[str, Any]) -> str:
    """`found` of `report.content`, as text."""
    parts = ["# Study", *(f"- {html.escape(line, quote=False)}" for line in facts(found)), ""]  # names of files
    for table in found["accuracy"]:
        parts += [f"## {table['title']}: {table['what']}", "", _table(table), ""]
    parts += [f"## Weights and flips, {found['diagnosed_at']}", "", _table(found["diagnostics"]), ""]
    parts += [f"## Margins, log-probabilities and cost, {found['diagnosed_at']}", "", _table(found["logps"]), ""]
    for table in found["curves"]:
        parts += [f"## GAPO against {table['head'][0]}", "", _table(table), ""]
    if found["valuation"]:
        parts += ["## Which pairs are worth training on", "", _table(found["valuation"]), ""]
    parts += ["## Settings", "", _table(found["settings"]), ""]
    return "\n".join(parts)


def facts(found: dict[str, Any]) -> list[str]:
    """Lines on data, policy and runs, for the page and the Markdown."""
    config, known = found["config"], found["facts"]
    lines = [line.strip() for line in known["data"].splitlines()]
    lines += [
        f"policy: {known['parameters']:,} parameters; reward accuracy {100 * known['before']['accuracy']:.1f} % before "
        "training",
        f"a run: {config['train_pairs']} pairs, {config['epochs']} epoch(s), batches of {config['batch_size']}; "
        f"{config['seeds']} seeds, the same pairs, order and flips for every objective",
        "means with 95 % intervals over the seeds (expanded percentile bootstrap)",
        f"{found['runs']} runs beside the tries, {found['failed']} failed; {found['cpu_seconds']:,} CPU seconds of "
        "training",
        *(f"failed, and in no mean: {name}" for name in found.get("failed_runs", [])),
        *([known["others"]] if known.get("others") else []),
        f"gapo {known['versions']['gapo']}, commit {known['commit'] or 'unknown'}, Python "
        f"{known['versions']['python']}, torch {known['versions'].get('torch')}; this call took {known['seconds']:,} s "
        f"on {known['cores']} cores",
    ]
    return [*lines, *(f"left out: {reason}" for reason in found["left_out"])]


def _table(table: dict[str, Any]) -> str:
    rows = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
