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
        config, step_config = parse(arguments)
    except ConfigError as error:
        print(f"gapo train: error: {error}. See gapo train --help", file=sys.stderr)
        return 2
    with named_extra("gapo train", "cli"):
        from gapo.runs import ranks
        from gapo.runs.launch import launch

        if (status := launch(config, arguments)) is not None:
            return status
        from gapo.runs.train.train import train

    summary = train(config, step_config)
    if not ranks.is_first():
        return 0
    accuracy = "eval_rewards/accuracies"
    print(f"reward accuracy on held-out pairs: {summary['before'][accuracy]:.4f} -> {summary['after'][accuracy]:.4f}")
    print(f"report: {Path(config.output_dir) / 'report.html'}")
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
    from gapo.runs.train.loss_option import require_loss_settings
    from gapo.runs.train.train_config import TrainConfig

    def check(config: TrainConfig, step_config: GAPOConfig) -> None:
        _require_trust(config, arguments)  # before the loss is imported
        require_loss_settings(config.loss, step_config, config.loss_settings, config.logp_options)

    config, step_config = parse_fields(parser, arguments, (TrainConfig, GAPOConfig), check)
    return config, step_config


def _require_trust(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Raise ConfigError where a YAML file would run code that the command line does not name or trust."""
    import yaml

    from gapo.runs.options import config_files, values_of, with_config
    from gapo.runs.train.loss_option import is_own

    files = config_files(with_config(arguments))
    for path in files:
        if "trust_code" in yaml.safe_load(path.read_text(encoding="utf-8-sig")):
            raise ConfigError(f"{path}: trust_code is accepted on the command line alone, --trust_code true: remove it")
    if files and is_own(config.loss) and not config.trust_code and config.loss not in values_of("loss", arguments):
        raise ConfigError(
            f"{files[-1]}: loss {config.loss!r} is code, which a file may not run by itself: if you trust it, give "
            f"--trust_code true, or --loss {config.loss}, on the command line"
        )
