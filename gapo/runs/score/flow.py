"""From pairs and models to files of scores, measured batch by batch and resumed after an interruption.

Each measured batch is one line of a log. The scores are computed from the whole log at the end, so that a resumed call
writes the same bytes as an uninterrupted one. Settings and digests at the head of the log guard against mixing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from gapo.config import GAPOConfig
from gapo.files import JsonLines, read_lines, require_writable, write_text
from gapo.runs import held_out
from gapo.runs.config_bases import READING
from gapo.runs.errors import ConfigError
from gapo.runs.output.tables import Row, read_table, write_table
from gapo.runs.ranks import require_one
from gapo.runs.score.measure import Measure
from gapo.runs.score.score_config import ScoreConfig
from gapo.runs.score.score_page import write_page
from gapo.runs.score.score_table import digits, plan, score_rows, select_pairs
from gapo.runs.score.sources import (
    Source,
    find_sources,
    fingerprint,
    require_loadable,
    tokenizers_differ,
    tokenizers_fingerprint,
)
from gapo.runs.versions import versions

logger = logging.getLogger(__name__)

# Options that change no score, or whose content is compared instead of their name.
_NAMES = ("pairs", "output", "select_output", "model", "adapter", "checkpoints")
_FREE = (*_NAMES, *READING, "overwrite", "select", "strict", "device")
_DRAWS = 2  # version of the drawing of batches: a log of another version is not continued


def score(config: ScoreConfig, step: GAPOConfig | None = None) -> list[Row]:
    """Score the pairs, write the scores and their page, and the selection if one is asked for; returns the scores.

    Measurements stream to a log beside the output, so that the same call goes on after an interruption, and ends in
    the same bytes. Finished scores of the same settings are not measured again; with neither model nor checkpoints,
    settings left at their defaults are taken from them.

    Args:
        config: pairs, models and files.
        step: settings of the step; None for the defaults.

    Returns:
        `table.score_rows`.

    Raises:
        ConfigError: the models cannot be loaded, or the output holds scores of other settings.
        gapo.data.PairError: the pairs cannot be read.
        FloatingPointError: a margin or gradient is not finite, naming the rows of its batch.
    """
    step = GAPOConfig() if step is None else step
    if step.sft_weight:
        raise ConfigError(f"sft_weight changes no score: leave it at 0, got {step.sft_weight}")
    require_one("gapo score")
    files = Files(config.output)
    for path in (config.output, config.select_output):
        if path is not None:
            require_writable(Path(path).parent)
    reread = files.finished() and not (config.overwrite or config.model or config.checkpoints)
    if reread:
        config, step = _adopt(config, step, files.settings())
    sources = [] if reread else find_sources(config)
    if not reread:
        require_loadable(sources, config)
        if tokenizers_differ(sources, config):
            logger.warning(
                "the models have different tokenizers: nats per token are of other tokens for each, so compare the "
                "order of gaps, and take no mean over these models"
            )
    pairs = held_out.read_source(config, strict=config.strict, limit=config.limit)
    print(pairs.summary(), flush=True)
    settings = _settings(config, step, pairs.rows, sources)
    if files.finished() and not config.overwrite:
        earlier = files.settings()
        _require_same({**settings, **_of_measurement(earlier)} if reread else settings, earlier, files.output)
        scores = read_table(files.output)
        files.log.unlink(missing_ok=True)  # left by a kill between the scores and this line
    else:
        scores = _measure_all(pairs.rows, sources, settings, config, step, files)
    write_page(files.page, pairs.rows, scores, files.settings())
    if config.select is not None:
        write_table(Path(str(config.select_output)), select_pairs(pairs.rows, scores, *config.select))
    return scores


class Files:
    """The files of one scoring: the output, and beside it, named after it, settings, page and log."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.sidecar, self.page, self.log = (
            self.output.with_name(self.output.name + ending) for ending in (".json", ".html", ".progress")
        )

    def finished(self) -> bool:
        """Whether the output is there; it comes last, whole."""
        return self.output.exists()

    def settings(self) -> Row:
        """The settings of the finished scores. Raises ConfigError if the output is not of `gapo score`."""
        try:
            settings: Row = json.loads(self.sidecar.read_text(encoding="utf-8"))
            return settings
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.output} is there already, without the settings ({self.sidecar.name}) of a gapo score: give "
                "another output, or overwrite"
            ) from error

    def clear(self) -> None:
        """Remove all of them."""
        for path in (self.output, self.sidecar, self.page, self.log):
            path.unlink(missing_ok=True)


