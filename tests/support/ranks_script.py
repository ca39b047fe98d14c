"""Run by test_experiments.py: `gapo train` in two processes, as torchrun starts them, interrupted and gone on with.

`python ranks_script.py FOLDER`: leaves FOLDER/run, FOLDER/dpo, and a file of each process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import hf_models
from devices_script import launch

from gapo import cli, files
from gapo.data import generate_pairs
from gapo.runs.train import train
from gapo.runs.train.train_torch import Recorder

ONE_STEP = ("--loss=dpo", "--max_steps=1", "--logging_steps=1")
PAIRS = 11  # to train on: of the last micro-batch of an epoch, two processes of two pairs each get three


def command(folder: Path, name: str, *more: str) -> list[str]:
    settings = {
        "pairs": folder / "pairs.jsonl",
        "eval_fraction": 4 / (PAIRS + 4),
        "flip_rate": 0.4,
        "model": folder / "model",
        "output_dir": folder / name,
        "batch_size": 2,
        "epochs": 2,
        "eval_steps": 3,
        "save_steps": 2,
        "logging_steps": 4,
        "learning_rate": 1e-3,
        "rho": 0.3,
        "max_length": 64,
    }
    return ["train", *(f"--{key}={value}" for key, value in settings.items()), *more]


def rank(folder: Path) -> None:
    """One process of each training. Leaves how they ended, and what it wrote besides the Trainer's own files."""
    wrote: list[str] = []
    plain = files.whole

    def noted(path: Path) -> Any:
        wrote.append(path.name)
        return plain(path)

    files.whole = noted  # type: ignore[assignment]
    step_begin = Recorder.on_step_begin
    Recorder.on_step_begin = interrupt_in_the_second_epoch  # type: ignore[method-assign]
    codes = [cli.main(command(folder, "run"))]
    Recorder.on_step_begin = step_begin  # type: ignore[method-assign]
    codes += [cli.main(command(folder, "run")), cli.main(command(folder, "dpo", *ONE_STEP))]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps({"codes": codes, "wrote": wrote}))


def interrupt_in_the_second_epoch(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    if state.global_step == 4:
        raise KeyboardInterrupt
    self._step = state.global_step + 1


def main(folder: Path) -> None:
    train.write_report = lambda *_: None  # drawing takes longest, and is not the matter here
    hf_models.make("llama").save_pretrained(folder / "model")
    hf_models.tokenizer().save_pretrained(folder / "model")
    files.write_rows(folder / "pairs.jsonl", generate_pairs(PAIRS + 4))
    launch(rank, folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    cli.main(command(folder, "one", *ONE_STEP, "--batch_size=4"))  # alone, with the pairs of both


if __name__ == "__main__":
    main(Path(sys.argv[1]))
