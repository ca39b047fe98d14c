"""What the benchmarks share: sizes, a random batch of pairs, interleaved rounds, pictures."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np


def add_size_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """`--pairs`, `--tokens`, `--width`, `--depth` and `--vocab`, with these defaults."""
    meanings = {
        "pairs": "pairs in the batch",
        "tokens": "tokens of prompt and answer",
        "width": "hidden size",
        "depth": "layers",
        "vocab": "size of the vocabulary",
    }
    for name, meaning in meanings.items():
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=meaning)


def random_batch(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random pairs of equal length, the first quarter of each row a prompt."""
    rng = np.random.default_rng(0)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = rng.integers(1, options.vocab, (options.pairs, options.tokens))
        labels = ids.copy()
        labels[:, : options.tokens // 4] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": np.ones_like(ids)}
    return batch


def time_rounds(
    steps: Mapping[str, Callable[[], Any]],
    budget: float,
    synchronise: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each step by `clock`, round by round: as many rounds as end within `budget` seconds.

    At least three are run: of two, quartiles would be extrapolated. Each round takes every step once, so that a noisy
    machine disturbs all alike. `synchronise` waits for the device.
    """
    begin = time.monotonic()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        step()  # the first step compiles, or examines the model
        progress(f"{name}: ran once, {time.monotonic() - begin:.0f} s")
    rounds, longest = 0, 0.0
    while rounds < 3 or time.monotonic() - begin + longest < budget:
        rounds, start_of_round = rounds + 1, time.monotonic()
        for name, step in steps.items():
            synchronise()
            start = clock()
            step()
            synchronise()
            seconds[name].append(clock() - start)
        longest = max(longest, time.monotonic() - start_of_round)
        if rounds <= 3 or rounds % 10 == 0:
            progress(f"round {rounds}, {time.monotonic() - begin:.0f} s of {budget:.0f} s")
    return seconds


def progress(text: str) -> None:
    """Tell on standard error how far a measurement is."""
    print(text, file=sys.stderr, flush=True)


def add_time_arguments(parser: argparse.ArgumentParser) -> None:
    """`--seconds`, `--cpu-time` and `--output`."""
    parser.add_argument("--seconds", type=float, default=120, help="duration of the rounds; at least three are run")
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor, where other programs run too")
    parser.add_argument("--output", type=Path, help="CSV file to which the rows are appended")


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """The clock of `--cpu-time`: this process's time and that of the compilers that it ran; or else the wall's."""
    return cpu_time if options.cpu_time else time.perf_counter


def cpu_time() -> float:
    """Seconds of the processor that this process and the processes that it waited for have used."""
    of_children = os.times()[2:4]
    return time.process_time() + sum(of_children)


def ratios_to_simpo(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of each step's time over SimPO's, taken within each round."""
    return {
        name: quantiles([a / b for a, b in zip(times, seconds["simpo"], strict=True)], n=4)
        for name, times in seconds.items()
    }


def commit() -> str:
    """The commit measured, with a "+" if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows of equal columns to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def write_picture(path: Path, svg: str) -> None:
    """Write an SVG of `gapo.runs.output.plots`, in a grey that reads on light and on dark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.replace("currentColor", "#777777"), encoding="utf-8")
