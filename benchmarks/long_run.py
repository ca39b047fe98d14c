"""A long training of a tiny model: whether its memory grows, and whether it slows down.

`python benchmarks/long_run.py --steps 2000 --output long_run.csv` trains with GAPO in a Trainer, which also evaluates
and saves. It samples the memory of the process and the time of each step. The exit code is 1 if memory grows, or a step
becomes slower, by more than the bounds.

Growth is the slope of a line through the samples; a step's cost, a median over a tenth of the run. Both leave out the
first tenth, as warm-up. The bound on slowdown applies to a step's CPU time divided by that of a yardstick: the forward
and backward of a fixed copy of the model, every few steps. Other work on the machine slows both alike.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, Trainer, TrainerCallback

import gapo
from gapo.adapters.hf import GAPOCallback, PreferenceCollator
from gapo.adapters.hf.margins import pair_logps
from gapo.data import generate_pairs, warmup_text
from gapo.runs.models.tiny import tiny_model
from gapo.runs.train.train_config import TrainConfig

FIELDS = ("step", "resident_mib", "cuda_mib", "cpu_seconds", "wall_seconds", "yardstick_cpu_seconds")
YARDSTICK_EVERY = 5


class Sampler(TrainerCallback):
    """One row of `FIELDS` for each step. Times are of the step alone; the yardstick is NaN at steps that skip it."""

    def __init__(self, steps: int, yardstick: Callable[[], Any]) -> None:
        self.rows = np.full((steps, len(FIELDS)), np.nan)  # allocated at the start, so that it does not count as growth
        self._bar = tqdm(total=steps, desc="training")
        self._process, self._yardstick = psutil.Process(), yardstick
        self._start = (0.0, 0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        times = (time.process_time() - self._start[0], time.perf_counter() - self._start[1])
        resident = self._process.memory_info().rss / 2**20
        cuda = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        self.rows[state.global_step - 1, :5] = (state.global_step, resident, cuda, *times)
        if state.global_step % YARDSTICK_EVERY == 0:
            start = time.process_time()
            self._yardstick()
            self.rows[state.global_step - 1, 5] = time.process_time() - start
        self._bar.update()
        self._bar.set_postfix(resident=f"{resident:.0f} MiB", refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.close()


def train(options: argparse.Namespace, folder: Path) -> np.ndarray:
    """Train by the options; returns the samples, (steps, len(FIELDS))."""
    config = TrainConfig(
        cache_dir=str(folder),
        tiny_hidden_size=options.width,
        tiny_layers=options.depth,
        tiny_heads=2,
        tiny_vocab=512,
        tiny_text_steps=0,
        tiny_answer_steps=0,
    )
    pairs = generate_pairs(options.pairs)
    path = tiny_model(config, warmup_text(2 * config.demo_size).split("\n"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    collator = PreferenceCollator(tokenizer, max_length=128)
    fixed, batch = copy.deepcopy(model), collator(pairs[: options.batch_size])
    sampler = Sampler(options.steps, lambda: torch.stack(pair_logps(fixed, batch)).sum().backward())
    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            str(folder / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-5,
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 4),
            save_steps=max(1, options.steps // 4),
            save_total_limit=1,
            report_to="none",
            seed=options.seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=pairs,
        eval_dataset=generate_pairs(64, split="test"),
        data_collator=collator,
        callbacks=[
            GAPOCallback(gapo.GAPOConfig(rho=options.rho, anchor=options.anchor), objective=options.objective),
            sampler,
        ],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return sampler.rows


def summarise(rows: np.ndarray) -> dict[str, float]:
    """Growth of memory, MiB in 1,000 steps, and the median milliseconds of a step at the start and at the end."""
    tenth = max(1, len(rows) // 10)
    steady = rows[tenth:]
    first, last = steady[:tenth], steady[-tenth:]
    summary = {"resident, MiB": float(np.median(last[:, 1]))}
    for name, column in (("resident", 1), ("CUDA", 2)):
        summary[f"growth of {name} memory, MiB in 1,000 steps"] = 1000 * float(
            np.polyfit(steady[:, 0], steady[:, column], 1)[0]
        )
    for name, column in (("CPU", 3), ("wall-clock", 4), ("yardstick's CPU", 5)):
        for when, part in (("start", first), ("end", last)):
            summary[f"{name} ms, {when}"] = 1000 * float(np.nanmedian(part[:, column]))
    start, end = (summary[f"CPU ms, {when}"] / summary[f"yardstick's CPU ms, {when}"] for when in ("start", "end"))
    summary["slowdown of a step against the yardstick"] = end / start - 1
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python benchmarks/long_run.py --steps 2000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--pairs", type=int, default=1000, help="generated training pairs")
    parser.add_argument("--width", type=int, default=64, help="hidden size of the model")
    parser.add_argument("--depth", type=int, default=2, help="layers of the model")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in a step")
    parser.add_argument("--rho", type=float, default=0.1, help="radius of the perturbation")
    parser.add_argument("--anchor", choices=["auto", "exact", "first_order"], default="auto", help="as in GAPOConfig")
    parser.add_argument(
        "--objective", default="gapo", help="gapo, simpo or another of gapo.objectives that needs no reference"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
    parser.add_argument("--max-growth", type=float, default=5.0, help="bound on memory, MiB in 1,000 steps")
    parser.add_argument("--max-slowdown", type=float, default=0.05, help="bound on a step against the yardstick")
    parser.add_argument("--output", type=Path, default=Path("long_run.csv"), help="CSV file of the samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = train(options, Path(folder))
    with options.output.open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows.tolist()])
    summary = summarise(rows)
    print(
        f"{options.steps} steps of {options.batch_size} pairs, {options.objective}, anchor {options.anchor}; ", end=""
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| | |\n|---|---|")
    for name, value in summary.items():
        print(f"| {name} | {value:+.1%} |" if name.startswith("slowdown") else f"| {name} | {value:.2f} |")
    growth = max(value for name, value in summary.items() if name.startswith("growth"))
    slowdown = summary["slowdown of a step against the yardstick"]
    if growth > options.max_growth or slowdown > options.max_slowdown:
        print(f"\nover the bounds: {options.max_growth} MiB in 1,000 steps, {options.max_slowdown:.0%}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
