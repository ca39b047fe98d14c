"""The command line: `gapo train`, `gapo flip`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import gapo

# What a user can cause and mend: told in one line. Anything else is a defect of ours and keeps its traceback.
_USER_ERRORS = (ValueError, KeyError, OSError, ModuleNotFoundError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gapo` with `arguments` (default: the process's own); returns the exit status.

    0 for success, 1 for an error (told in one line on stderr), 2 for a wrong command line, 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if arguments[:1] and arguments[0] in _COMMANDS:
            return _COMMANDS[arguments[0]][1](arguments[1:])
        _parser().parse_args(arguments or ["--help"])
        return 0
    except KeyboardInterrupt:
        print("\ngapo: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"gapo: error: {' '.join(str(message).split())}", file=sys.stderr)
        return 1


def _train(arguments: list[str]) -> int:
    try:
        from gapo.experiments.config import ConfigError, make_parser, parse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'gapo train needs {error.name}: pip install "gapo[cli]"', name=error.name) from error

    if not arguments or "--help" in arguments or "-h" in arguments:
        make_parser().print_help()
        return 0
    try:
        run, step = parse(arguments)
    except ConfigError as error:
        print(f"gapo train: error: {error}. See gapo train --help", file=sys.stderr)
        return 2
    from gapo.experiments.train import train

    summary = train(run, step)
    accuracy = "eval_rewards/accuracies"
    print(f"reward accuracy on held-out pairs: {summary['before'][accuracy]:.4f} -> {summary['after'][accuracy]:.4f}")
    print(f"report: {Path(run.output_dir) / 'report.html'}")
    return 0


def _flip(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gapo flip",
        description="Swap chosen and rejected in a known share of the pairs, and mark every row with is_flipped.",
        epilog="example: gapo flip pairs.jsonl --rate 0.2 --output noisy.jsonl",
    )
    parser.add_argument("pairs", help="a file (.json, .jsonl, each also .gz, .csv, .parquet) or the name of a data set")
    parser.add_argument("--mode", choices=("random", "length"), default="random", help="which pairs (default: random)")
    parser.add_argument("--rate", type=float, default=0.2, help="share of all pairs to flip (default: 0.2)")
    parser.add_argument(
        "--favour", choices=("longer", "shorter"), default="longer", help="for length: what labels favour"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of leaving it out")
    parser.add_argument("--output", required=True, help="file to write, .jsonl or .jsonl.gz")
    options = parser.parse_args(arguments)
    if not options.output.endswith((".jsonl", ".jsonl.gz")):
        parser.error(f"--output must end in .jsonl or .jsonl.gz, got {options.output!r}")
    from gapo.data import flip_pairs, read_pairs, write_rows

    pairs = read_pairs(options.pairs, split=options.split, strict=options.strict)
    rows = flip_pairs(pairs.rows, mode=options.mode, rate=options.rate, seed=options.seed, favour=options.favour)
    write_rows(options.output, rows)
    print(pairs.summary())
    print(f"{sum(row['is_flipped'] for row in rows)} of {len(rows)} labels are flipped; written to {options.output}")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("tune a language model on preference pairs, with a report", _train),
    "flip": ("flip a known share of the labels, to study noise", _flip),
}


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<8} {text}" for name, (text, _) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gapo",
        description="GAPO: robust preference tuning without a reference model (arXiv 2602.04909).",
        epilog=f"commands:\n{commands}\n\n`gapo COMMAND --help` says what each takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gapo {gapo.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
