"""Run by test_hf.py, once alone and once under torchrun: two optimiser steps of SGD; rank 0 saves weights and logs."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

import hf_models
import torch
from transformers import Trainer, TrainingArguments

from gapo import GAPOConfig
from gapo.adapters.hf import GAPOCallback, PreferenceCollator


class InOrder(Trainer):
    """Without shuffling, so that both runs see the same pairs in each step."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(output: str, batch_size: int) -> None:
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    model = hf_models.make("llama").double()
    trainer = InOrder(
        model,
        arguments,
        train_dataset=hf_models.pairs(16),
        eval_dataset=hf_models.pairs(6, seed=2),
        data_collator=PreferenceCollator(hf_models.tokenizer(), max_length=64, pad_to_multiple_of=64),
        callbacks=[GAPOCallback(GAPOConfig(rho=0.3))],
    )
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        log = next(row for row in trainer.state.log_history if "loss" in row)
        torch.save({"weights": model.state_dict(), "log": log}, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
