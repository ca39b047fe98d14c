"""`gapo generate`: a model's answers to prompts, in the formats that benchmarks read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gapo._extras import named_extra
from gapo.runs.errors import ConfigError
from gapo.runs.paths import require_model, require_there

if TYPE_CHECKING:
    from gapo.runs.generate.generate_config import GenerateConfig


def main(arguments: Sequence[str]) -> int:
    """Run `gapo generate` with `arguments`; returns the exit status."""
    try:
        config = parse(arguments)
    except ConfigError as error:
        print(f"gapo generate: error: {error}. See gapo generate --help", file=sys.stderr)
        return 2
    require_there("prompts", config.prompts)  # before seconds of imports
    for name in ("model", "adapter", "tokenizer"):
        require_model(name, getattr(config, name))
    with named_extra("gapo generate", "cli"):
        from gapo.runs.generate.generate import generate

    done = generate(config)
    print(f"{done['answers']} answers: {config.output}")
    if done["cut"] < done["answers"]:
        print(f"mean length {done['tokens']:.0f} tokens, of the answers that ended by themselves")
    if done["cut"]:
        print(f"{done['cut']} answers were cut at max_new_tokens={config.max_new_tokens}: give more for whole ones")
    return 0


def make_parser() -> Any:
    """The parser of `gapo generate`: every field of `GenerateConfig`."""
    with named_extra("gapo generate", "cli"):
        from gapo.runs.generate.generate_config import GenerateConfig
        from gapo.runs.options import parser_with_first

    return parser_with_first(
        "prompts",
        (GenerateConfig,),
        prog="gapo generate",
        description="Answer prompts with a model, in the format of a benchmark.",
        epilog="example: gapo generate alpaca_eval.json --model runs/mine/model --format alpaca_eval "
        "--output mine.json",
    )


def parse(arguments: Sequence[str]) -> GenerateConfig:
    """The command line as the configuration. Raises ConfigError for what is not accepted."""
    parser = make_parser()
    from gapo.runs import options
    from gapo.runs.generate.generate_config import GenerateConfig

    with options.option_errors(options.keys_of(parser)):
        (config,) = options.instances_of(options.stated(parser, list(arguments)), (GenerateConfig,))
    assert isinstance(config, GenerateConfig)
    return config
