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

from gapo.config import OF_THE_UPDATE, GAPOConfig, plain
from gapo.files import JsonLines, read_lines, write_text
from gapo.runs import held_out
from gapo.runs.claims import Claims, owner_of
from gapo.runs.config_bases import READING
from gapo.runs.errors import ConfigError, changes
from gapo.runs.output.tables import Row, read_table, write_table
from gapo.runs.score.measure import Measure
from gapo.runs.score.score_config import ScoreConfig
from gapo.runs.score.score_files import require_files
from gapo.runs.score.score_page import write_page
from gapo.runs.score.score_table import digits, plan, score_rows, select_pairs
from gapo.runs.score.shards import Shard, merge_heads, merged_lines, require_batches, shards_beside
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
_FREE = (*_NAMES, *READING, "shard", "merge", "overwrite", "select", "strict", "device")
_DRAWS = 2  # version of the drawing of batches: a log of another version is not continued


def score(config: ScoreConfig, step: GAPOConfig | None = None) -> list[Row]:
    """Score the pairs, write the scores and their page, and the selection if one is asked for; returns the scores.

    Measurements stream to a log beside the output, so that the same call goes on after an interruption, and ends in
    the same bytes. Finished scores of the same settings are not measured again; with neither model nor checkpoints,
    settings left at their defaults are taken from them. So it is with shards that are merged.

    Args:
        config: pairs, models and files.
        step: settings of the step; None for the defaults.

    Returns:
        `table.score_rows`; of one shard alone, none.

    Raises:
        ConfigError: the models cannot be loaded, or the output holds scores of other settings.
        gapo.data.PairError: the pairs cannot be read.
        FloatingPointError: a margin or gradient is not finite, naming the rows of its batch.
    """
    step = GAPOConfig() if step is None else step
    for name in OF_THE_UPDATE:
        if getattr(step, name) != getattr(GAPOConfig, name):
            raise ConfigError(
                f"{name} changes no score: leave it at {getattr(GAPOConfig, name)!r}, got {getattr(step, name)!r}"
            )
    files = Files(config.output)
    require_files(config)
    finished = files.finished() and not config.overwrite
    head = merge_heads(files.output)[0] if config.merge and not finished else {"settings": None}
    earlier = files.settings() if finished else head["settings"]
    if is_adopted := earlier is not None and not (config.model or config.checkpoints):
        config, step = _adopt(config, step, earlier or {})
    sources = [] if is_adopted else find_sources(config)
    if not is_adopted:
        require_loadable(sources, config)
        if tokenizers_differ(sources, config):
            logger.warning(
                "the models have different tokenizers: nats per token are of other tokens for each, so compare the "
                "order of gaps, and take no mean over these models"
            )
    pairs = held_out.read_source(config, strict=config.strict, limit=config.limit)
    print(pairs.summary(), flush=True)
    settings = _settings(config, step, pairs.rows, sources)
    if earlier is not None:
        settings |= _of_measurement(earlier) if is_adopted else {}
        _require_same(settings, earlier, files.output)
    if finished:
        scores = read_table(files.output)
        if config.merge:
            for log in shards_beside(files.output).values():
                _require_same(read_lines(log)[0]["settings"], earlier or {}, files.output)
            files.clear_shards()
        files.log.unlink(missing_ok=True)  # left by a kill between the scores and this line
    elif config.merge:
        batches = len(list(plan(len(pairs.rows), config.batch_size, config.repeats, config.seed)))
        lines = merged_lines(files.output, batches, len(settings["models"]))
        scores = _write(pairs.rows, lines, {**settings, "versions": head["versions"]}, config, files)
    elif config.shard is not None:
        with Claims() as claims:
            _measure_shard(claims, pairs.rows, sources, settings, config, step, files)
        return []
    else:
        _require_no_shards(files, config)
        lines = _measured(pairs.rows, sources, settings, config, step, files)
        scores = _write(pairs.rows, lines, {**settings, "versions": versions()}, config, files)
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
        self.clear_shards()

    def clear_shards(self) -> None:
        """Remove the logs of shards."""
        for path in shards_beside(self.output).values():
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
        **{name: value for name, value in plain(step_config).items() if name not in OF_THE_UPDATE},
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
    if changed := changes([name for name in settings if name != "pairs"], earlier, settings):
        raise ConfigError(f"{where} holds scores of other settings ({changed}): give another output, or overwrite")


