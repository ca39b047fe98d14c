"""`gapo score`: margin, anchor margin, gap and weight of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo.config import GAPOConfig

if TYPE_CHECKING:
    from gapo.runs.score.score_config import ScoreConfig


def main(arguments: Sequence[str]) -> int:
    """Run `gapo score` with `arguments`; returns the exit status."""
    config, step = parse(arguments)
    with named_extra("gapo score", "cli"):
        from gapo.runs.score.flow import Files, score

    scores = score(config, step)
    files = Files(config.output)
    print(f"{len(scores)} scores: {files.output}; settings {files.sidecar.name}, page {files.page}")
    if config.select is not None:
        which, share = config.select
        print(f"selected: the {share:.4g} of the pairs with the {which} gaps, {config.select_output}")
    return 0


def make_parser() -> Any:
    """The parser of `gapo score`: every field of `ScoreConfig`, and those of `gapo.GAPOConfig` that change a score."""
    with named_extra("gapo score", "cli"):
        from jsonargparse import ArgumentParser

        from gapo.runs.options import add_fields
        from gapo.runs.score.score_config import ScoreConfig

    parser = ArgumentParser(
        prog="gapo score",
        description="Measure the margin, the anchor margin, the anchor gap and the weight of each preference pair.",
        epilog="example: gapo score pairs.jsonl --model runs/mine/model --rho 0.05 --repeats 3 --output scores.jsonl "
        "--select lowest 0.7 --select_output kept.jsonl",
    )
    _add_arguments(parser, ScoreConfig)
    add_fields(parser, GAPOConfig, skip={"sft_weight"})
    return parser


def parse(arguments: Sequence[str]) -> tuple[ScoreConfig, GAPOConfig]:
    """The command line as the two configurations; where it is none, the process ends with status 2, saying why."""
    parser = make_parser()
    from gapo.runs.score.score_config import ScoreConfig

    found = parser.parse_args(list(arguments))
    try:
        config = ScoreConfig(**{f.name: found[f.name] for f in fields(ScoreConfig)} | _converted(found))
        step = GAPOConfig(**{f.name: found[f.name] for f in fields(GAPOConfig) if f.name != "sft_weight"})
    except ValueError as error:
        parser.error(str(error))
    return config, step


def _add_arguments(parser: Any, config: type) -> None:
    """The fields of `config`: by hand those that a command line spells in its own way, the rest from the docstring."""
    parser.add_argument("pairs", help="a file (.json, .jsonl, each also .gz, .csv, .parquet) or the name of a data set")
    parser.add_argument(
        "--model", nargs="+", action="extend", default=[], help="one model or several: folders, Hub names"
    )
    parser.add_argument("--checkpoints", "--epochs-of-checkpoints", help="a training's folder: score each checkpoint-*")
    parser.add_argument(
        "--select", nargs=2, metavar=("WHICH", "SHARE"), help="lowest or highest gaps, share of the pairs"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of leaving it out")
    parser.add_argument("--overwrite", action="store_true", help="score anew over scores that are there already")
    by_hand = {"pairs", "model", "checkpoints", "select", "strict", "overwrite"}
    parser.add_class_arguments(config, skip=by_hand)


def _converted(found: Any) -> dict[str, Any]:
    """Lists of the command line as `ScoreConfig` takes them."""
    select = found["select"]
    if select is not None:
        try:
            select = (select[0], float(select[1]))
        except ValueError:
            raise ValueError(
                f"select must be lowest or highest and a share in (0, 1], got {' '.join(select)}"
            ) from None
    return {"model": tuple(found["model"]), "select": select}
