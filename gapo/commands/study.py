"""`gapo study`: which objective bears flipped labels, on any pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo.runs.errors import ConfigError

if TYPE_CHECKING:
    from gapo.study.study_config import StudyConfig


def main(arguments: Sequence[str]) -> int:
    """Run `gapo study` with `arguments`; returns the exit status."""
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


def make_parser() -> Any:
    """The parser of `gapo study`: every field of `StudyConfig`, with help from its docstring."""
    with named_extra("gapo study", "study"):
        from gapo.runs.options import parser_of
        from gapo.study.study_config import StudyConfig

    return parser_of(
        (StudyConfig,),
        prog="gapo study",
        description="Train every objective on pairs with flipped labels, and report which of them bears the noise.",
        epilog="example: gapo study examples/study_small.yaml --workers 2 --output_dir runs/my-study",
    )


def parse(arguments: Sequence[str]) -> StudyConfig:
    """`[CONFIG.yaml] [--key value ...]` as the configuration; later ones win. Raises ConfigError for what cannot be."""
    parser = make_parser()
    from gapo.runs.options import parse_fields
    from gapo.study.study_config import StudyConfig

    (config,) = parse_fields(parser, arguments, (StudyConfig,))
    assert isinstance(config, StudyConfig)
    return config
