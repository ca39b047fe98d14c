"""Run by test_drift.py, alone and in two ranks: two steps with drift measured; rank 0 saves what it logged."""

import os
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

import hf_models
import torch
from devices_script import launch
from transformers import TrainingArguments

from gapo import GAPOConfig
from gapo.adapters.hf import DriftCallback, GAPOCallback, PreferenceCollator


def main(folder: str, batch_size: int) -> None:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    trainer = hf_models.InOrder(
        hf_models.make("llama"),
        arguments,
        train_dataset=hf_models.pairs(16),
        eval_dataset=hf_models.pairs(6, seed=2),
        data_collator=PreferenceCollator(hf_models.tokenizer(), max_length=64),
        callbacks=[
            GAPOCallback(GAPOConfig(rho=0.3)),
            DriftCallback(pairs=5, prompts=5, max_new_tokens=4),
        ],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        rows = [row for row in trainer.state.log_history if "drift/held_out_margin" in row]
        torch.save(rows, Path(folder, "rows.pt"))


if __name__ == "__main__":
    sys.exit(launch(main, sys.argv[1], 2) != [0, 0])
