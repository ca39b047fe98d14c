"""`gapo audit`: which labels of preference pairs are probably wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo._fields import docstring_entries
from gapo.runs.errors import ConfigError

if TYPE_CHECKING:
    from gapo.runs.audit.audit_config import AuditConfig

_SWITCHES = ("strict", "streaming", "overwrite")


def main(arguments: Sequence[str]) -> int:
    """Run `gapo audit` with `arguments`; returns the exit status."""
    if not arguments:
        make_parser().print_help()
        return 0
    try:
        config = parse(arguments)
    except ConfigError as error:
        print(f"gapo audit: error: {error}. See gapo audit --help", file=sys.stderr)
        return 2
    with named_extra("gapo audit", "cli"):
        from gapo.runs.audit.audit_files import AuditFiles, require_files

    require_files(config)  # before seconds of imports
    with named_extra("gapo audit", "cli"):
        from gapo.runs.audit.audit_flow import run_audit

    result = run_audit(config)
    files = AuditFiles(config.output)
    print(f"{result} Ranked in {files.output}, page {files.page}")
    return 0


def make_parser() -> Any:
    """The parser of `gapo audit`: every field of `AuditConfig`, with help from its docstring."""
    with named_extra("gapo audit", "cli"):
        from jsonargparse import ArgumentParser

        from gapo.runs.audit.audit_config import AuditConfig
        from gapo.runs.options import add_fields

    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        prog="gapo audit",
        description="Rank preference pairs by the probability that their label is wrong: small policies judge pairs "
        "that they did not train on.",
        epilog="example: gapo audit pairs.jsonl --output audit.parquet --drop auto --clean_output kept.jsonl",
    )
    help_of = docstring_entries(AuditConfig.__doc__ or "")
    parser.add_argument("pairs", help=help_of["pairs"])
    from gapo.runs.config_bases import PairSource

    help_of = docstring_entries(PairSource.__doc__ or "") | help_of
    for switch in _SWITCHES:
        parser.add_argument(f"--{switch}", action="store_true", help=help_of[switch])
    add_fields(parser, AuditConfig, skip={"pairs", *_SWITCHES})
    return parser


def parse(arguments: Sequence[str]) -> AuditConfig:
    """The command line as the configuration. Raises ConfigError for what is not accepted."""
    parser = make_parser()
    from gapo.runs import options
    from gapo.runs.audit.audit_config import AuditConfig

    with options.option_errors(options.keys_of(parser)):
        values = options.stated(parser, list(arguments))
        (config,) = options.instances_of(values, (AuditConfig,))
    assert isinstance(config, AuditConfig)
    return config
