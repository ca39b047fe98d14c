"""The logs that the PyTorch loop of `gapo train` writes during a run: metrics.jsonl and steps.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from gapo.files import JsonLines, read_lines
from gapo.runs import ranks
from gapo.runs.train.run_data import step_line
from gapo.step import StepResult

Row = dict[str, Any]


class Recorder(TrainerCallback):
    """Writes metrics.jsonl (each log) and steps.jsonl (each micro-batch's gaps and weights) during a run.

    In several processes the first one writes, with a micro-batch of all processes in one line. Accelerate may fill up
    the last micro-batch of an epoch with pairs of its beginning, so that all processes have equally many. Those pairs
    are left out.

    Args:
        folder: of the run.
        until_step: lines of later steps are dropped.
        steps_per_epoch: optimiser steps of one pass.
    """

    def __init__(self, folder: Path, until_step: int, steps_per_epoch: int) -> None:
        self._logs: dict[str, JsonLines] = {}
        if ranks.is_first():
            self._logs = {name: JsonLines(folder / f"{name}.jsonl", until_step) for name in ("metrics", "steps")}
        self._folder, self._steps_per_epoch, self._step = folder, steps_per_epoch, 0
        self._waiting: list[Row] = []  # of this process, since the last line
        self._seen: set[int] = set()  # pairs of this epoch
        ranks.meet()
        evaluations = [row for row in read_lines(folder / "metrics.jsonl") if "eval_loss" in row]
        self.first_evaluation: Row = evaluations[0] if evaluations else {}
        self.last_evaluation: Row = evaluations[-1] if evaluations else {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def on_step(self, result: StepResult, batch: Row) -> None:
        """One line for a micro-batch, in the order of its pairs."""
        row = step_line(self._step, result, batch["is_flipped"].tolist(), batch["pair"].tolist())
        if ranks.count() == 1:
            self._logs["steps"].write(row)
        else:
            self._waiting.append(row)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self._gather()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if ranks.count() > 1 and ranks.is_first():
            start = state.global_step // self._steps_per_epoch * self._steps_per_epoch
            rows = [row for row in read_lines(self._folder / "steps.jsonl") if row["step"] > start]
            self._seen = {pair for row in rows for pair in row["pair"]}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._gather()

    def _gather(self) -> None:
        """Write the lines that wait in all processes."""
        if ranks.count() == 1:
            return
        of_each: list[list[Row]] = gather_object([self._waiting])
        self._waiting = []
        if ranks.is_first():
            for rows in zip(*of_each, strict=True):
                self._logs["steps"].write(joined(rows, self._seen))

    def on_log(self, args: Any, state: Any, control: Any, logs: Row | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, **(logs or {})}
        if "eval_loss" in row:
            self.first_evaluation = self.first_evaluation or row
            self.last_evaluation = row
        if ranks.is_first():
            self._logs["metrics"].write(row)

    def close(self) -> None:
        """Close both files."""
        for log in self._logs.values():
            log.close()


def joined(rows: tuple[Row, ...], seen: set[int]) -> Row:
    """The lines of all processes on a micro-batch as one, without the pairs in `seen`; the others are added there."""
    line: Row = {name: [] for name in rows[0]} | {"step": rows[0]["step"]}
    for row in rows:
        for place, pair in enumerate(row["pair"]):
            if pair not in seen:
                seen.add(pair)
                for name in row.keys() - {"step"}:
                    line[name].append(row[name][place])
    return line
