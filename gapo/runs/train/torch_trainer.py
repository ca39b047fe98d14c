"""The `Trainer` of `gapo train` on PyTorch: flips in its training batches, whole checkpoints, a line per evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer

from gapo.files import cannot_write, write_errors


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Raise errors of writing as an OSError that names `path`. PyTorch's own are RuntimeErrors."""
    errors: tuple[type[Exception], ...] = (*write_errors(), RuntimeError)
    try:
        yield
    except errors as error:
        raise cannot_write(path, error) from error


class TrainerWithFlips(Trainer):
    """A plain Trainer whose training batches also carry "is_flipped", and which leaves no half checkpoint behind."""

    data_collator: Any
    train_collator: Any = None

    def get_train_dataloader(self) -> Any:
        plain, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            with errors_named(folder):
                super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


class Progress(ProgressCallback):
    """The Trainer's progress bars, with one line for each evaluation instead of every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "eval_loss" in logs:
            text = f"step {state.global_step}: held-out reward accuracy {logs['eval_rewards/accuracies']:.4f}"
            line = f"{text}, margin {logs['eval_rewards/margins']:.3f}, loss {logs['eval_loss']:.4f}"
            if self.training_bar is not None:
                self.training_bar.write(line)
            else:
                print(line, flush=True)
