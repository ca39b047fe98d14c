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
        config, step_config, defaults = _parsed(arguments)
    except ConfigError as error:
        print(f"gapo train: error: {error}. See gapo train --help", file=sys.stderr)
        return 2
    with named_extra("gapo train", "cli"):
        from gapo.runs import ranks
        from gapo.runs.launch import launch
        from gapo.runs.train.train_files import require_files

    require_files(config)  # before seconds of imports
    if (status := launch(config, arguments)) is not None:
        return status
    with named_extra("gapo train", "cli"):
        from gapo.runs.train.train import train

    if defaults and ranks.is_first():
        print(defaults, flush=True)
    summary = train(config, step_config)
    if not ranks.is_first():
        return 0
    accuracy = "eval_rewards/accuracies"
    print(f"reward accuracy on held-out pairs: {summary['before'][accuracy]:.4f} -> {summary['after'][accuracy]:.4f}")
    if summary["unmoved"]:
        print(summary["unmoved"])
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    return 0


def make_parser() -> Any:
    """The parser of `gapo train`: every field of `TrainConfig` and `GAPOConfig`, with help from their docstrings.

    It also takes TRL's names of these, and the other fields of `transformers.TrainingArguments`.
    """
    with named_extra("gapo train", "cli"):
        from gapo.runs.options import parser_of
        from gapo.runs.train.other_names import add_other_names, help_on_other_fields
        from gapo.runs.train.train_config import TrainConfig

    parser = parser_of(
        (TrainConfig, GAPOConfig),
        usage="gapo train [CONFIG.yaml] [--key value ...]",
        prog="gapo train",
        description="Tune a language model on preference pairs with GAPO.",
        epilog="example: gapo train examples/demo.yaml --rho 0.05 --output_dir runs/rho-0.05",
    )
    add_other_names(parser)
    parser.epilog += f"\n\n{help_on_other_fields()}"
    return parser


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, GAPOConfig]:
    """`[CONFIG.yaml] [--key value ...]` as the two configurations; later ones win.

    Raises:
        ConfigError: a key or a value is not accepted, or the file cannot be read. YAML is read safely: no tag runs
            code.
    """
    return _parsed(arguments)[:2]


def _parsed(arguments: Sequence[str]) -> tuple[TrainConfig, GAPOConfig, str]:
    """The two configurations, and one line on the defaults that they have for the kind of the run."""
    parser = make_parser()
    from gapo.runs import options
    from gapo.runs.train import other_names
    from gapo.runs.train.kinds import with_defaults
    from gapo.runs.train.loss_option import require_loss_settings
    from gapo.runs.train.train_config import TrainConfig

    classes = (TrainConfig, GAPOConfig)
    switches = options.switches_of(classes) | other_names.other_switches()
    with options.option_errors(options.keys_of(parser)):
        values = options.stated(parser, options.with_config(arguments), switches=switches, lists=other_names.LISTS)
        values, defaults = with_defaults(other_names.with_short_names(values))
        config, step_config = options.instances_of(values, classes)
        _require_trust(config, arguments)  # before the loss is imported
        require_loss_settings(config.loss, step_config, config.loss_settings, config.logp_options)
    return config, step_config, defaults


def _require_trust(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Raise ConfigError where a YAML file would run code that the command line does not name or trust."""
    import yaml

    from gapo.runs.options import config_files, values_of, with_config
    from gapo.runs.train.loss_option import is_own

    files = config_files(with_config(arguments))
    for path in files:
        if "trust_code" in yaml.safe_load(path.read_text(encoding="utf-8-sig")):
            raise ConfigError(f"{path}: trust_code is accepted on the command line alone, --trust_code true: remove it")
    on_line = [*values_of("loss", arguments), *values_of("objective", arguments)]
    if files and is_own(config.loss) and not config.trust_code and config.loss not in on_line:
        raise ConfigError(
            f"{files[-1]}: loss {config.loss!r} is code, which a file may not run by itself: if you trust it, give "
            f"--trust_code true, or --loss {config.loss}, on the command line"
        )
