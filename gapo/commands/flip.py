"""`gapo flip`: flip a known share of the labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gapo.commands.one_line import OneLineParser


def main(arguments: Sequence[str]) -> int:
    """Run `gapo flip` with `arguments`; returns the exit status."""
    from gapo.data.raw_rows import FILES

    parser = OneLineParser(
        prog="gapo flip",
        description="Swap chosen and rejected in a known share of the pairs, and mark every row with is_flipped.",
        epilog="example: gapo flip pairs.jsonl --rate 0.2 --output noisy.jsonl",
    )
    parser.add_argument("pairs", help=f"a file ({FILES}) or the name of a data set")
    parser.add_argument("--mode", choices=("random", "length"), default="random", help="which pairs (default: random)")
    parser.add_argument("--rate", type=float, default=0.2, help="share of all pairs to flip (default: 0.2)")
    parser.add_argument(
        "--favour", choices=("longer", "shorter"), default="longer", help="for length: what labels favour"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument("--columns", help="other names of columns: prompt=question,chosen=good,rejected=bad")
    parser.add_argument("--preference", help="column that says which of output_a and output_b is preferred")
    parser.add_argument("--encoding", default="utf-8", help="of a file of text, such as cp1252 (default: utf-8)")
    for name, what in (("config", "configuration"), ("revision", "branch, tag or commit")):
        parser.add_argument(f"--dataset-{name}", f"--dataset_{name}", help=f"{what} of a data set on the Hub")
    parser.add_argument("--streaming", action="store_true", help="read a data set of the Hub without saving it")
    parser.add_argument(
        "--allow-eval", "--allow_eval", action="store_true", help="flip what is named test, eval, valid, dev, ..."
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of leaving it out")
    parser.add_argument("--output", required=True, help="file to write, .jsonl or .jsonl.gz")
    options = parser.parse_args(arguments)
    if not options.output.endswith((".jsonl", ".jsonl.gz")):
        parser.error(f"--output must end in .jsonl or .jsonl.gz, got {options.output!r}")
    if not 0 <= options.rate <= 1:
        parser.error(f"--rate must be in [0, 1], got {options.rate}")
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    if os.path.realpath(options.output) == os.path.realpath(options.pairs):
        parser.error(f"--output must be another file than the pairs, got {options.output!r} for both")
    from gapo.data import flip_pairs, read_pairs, write_rows
    from gapo.data.flip import evaluation_name
    from gapo.data.layouts import parse_columns
    from gapo.files import require_writable
    from gapo.runs.paths import require_there

    evaluation = evaluation_name(options.pairs, options.split)
    if evaluation is not None and not options.allow_eval:
        raise ValueError(
            f"{evaluation!r} says that these pairs are for evaluation, and flipped labels would falsify what is "
            "measured on them: flip training pairs, or give --allow-eval"
        )
    require_writable(Path(options.output).parent)
    require_there("pairs", options.pairs)
    pairs = read_pairs(
        options.pairs,
        split=options.split,
        strict=options.strict,
        columns=parse_columns(options.columns),
        preference=options.preference,
        encoding=options.encoding,
        config=options.dataset_config,
        revision=options.dataset_revision,
        streaming=options.streaming,
    )
    rows = flip_pairs(pairs.rows, mode=options.mode, rate=options.rate, seed=options.seed, favour=options.favour)
    write_rows(options.output, rows)
    print(pairs.summary())
    print(f"{sum(row['is_flipped'] for row in rows)} of {len(rows)} labels are flipped; written to {options.output}")
    flipped = [new for old, new in zip(pairs.rows, rows, strict=True) if old.get("is_flipped")]
    if flipped:
        undone = sum(not row["is_flipped"] for row in flipped)
        print(f"{len(flipped)} pairs came flipped, and {undone} of them were flipped back: another --seed draws others")
    return 0
