"""`gapo study`: which objective bears flipped labels, on any pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run `gapo study` with `arguments`; returns the exit status."""
    try:
        from gapo.experiments.study.config import ConfigError, make_parser, parse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'gapo study needs {error.name}: pip install "gapo[cli]"', name=error.name) from error

    if not arguments or "--help" in arguments or "-h" in arguments:
        make_parser().print_help()
        return 0
    try:
        config = parse(arguments)
    except ConfigError as error:
        print(f"gapo study: error: {error}. See gapo study --help", file=sys.stderr)
        return 2
    from gapo.experiments.study.study import run_study

    run_study(config)
    print(f"report: {Path(config.output_dir) / 'study.html'}")
    return 0
