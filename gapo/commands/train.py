"""`gapo train`: tune a language model on preference pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo.config import GAPOConfig
from gapo.runs.errors import ConfigError

if TYPE_CHECKING:
    from gapo.runs.train.train_config import TrainConfig


def main(arguments: Sequence[str]) -> int:
    """Run `gapo train` with `arguments`; returns the exit status."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        make_parser().print_help()
        return 0
    try:
        run, step = parse(arguments)
    except ConfigError as error:
        print(f"gapo train: error: {error}. See gapo train --help", file=sys.stderr)
        return 2
    with named_extra("gapo train", "cli"):
        from gapo.runs import ranks
        from gapo.runs.train.train import train

    summary = train(run, step)
    if not ranks.is_first():
        return 0
    accuracy = "eval_rewards/accuracies"
    print(f"reward accuracy on held-out pairs: {summary['before'][accuracy]:.4f} -> {summary['after'][accuracy]:.4f}")
    print(f"report: {Path(run.output_dir) / 'report.html'}")
    return 0


def make_parser() -> Any:
    """The parser of `gapo train`: every field of `TrainConfig` and `GAPOConfig`, with help from their docstrings."""
    with named_extra("gapo train", "cli"):
        from gapo.runs.options import parser_of
        from gapo.runs.train.train_config import TrainConfig

    return parser_of(
        (TrainConfig, GAPOConfig),
        prog="gapo train",
        description="Tune a language model on preference pairs with GAPO.",
        epilog="example: gapo train examples/demo.yaml --rho 0.05 --output_dir runs/rho-0.05",
    )


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, GAPOConfig]:
    """`[CONFIG.yaml] [--key value ...]` as the two configurations; later ones win.

    Raises:
        ConfigError: a key or a value is not accepted, or the file cannot be read. YAML is read safely: no tag runs
            code.
    """
    parser = make_parser()
    from gapo.runs.options import parse_fields
    from gapo.runs.train.train_config import TrainConfig, require_loss_settings

    run, step = parse_fields(parser, arguments, (TrainConfig, GAPOConfig), require_loss_settings)
    return run, step