def _settings(config: ScoreConfig, step_config: GAPOConfig, pairs: Sequence[Row], sources: list[Source]) -> Row:
    """Everything that the scores depend on, and the name of the pairs."""
    measured = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {
        "pairs": config.pairs,
        "pairs_sha256": held_out.fingerprint(pairs),
        "models": [source.name for source in sources],
        "weights_sha256": fingerprint(sources),
        "tokenizers_sha256": tokenizers_fingerprint(sources, config),
        "draws": _DRAWS,
        **measured,
        **{name: value for name, value in asdict(step_config).items() if name != "sft_weight"},
    }


def _of_measurement(settings: Row) -> Row:
    """The settings of finished scores that pairs and options do not determine."""
    return {name: settings.get(name) for name in ("models", "weights_sha256", "tokenizers_sha256", "draws")}


def _adopt(config: ScoreConfig, step_config: GAPOConfig, earlier: Row) -> tuple[ScoreConfig, GAPOConfig]:
    """Both configurations, with the earlier value wherever they have the default."""

    def adopted(own: Any) -> dict[str, Any]:
        names = [f.name for f in fields(own) if f.name in earlier and f.name not in _FREE]
        defaults = {f.name: f.default for f in fields(own)}
        return {name: earlier[name] for name in names if getattr(own, name) == defaults[name]}

    return replace(config, **adopted(config)), replace(step_config, **adopted(step_config))


def _require_same(settings: Row, earlier: Row, where: Path) -> None:
    changed = [name for name in settings if name != "pairs" and settings[name] != earlier.get(name)]
    if changed:
        changes = ", ".join(f"{name}: {earlier.get(name)!r} -> {settings[name]!r}" for name in changed)
        raise ConfigError(f"{where} holds scores of other settings ({changes}): give another output, or overwrite")


def _measure_all(
    pairs: Sequence[Row],
    sources: list[Source],
    settings: Row,
    config: ScoreConfig,
    step_config: GAPOConfig,
    files: Files,
) -> list[Row]:
    """Measure what the log does not hold yet; write the settings, then the scores."""
    head, *lines = read_lines(files.log) or [{}]
    if config.overwrite:
        head, lines = {}, []
    elif head:
        _require_same(settings, head.get("settings", {}), files.log)
    batches = list(plan(len(pairs), config.batch_size, config.repeats, config.seed))
    if min(len(rows) for _, _, rows in batches) == 1:
        logger.warning(
            "a pair that has an anchor to itself has a gap that is its own sensitivity: give more batch_size"
        )
    log: JsonLines | None = None
    bar = tqdm(total=len(batches) * len(sources), initial=len(lines), desc="scoring", unit="batch")
    with bar, ExitStack() as stack:
        for place, source in enumerate(sources):
            first = len(lines) - place * len(batches)
            if first >= len(batches):
                continue
            measure = Measure(source, pairs, config, step_config)
            for batch in batches[first:]:
                line = {"step": len(lines) + 1, "checkpoint": source.name, **measure(batch)}
                if log is None:  # opened late: a call that cannot start leaves old files alone
                    log = _open_log(files, settings, len(lines), config.overwrite, new=not head)
                    stack.callback(log.close)
                log.write(line)
                lines.append(line)
                bar.update()
    scores = score_rows(pairs, lines, settings["models"], config.repeats)
    measured = {"versions": versions(), "first_order_ratio": _median(lines, "first_order_ratio")}
    write_text(files.sidecar, json.dumps({**settings, **measured}, indent=2) + "\n")
    write_table(files.output, scores)
    files.log.unlink(missing_ok=True)
    return scores


def _open_log(files: Files, settings: Row, done: int, overwrite: bool, new: bool) -> JsonLines:
    if overwrite:
        files.clear()
    log = JsonLines(files.log, until_step=done)
    if new:
        log.write({"settings": settings})
    return log


def _median(lines: Sequence[Row], name: str) -> float | None:
    values = [line[name] for line in lines if line[name] is not None]
    return digits(float(np.median(values))) if values else None
