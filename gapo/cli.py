"""The command line: `gapo COMMAND`, one module of `gapo.commands` for each."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

import gapo
from gapo.commands.one_line import OneLineParser

# Errors that a user can cause and repair, reported in one line. Any other is a defect of gapo and keeps its traceback.
_USER_ERRORS = (ValueError, KeyError, OSError, ModuleNotFoundError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gapo` with `arguments` (default: the process's own); returns the exit status.

    0 for success, 1 for an error (one line on stderr), 2 for a wrong command line, 130 for an interruption.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if arguments[:1] and arguments[0] in _COMMANDS:
            command = importlib.import_module(f"gapo.commands.{arguments[0]}")
            return int(command.main(arguments[1:]))
        _parser().parse_args(arguments or ["--help"])
        return 0
    except KeyboardInterrupt:
        print("\ngapo: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # PyTorch's, not loaded
        if not memory and not isinstance(error, _USER_ERRORS):
            raise
        if debug:
            traceback.print_exc()
        message: object = error.args[0] if isinstance(error, KeyError) and error.args else error
        if memory:
            message = (
                f"out of memory ({error}): lower batch_size or max_length, or set gradient_checkpointing, in another "
                "output_dir; the same command resumes from its last checkpoint"
            )
        lines = str(message).split("\n") if type(error).__name__ == "PairError" else [str(message)]  # a row on each
        text = "\n  ".join(_printable(" ".join(line.split())) for line in lines)
        print(f"gapo: error: {text}", file=sys.stderr)
        return 1


def _printable(text: str) -> str:
    """`text` with control characters written out: a file's name could hold an escape sequence for the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


_COMMANDS = {
    "train": "tune a language model on preference pairs, with a report",
    "study": "compare objectives under flipped labels, with statistics and a report",
    "audit": "which labels are probably wrong: ranked, on a page, and cleaned",
    "score": "the gap and the weight of each pair, under one model or several",
    "generate": "answer prompts, in the formats that benchmarks read",
    "flip": "flip a known share of the labels, to study noise",
    "examples": "list the examples and recipes that come with gapo, or copy them",
}


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<8} {text}" for name, text in _COMMANDS.items())
    parser = OneLineParser(
        prog="gapo",
        description="GAPO: robust preference tuning without a reference model (arXiv 2602.04909).",
        epilog=f"commands:\n{commands}\n\n`gapo COMMAND --help` says what each takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gapo {gapo.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser
