"""`gapo study`: which objective bears flipped labels, on any pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gapo._extras import named_extra


def main(arguments: Sequence[str]) -> int:
    """Run `gapo study` with `arguments`; returns the exit status."""
    with named_extra("gapo study", "study"):
        from gapo.study.study_config import ConfigError, make_parser, parse

    if not arguments or "--help" in arguments or "-h" in arguments:
        make_parser().print_help()
        return 0
    try:
        config = parse(arguments)
    except ConfigError as error:
        print(f"gapo study: error: {error}. See gapo study --help", file=sys.stderr)
        return 2
    with named_extra("gapo study", "study"):
        from gapo.study.study import run_study

    run_study(config)
    print(f"report: {Path(config.output_dir) / 'study.html'}")
    return 0
