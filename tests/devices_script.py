"""Run by test_devices.py under torchrun: two ranks train on scenarios one after another; each rank leaves its results.

The test trains on the same ones in its own process, with the pairs of both ranks in a batch.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

import hf_models
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from gapo import GAPOConfig, StepResult
from gapo.adapters.hf import GAPOCallback, PreferenceCollator

SCENARIOS: dict[str, dict[str, Any]] = {
    "exact": {"model": "pythia", "adaptive": True},
    "first_order": {"model": "pythia", "anchor": "first_order"},
    "last_layer": {"model": "pythia", "last_layers": 1, "adaptive": False, "probe": "margin"},
    "gaussian": {"model": "pythia", "direction": "gaussian"},
    "tied": {"model": "gpt2", "sft_weight": 0.1},
}
PAIRS = 4  # share an anchor


class InOrder(Trainer):
    """Without shuffling, so that all runs see the same pairs in each step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_trainer(kind: str, config: dict[str, Any], folder: str | Path, engine: str = "", **options: Any) -> Trainer:
    """A trainer of a float64 model in one process, or with engine "ddp" or "fsdp2" in two."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS // 2 if engine else PAIRS,
        per_device_eval_batch_size=3,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        ddp_timeout=120,
        **({"ddp_backend": "gloo"} if engine else {}),
        **({"ddp_find_unused_parameters": False} if engine == "ddp" else {}),
        **({"fsdp": True, "fsdp_config": {"version": 2}} if engine == "fsdp2" else {}),
        **{"save_strategy": "no", "max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 2, **options},
    )
    if engine == "fsdp2":  # accelerate takes FSDP for GPUs only, and falls back to DDP on CPUs without a word
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    collator = PreferenceCollator(hf_models.tokenizer(), max_length=64, pad_to_multiple_of=64)
    return InOrder(
        hf_models.make(kind).double(),
        arguments,
        train_dataset=hf_models.pairs(16),
        eval_dataset=hf_models.pairs(6, seed=2),
        data_collator=collator,
        callbacks=[GAPOCallback(GAPOConfig(**{"rho": 0.3, **config}))],
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole, as they are outside a forward."""
    from gapo.backends.torch.sharded import fsdp_units, whole

    for unit in fsdp_units(model):
        unit.reshard()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def train(engine: str, scenario: str) -> dict[str, Any]:
    """Weights, logs and results of two optimiser steps of two accumulated micro-steps."""
    config = dict(SCENARIOS[scenario])
    results: list[StepResult] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config.pop("model"), config, folder, engine)
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GAPOCallback))
        callback.on_step = lambda result, batch: results.append(result)
        trainer.train()
        evaluation = trainer.evaluate()
    log = next(row for row in trainer.state.log_history if "loss" in row)
    gaps = [result.anchor_gaps for result in results]
    return {"weights": weights_of(trainer.model), "log": log, "evaluation": evaluation, "gaps": gaps}


def meet_nan(engine: str, where: str) -> dict[str, Any]:
    """What each rank says and keeps when the last one alone meets NaN in the "clean" or in the "anchor" forward."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("pythia", {}, folder, engine)
        before = weights_of(trainer.model)

        def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            last = dist.get_rank() == dist.get_world_size() - 1
            return output * torch.nan if last and torch.is_grad_enabled() == (where == "clean") else output

        trainer.model.gpt_neox.layers[0].mlp.register_forward_hook(poison)
        try:
            trainer.train()
        except FloatingPointError as error:
            said = str(error)
        after = weights_of(trainer.model)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return {"said": said, "same": same}


def die(engine: str, folder: str, steps: int, resume: bool) -> None:
    """Save each step; the last rank kills itself in the anchor forward of the step after the first, unless it resumes.

    It leaves a note of how far its weights stood from those that were saved.
    """
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, "gradient_accumulation_steps": 1}
    trainer = make_trainer("pythia", {}, folder, engine, **options)
    if resume:
        trainer.train(resume_from_checkpoint=True)
        if dist.get_rank() == 0:
            torch.save({}, Path(folder) / "done.pt")
        return
    theta: list[dict[str, torch.Tensor]] = []

    def kill(module: Any, args: Any, output: Any) -> None:
        if trainer.state.global_step == 1 and torch.is_grad_enabled():
            theta.append({name: p.detach().clone() for name, p in module.named_parameters()})
        if trainer.state.global_step == 1 and not torch.is_grad_enabled() and dist.get_rank() == 1:
            moved = max(float((p - theta[-1][name]).abs().max()) for name, p in module.named_parameters())
            (Path(folder) / "moved.txt").write_text(str(moved))
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.gpt_neox.layers[1].register_forward_hook(kill)
    trainer.train()


def start_over() -> None:
    """Let accelerate choose anew what the next trainer runs on."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def main(engine: str, output: str) -> None:
    results: dict[str, Any] = {}
    for scenario in SCENARIOS:
        results[scenario] = train(engine, scenario)
        start_over()
    for where in ("clean", "anchor"):
        results[f"nan_{where}"] = meet_nan(engine, where)
        start_over()
    torch.save(results, f"{output}/{engine}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    if sys.argv[1] == "die":
        die(sys.argv[2], sys.argv[3], int(sys.argv[4]), resume=sys.argv[5] == "resume")
    else:
        main(sys.argv[1], sys.argv[2])
