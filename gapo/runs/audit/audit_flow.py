"""From pairs to a ranked table, a page and cleaned pairs: measured policy by policy, resumed after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from gapo.data import Pairs, generate_pairs
from gapo.data.layouts import parse_columns
from gapo.data.reading import pairs_of
from gapo.files import write_bytes
from gapo.runs import held_out
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.audit_files import AuditFiles, require_files
from gapo.runs.audit.audit_report import result_of, write_cleaned, write_result
from gapo.runs.audit.audit_result import AuditResult, Row
from gapo.runs.audit.combination import Scores, combine
from gapo.runs.audit.folds import divided, prompt_groups
from gapo.runs.audit.judging import Judges, Member
from gapo.runs.claims import Claims
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import require_model
from gapo.runs.output.tensors import open_tensors
from gapo.runs.score.sources import Source, fingerprint, tokenizers_fingerprint
from gapo.runs.workers import Workers, one_thread, run_missing

_FORMAT = 2  # of a measurement: raised when its meaning changes, so that old files are not taken for it


def audit(pairs: str | Path | Iterable[Mapping[str, Any]], **settings: Any) -> AuditResult:
    """What `gapo.audit` runs; arguments and errors are its."""
    accepted = [f.name for f in fields(AuditConfig) if f.name != "pairs"]
    if unknown := [name for name in settings if name not in accepted]:
        raise ConfigError(f"audit has no setting {unknown[0]!r}; accepted are {', '.join(accepted)}")
    with TemporaryDirectory(prefix="gapo-audit-") as folder:
        files = {"output": str(Path(folder, "audit.jsonl")), "cache_dir": str(Path(folder, "cache"))}
        settings = {**(files if "output" not in settings else {}), "workers": 1, **settings}
        if isinstance(pairs, (str, Path)):
            return run_audit(AuditConfig(pairs=str(pairs), **settings))
        config = AuditConfig(pairs="pairs in memory", **settings)
        checked = pairs_of(
            pairs,
            source=config.pairs,
            strict=config.strict,
            limit=config.limit,
            columns=parse_columns(config.columns),
            preference=config.preference,
        )
        return run_audit(config, checked)


def run_audit(config: AuditConfig, pairs: Pairs | None = None) -> AuditResult:
    """Audit the pairs of `config`, or `pairs`, and write what it names.

    Measurements are kept beside the output, one file for each policy. The same call goes on after an interruption, and
    copies of it share the work. Finished measurements are not made again: other options of cleaning, and more seeds,
    start from them.

    Raises:
        ConfigError: the settings cannot be used, or differ from those that the audit was begun with.
        gapo.data.PairError: the pairs cannot be read.
        FloatingPointError: a policy's log-probabilities are not finite.
    """
    began = time.monotonic()
    if pairs is None:
        require_files(config)
        if config.model != "tiny":
            require_model(config.model, tokenizer=config.tokenizer)
        pairs = _read(config)
    print(pairs.summary(), flush=True)
    groups = prompt_groups(pairs.rows)
    divided(groups, config.folds, np.random.default_rng(0))  # raises where it cannot be
    files, digest = AuditFiles(config.output), held_out.fingerprint(pairs.rows)
    marks = {} if config.apply is None else _marks(config.apply, digest, len(pairs.rows))
    with Claims() as claims:
        files.begin(_settings(config, digest), config.overwrite, claims)
        scores = _measured(config, pairs, files, claims)
    finding = combine(scores.features(), groups, config.seed)
    result = result_of(config, pairs, scores, finding, marks, digest=digest, seconds=time.monotonic() - began)
    write_result(files, result)
    if config.cleans:
        print(write_cleaned(config, pairs.rows, finding, marks), flush=True)
    return result


def _marks(path: str, digest: str, pairs: int) -> dict[int, str]:
    from gapo.runs.audit.marks import read_marks

    marks: dict[int, str] = read_marks(path, digest, pairs=pairs)
    return marks


def _read(config: AuditConfig) -> Pairs:
    if config.pairs == "demo":
        rows = generate_pairs(config.demo_size, seed=config.seed)[: config.limit]
        return Pairs(rows, source="generated demonstration pairs")
    return held_out.read_source(config, strict=config.strict, limit=config.limit)


def _settings(config: AuditConfig, digest: str) -> Row:
    """All that a measurement depends on."""
    sources = [] if config.model == "tiny" else [Source(config.model, config.model)]
    of_model = {
        "weights_sha256": fingerprint(sources) if sources else None,
        "tokenizers_sha256": tokenizers_fingerprint(sources, config) if sources else None,
    }
    settings = {"format": _FORMAT, "pairs_sha256": digest, **of_model, **config.measured()}
    plain: Row = json.loads(json.dumps(settings))
    return plain


def _measured(config: AuditConfig, pairs: Pairs, files: AuditFiles, claims: Claims) -> Scores:
    """What every policy says; those are trained whose measurements are not there."""
    members = [Member(seed, fold) for seed in range(config.seeds) for fold in range(config.folds)]
    tasks = {files.part(member): member for member in members}
    if not files.start.exists() or not all(path.exists() for path in tasks):
        threads = one_thread()
        try:
            with claims.alone(files.start, "the model at the start"):
                judges = Judges(config, pairs.rows)  # what it computes once is kept, and the workers read it
                write_bytes(files.start, save({"logps": judges.start, "counts": judges.counts}))
            with Workers(config.workers, _load, (config, pairs.rows), here=judges.measure) as workers:
                run_missing(tasks, workers, claims, lambda path, x: write_bytes(path, save(x)), "auditing")
        finally:
            torch.set_num_threads(threads)
    parts = {}
    for path, member in tasks.items():
        with open_tensors(path) as file:
            parts[member] = {name: file.get_tensor(name) for name in ("rows", "logps", "anchor_logps")}
    with open_tensors(files.start) as file:
        return Scores.of(parts, file.get_tensor("logps"), file.get_tensor("counts"))


def _load(config: AuditConfig, rows: Any) -> Any:
    return Judges(config, rows).measure
