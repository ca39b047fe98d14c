"""`gapo train` killed by SIGKILL in the middle of its second step, then run again; started by `test_faults`.

`python faults_script.py FOLDER POINT ...`: each run is a fork of one process, since importing takes longest. A run
leaves FOLDER/NAME, and FOLDER/codes.json says how each ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import torch
from transformers import Trainer

from gapo import (
    cli,
    files,  # imported before the forks
)
from gapo.data import generate_pairs, write_rows
from gapo.runs.train import (
    train,  # imported before the forks
    train_torch,  # noqa: F401  # imported before the forks
)

STEPS = 3


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(what: Callable[[Any], Any]) -> None:
    """Call `what(output)` with what a layer gives in each forward of the second step."""
    plain = Trainer.training_step

    def training_step(self: Trainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            model.model.layers[1].register_forward_hook(lambda _, __, output: what(output) and None)
        return plain(self, model, *args, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]


def backward() -> None:
    """In the probe's backward; what the memory holds in another part of the step, a killed process takes with it."""
    in_step(lambda output: torch.is_grad_enabled() and output.register_hook(kill))


def checkpoint() -> None:
    """The weights of the second checkpoint are there, its optimizer is not."""
    plain = Trainer._save_optimizer_and_scheduler
    Trainer._save_optimizer_and_scheduler = lambda self, folder: (  # type: ignore[method-assign]
        kill() if self.state.global_step == 2 else plain(self, folder)
    )


def line() -> None:
    """Half a line of the second step stands in steps.jsonl."""
    plain = files.JsonLines.write

    def write(self: Any, row: dict[str, Any]) -> None:
        if row["step"] != 2 or "weights" not in row:
            return plain(self, row)
        text = json.dumps(row)
        self._file.write(text[: len(text) // 2])
        self._file.flush()
        return kill()

    files.JsonLines.write = write  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {f.__name__: f for f in (backward, checkpoint, line)}


def run(folder: Path, name: str, fault: Callable[[], None] | None = None) -> int:
    """`gapo train` in a fork, with `fault` arranged; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if fault is not None:
        fault()
    settings = {
        "pairs": folder / "pairs.jsonl",
        "eval_fraction": 0.25,
        "model": folder / "model",
        "output_dir": folder / name,
        "batch_size": 4,
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "rho": 0.3,
        "max_length": 64,
    }
    os._exit(cli.main(["train", *(f"--{key}={value}" for key, value in settings.items())]))


def main(folder: Path, *points: str) -> None:
    gc.freeze()  # what is loaded is not searched for garbage each time that a Trainer trains
    torch.set_num_threads(1)  # a fork has no threads but its own
    train.write_report = lambda *_: None  # drawing takes longest, and is not the matter here
    hf_models.make("llama").save_pretrained(folder / "model")
    hf_models.tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "pairs.jsonl", generate_pairs(16))
    codes = {"whole": run(folder, "whole")}
    for name in points:
        codes[name] = run(folder, name, POINTS[name])
        codes[f"{name} again"] = run(folder, name)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
