"""`gapo score`: margin, anchor margin, gap and weight of each pair."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo.config import OF_THE_UPDATE, GAPOConfig
from gapo.runs.errors import ConfigError

if TYPE_CHECKING:
    from gapo.runs.score.score_config import ScoreConfig


def main(arguments: Sequence[str]) -> int:
    """Run `gapo score` with `arguments`; returns the exit status."""
    try:
        config, step_config, adopted = _parsed(arguments)
    except ConfigError as error:
        print(f"gapo score: error: {error}. See gapo score --help", file=sys.stderr)
        return 2
    with named_extra("gapo score", "cli"):
        from gapo.runs.score.score_files import require_files

    require_files(config)  # before seconds of imports
    if adopted:
        print(adopted, flush=True)
    with named_extra("gapo score", "cli"):
        from gapo.runs.score.flow import Files, score

    scores = score(config, step_config)
    files = Files(config.output)
    if config.shard is not None and not scores:
        merge = f"gapo score {config.pairs} --output {config.output} --merge"
        print(f"shard {config.shard} is measured; when all are: {merge}")
        return 0
    print(f"{len(scores)} scores: {files.output}; settings {files.sidecar.name}, page {files.page}")
    if config.select is not None:
        which, share = config.select
        print(f"selected: the {share:.4g} of the pairs with the {which} gaps, {config.select_output}")
    return 0


def make_parser() -> Any:
    """The parser of `gapo score`: every field of `ScoreConfig`, and those of `gapo.GAPOConfig` that change a score."""
    with named_extra("gapo score", "cli"):
        from gapo.runs.options import help_of, parser_with_first
        from gapo.runs.score.score_config import ScoreConfig

    parser = parser_with_first(
        "pairs",
        (ScoreConfig, GAPOConfig),
        by_hand={"model", "checkpoints", "select", "shard", *OF_THE_UPDATE},
        prog="gapo score",
        description="Measure the margin, the anchor margin, the anchor gap and the weight of each preference pair.",
        epilog="example: gapo score pairs.jsonl --model runs/mine/model --rho 0.05 --repeats 3 --output scores.jsonl "
        "--select lowest 0.7 --select_output kept.jsonl",
    )
    # Those that a command line spells in its own way.
    texts = help_of(ScoreConfig)
    parser.add_argument("--model", nargs="+", action="extend", default=[], help=texts["model"])
    parser.add_argument("--checkpoints", "--epochs-of-checkpoints", help=texts["checkpoints"])
    parser.add_argument(
        "--select", nargs=2, metavar=("WHICH", "SHARE"), help="lowest or highest gaps, share of the pairs"
    )
    of_environment = " In a SLURM job array and under torchrun it is theirs; 0/1 is the whole there too."
    parser.add_argument("--shard", metavar="I/N", help=texts["shard"] + of_environment)
    return parser


def parse(arguments: Sequence[str]) -> tuple[ScoreConfig, GAPOConfig]:
    """The command line as the two configurations. Raises ConfigError for what is not accepted."""
    return _parsed(arguments)[:2]


def _parsed(arguments: Sequence[str]) -> tuple[ScoreConfig, GAPOConfig, str]:
    """The two configurations, and one line on what they take from the runs of the models."""
    parser = make_parser()
    from gapo.runs import options
    from gapo.runs.score.run_settings import settings_of_runs
    from gapo.runs.score.score_config import ScoreConfig

    with options.option_errors(options.keys_of(parser)):
        values = options.stated(parser, list(arguments))
        values |= {"model": tuple(values.get("model", ())), "select": _selection(values.get("select"))}
        values["shard"] = _shard(values.get("shard"), merge=values.get("merge", False))
        names = [*values["model"], *filter(None, (values.get(name) for name in ("adapter", "checkpoints")))]
        adopted, line = settings_of_runs(names, values["pairs"], values)
        config, step_config = options.instances_of({**adopted, **values}, (ScoreConfig, GAPOConfig))
    return config, step_config, line


def _shard(text: str | None, merge: bool) -> str | None:
    """`--shard`, or what the environment says, as `ScoreConfig` takes it; the whole, 0/1, is none."""
    from gapo.runs.score.shards import shard_of_environment

    if text is None and not merge and (started := shard_of_environment(os.environ)) is not None:
        shard, names = started
        print(f"shard {shard}, by {names}; --shard 0/1 measures the whole here", flush=True)
        return str(shard)
    return None if text == "0/1" else text


def _selection(words: list[str] | None) -> tuple[str, float] | None:
    """`--select WHICH SHARE` as `ScoreConfig` takes it."""
    if words is None:
        return None
    try:
        return words[0], float(words[1])
    except ValueError:
        raise ValueError(f"select must be lowest or highest and a share in (0, 1], got {' '.join(words)}") from None