def _require_no_shards(files: Files, config: ScoreConfig) -> None:
    """Raise ConfigError where shards lie beside the output of a whole run: an element of an array was run again."""
    if not config.overwrite and (shards := shards_beside(files.output)):
        names = ", ".join(map(str, shards))
        raise ConfigError(f"beside {files.output} are shards ({names}): give --shard I/N, --merge or --overwrite")


def _measure_shard(
    claims: Claims, pairs: Sequence[Row], sources: list[Source], settings: Row, config: ScoreConfig, step: GAPOConfig,
    files: Files,
) -> None:  # fmt: skip
    """Measure what the log of `config.shard` does not hold yet."""
    shard = Shard.of(str(config.shard))
    log = shard.log(files.output)
    if not claims.take(log):
        raise ConfigError(f"shard {shard} of {files.output} is being measured by {owner_of(log)}: give each its own")
    _measured(pairs, sources, settings, config, step, files, shard)


def _measured(
    pairs: Sequence[Row], sources: list[Source], settings: Row, config: ScoreConfig, step_config: GAPOConfig,
    files: Files, shard: Shard | None = None,
) -> list[Row]:  # fmt: skip
    """Every measurement of the whole or of one shard: those of its log, and those that it did not hold yet."""
    path, part = (files.log, Shard()) if shard is None else (shard.log(files.output), shard)
    head, *lines = read_lines(path) or [{}]
    if config.overwrite:
        head, lines = {}, []
    elif head:
        _require_same(settings, head.get("settings", {}), path)
    batches = list(plan(len(pairs), config.batch_size, config.repeats, config.seed))
    require_batches(part, batches)
    if min(len(rows) for _, _, rows in batches) == 1:
        logger.warning(
            "a pair that has an anchor to itself has a gap that is its own sensitivity: give more batch_size"
        )
    steps = part.steps(len(batches), len(sources))
    log: JsonLines | None = None
    measure: tuple[Source, Measure] | None = None
    bar = tqdm(total=len(steps), initial=len(lines), desc="scoring", unit="batch")
    with bar, ExitStack() as stack:
        for number in steps[len(lines) :]:
            source, batch = sources[(number - 1) // len(batches)], batches[(number - 1) % len(batches)]
            if measure is None or measure[0] != source:
                measure = None  # its model goes before the next one comes
                measure = source, Measure(source, pairs, config, step_config)
            line = {"step": number, "checkpoint": source.name, **measure[1](batch)}
            if log is None:  # opened late: a call that cannot start leaves old files alone
                if config.overwrite and shard is None:
                    files.clear()
                log = JsonLines(path, until_step=lines[-1]["step"] if lines else 0)
                stack.callback(log.close)
                if not head:
                    log.write({"settings": settings} | ({} if shard is None else {"versions": versions()}))
            log.write(line)
            lines.append(line)
            bar.update()
    return lines


def _write(pairs: Sequence[Row], lines: list[Row], settings: Row, config: ScoreConfig, files: Files) -> list[Row]:
    """Write the settings, then the scores; returns the scores. The logs are then of no more use."""
    scores = score_rows(pairs, lines, settings["models"], config.repeats)
    ratio = {"first_order_ratio": _median(lines, "first_order_ratio")}
    write_text(files.sidecar, json.dumps({**settings, **ratio}, indent=2) + "\n")
    write_table(files.output, scores)
    files.log.unlink(missing_ok=True)
    files.clear_shards()
    return scores


def _median(lines: Sequence[Row], name: str) -> float | None:
    values = [line[name] for line in lines if line[name] is not None]
    return digits(float(np.median(values))) if values else None
