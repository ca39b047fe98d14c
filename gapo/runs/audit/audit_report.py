"""What an audit tells and writes: its result, the table, the page, the cleaned pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import gapo
from gapo.data import Pairs
from gapo.files import write_text
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.audit_files import AuditFiles, write_ranking
from gapo.runs.audit.audit_result import AuditResult, Row, rounded
from gapo.runs.audit.cleaned import DROP, FLIP, actions, cleaned_rows
from gapo.runs.audit.combination import Finding, Scores, detection, fifths_of_weight
from gapo.runs.errors import ConfigError
from gapo.runs.output.tables import write_table
from gapo.runs.versions import versions

_ADVICE = {
    True: "try a pretrained model (--model FOLDER), more pairs, or more --epochs",
    False: "try more pairs, more --epochs, more --train_layers, or a larger model",
}


def result_of(
    config: AuditConfig,
    pairs: Pairs,
    scores: Scores,
    finding: Finding,
    marks: Mapping[int, str],
    *,
    digest: str,
    seconds: float,
) -> AuditResult:
    """The result of measurements.

    Args:
        config: of the audit.
        pairs: that were audited.
        scores: of the policies.
        finding: what they say together.
        marks: a person's, by the place of a pair.
        digest: of the pairs.
        seconds: that this call took so far.
    """
    rows = _table(pairs.rows, pairs.lines, scores, finding, marks)
    low, high = finding.model.share_interval()
    share = {"mean": finding.model.share, "low": low, "high": high}
    flags = [row.get("is_flipped") for row in pairs.rows]
    weight = gapo.weights(scores.gaps.mean(0), backend="numpy")
    summary: Row = {
        "pairs": len(rows),
        "source": Path(pairs.source).name,
        "table": Path(config.output).name,
        "digest": digest,
        "learned": finding.learned,
        "share": share if finding.learned else None,
        "expected_wrong": round(float(finding.p_wrong.sum()), 1) if finding.learned else None,
        "held_out_accuracy": finding.accuracy,
        "held_out_low": finding.low,
        "held_out_high": finding.high,
        "chosen_longer": scores.chosen_longer(),
        "advice": None if finding.learned else _ADVICE[config.model == "tiny"],
        "model": config.model,
        "folds": config.folds,
        "seeds": config.seeds,
        "fifths": fifths_of_weight(weight, finding.p_wrong) if finding.learned else None,
        "settings": config.measured(),
        "versions": versions(),
        "seconds": round(seconds, 1),
    }
    if finding.learned and all(flag is not None for flag in flags):
        summary["detection"] = detection(scores, finding.p_wrong, np.array(flags, dtype=bool))
    return AuditResult(rows, summary)


def _table(
    rows: Sequence[Row], lines: Sequence[int], scores: Scores, finding: Finding, marks: Mapping[int, str]
) -> list[Row]:
    margin, gap = scores.margin, scores.gaps.mean(0)
    weight = gapo.weights(gap, backend="numpy")
    against = (scores.margins.mean(1) < 0).sum(0)
    order = np.argsort(-finding.p_wrong, kind="stable") if finding.learned else np.arange(len(rows))
    out: list[Row] = []
    for rank, i in enumerate(map(int, order), start=1):
        row = rows[i]
        out.append(
            {
                "rank": rank if finding.learned else None,
                "row": i,
                "line": int(lines[i]) if len(lines) else None,
                "id": row.get("id"),
                "p_wrong": rounded(finding.p_wrong[i]) if finding.learned else None,
                "margin": rounded(margin[i]),
                "gap": rounded(gap[i]),
                "weight": rounded(weight[i]),
                "against": int(against[i]),
                "policies": len(scores.margins),
                "prompt": row["prompt"],
                "chosen": row["chosen"],
                "rejected": row["rejected"],
                "is_flipped": row.get("is_flipped"),
                "mark": marks.get(i),
            }
        )
    return out


def write_result(files: AuditFiles, result: AuditResult) -> None:
    """Write settings, table and page. Raises OSError where that fails; what was there is then as it was."""
    from gapo.runs.audit.page import write_page

    write_text(files.sidecar, json.dumps(result.summary, indent=2) + "\n")
    write_ranking(files.output, result.rows)
    write_page(files.page, result)


def write_cleaned(config: AuditConfig, rows: Sequence[Row], finding: Finding, marks: Mapping[int, str]) -> str:
    """Write the cleaned pairs; returns a line on them.

    Raises:
        ConfigError: the policies have not learned the pairs, and more is asked for than to follow marks.
    """
    by_probability = any(value is not None for value in (config.drop, config.flip, config.threshold))
    if by_probability and not finding.learned:
        raise ConfigError(
            "no pair is dropped or flipped, since the policies did not learn these pairs: "
            f"{_ADVICE[config.model == 'tiny']}"
        )
    action = actions(config, finding.p_wrong, marks, finding.model.share)
    cleaned = cleaned_rows(rows, action, finding.p_wrong if finding.learned else None)
    write_table(Path(str(config.clean_output)), cleaned)
    counts = Counter(action.tolist())
    return f"{len(cleaned)} pairs, {counts[FLIP]} of them flipped, {counts[DROP]} left out: {config.clean_output}"
