"""`gapo train`: tune a language model on preference pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gapo._extras import named_extra


def main(arguments: Sequence[str]) -> int:
    """Run `gapo train` with `arguments`; returns the exit status."""
    with named_extra("gapo train", "cli"):
        from gapo.runs.train.train_config import ConfigError, make_parser, parse

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
