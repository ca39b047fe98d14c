"""Run by test_devices.py: two ranks train on scenarios one after another, meet NaN, die and resume.

The test trains on the same ones in its own process, with the pairs of both ranks in a batch.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).parent))

import hf_models
import peft
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from drifting import drifting, drifting_gaps
from transformers import Trainer, TrainingArguments

import gapo
from gapo import GAPOConfig, StepResult
from gapo.adapters.hf import GAPOCallback, PreferenceCollator
from gapo.adapters.hf.margins import pair_logps
from gapo.backends.torch.sharded import fsdp_units, whole
from gapo.backends.torch.zero3 import is_zero3

SCENARIOS: dict[str, dict[str, Any]] = {
    "exact": {"model": "pythia", "adaptive": True},
    "first_order": {"model": "pythia", "anchor": "first_order"},
    "last_layer": {"model": "pythia", "last_layers": 1, "adaptive": False, "probe": "margin"},
    "gaussian": {"model": "pythia", "direction": "gaussian"},
    "lora": {"model": "lora", "adaptive": False, "perturb": "all"},
    "tied": {"model": "gpt2", "sft_weight": 0.1},
    "simpo": {"model": "pythia", "objective": "simpo"},  # without an anchor
    "running": {"model": "pythia", "objective": drifting},
    "running_gaps": {"model": "pythia", "objective": drifting_gaps, "target_gap": 0.3},
}
OF_FIRST_ORDER = ("first_order", "running_gaps")  # which ZeRO-3 has no way to measure
PAIRS = 4  # share an anchor
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 100,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
ENGINES: dict[str, dict[str, Any]] = {
    "": {},  # one process
    "ddp": {"ddp_backend": "gloo", "ddp_find_unused_parameters": False},
    "fsdp2": {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}},
    "zero3": {"ddp_backend": "gloo", "deepspeed": ZERO3},
}


def scenarios_of(engine: str) -> list[str]:
    """Names of the scenarios that an engine can do."""
    return [name for name in SCENARIOS if engine != "zero3" or name not in OF_FIRST_ORDER]


def make_trainer(kind: str, config: dict[str, Any], folder: str | Path, engine: str = "", **options: Any) -> Trainer:
    """A trainer of a float64 model in one process, or with one of `ENGINES` in two."""
    defaults = {"optim": "sgd", "save_strategy": "no", "max_steps": 2, "logging_steps": 2, "learning_rate": 0.5}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS // 2 if engine else PAIRS,
        per_device_eval_batch_size=3,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        ddp_timeout=600,
        **ENGINES[engine],
        **{**defaults, "gradient_accumulation_steps": 2, **options},
    )
    if engine == "fsdp2":  # accelerate takes FSDP for GPUs only, and falls back to DDP on CPUs without a word
        assert arguments.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    collator = PreferenceCollator(hf_models.tokenizer(), max_length=64, pad_to_multiple_of=64)
    settings = {**({} if "target_gap" in config else {"rho": 0.3}), **config}
    objective = settings.pop("objective", "gapo")
    return hf_models.InOrder(
        make_model(kind).double(),
        arguments,
        train_dataset=hf_models.pairs(16),
        eval_dataset=hf_models.pairs(6, seed=2),
        data_collator=collator,
        callbacks=[GAPOCallback(GAPOConfig(**settings), objective=objective)],
    )


def make_model(kind: str) -> Any:
    """A model of `hf_models`, or "lora" for adapters on one, with biases off zero as trained models have them.

    What attention adds to all keys alike cancels in its softmax, so the gradient of most key biases is rounding noise
    of 1e-20, exactly 0 or not as the sum was ordered. On a bias of 0 such a step counts as a change; on 0.1 it is lost.
    """
    model = hf_models.make("pythia" if kind == "lora" else kind)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1 + 0.1 * torch.rand(p.shape, generator=draw))
    if kind != "lora":
        return model
    adapters = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    return peft.get_peft_model(model, adapters)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole, as they are outside a forward."""
    for unit in fsdp_units(model):
        unit.reshard()
    if is_zero3(model):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
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
        callback.detach()
        synced = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    log = next(row for row in trainer.state.log_history if "loss" in row)
    weights = weights_of(trainer.model)
    return {"weights": weights, "log": log, "evaluation": evaluation, "results": results, "synced": synced}


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


def own_loop() -> dict[str, Any]:
    """`gapo.value_and_grad` on a model that FSDP2 never reshards by itself, and what becomes of the model."""
    from torch.distributed.fsdp import fully_shard

    model = hf_models.make("pythia").double()
    for layer in model.gpt_neox.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    before = weights_of(model)
    shards = list(model.parameters())
    for p in shards:
        p.grad = torch.ones_like(p)
    mine = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    batch = {name: x[mine] for name, x in hf_models.batch(PAIRS).items()}
    step = gapo.value_and_grad(pair_logps, GAPOConfig(rho=0.3), backend="torch")
    with torch.no_grad():
        pair_logps(model, batch)  # leaves the weights gathered
    result, grads = step(model, batch)
    found = {"gaps": result.anchor_gaps, "grads": {name: whole(g) for name, g in grads.items()}}
    found["grad_kept"] = all(bool((whole(p.grad) == 1).all()) for p in shards)

    def crash(*_: Any) -> None:
        if not torch.is_grad_enabled():
            raise KeyError("in the anchor forward")

    handle = model.gpt_neox.layers[1].register_forward_hook(crash)
    try:
        step(model, batch)
    except KeyError as error:
        found["crashed"] = str(error)
    handle.remove()
    after = weights_of(model)
    found["same"] = all(torch.equal(before[name], after[name]) for name in before)
    found["gaps_again"] = step(model, batch)[0].anchor_gaps

    model.set_requires_gradient_sync(False)
    try:
        step(model, batch)
    except RuntimeError as error:
        found["refused"] = str(error)
    return found


# A rank dies in the step after the first. AdamW, so that there is a state to resume; its epsilon is large, so that
# rounding does not decide the sign of a small gradient's step.
RESUMABLE: dict[str, Any] = {
    "optim": "adamw_torch",
    "adam_epsilon": 0.01,
    "learning_rate": 0.01,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
    "gradient_accumulation_steps": 1,
}


def die(engine: str, folder: str) -> None:
    """Train, save each step, and kill the last rank in the anchor forward of the second step.

    It leaves a note of how far its weights stood from the policy's just then.
    """
    trainer = make_trainer("gpt2", {}, folder, engine, **RESUMABLE)
    theta: dict[str, torch.Tensor] = {}

    def here(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: getattr(p, "ds_tensor", p).detach() for name, p in layer.named_parameters()}

    def kill(layer: torch.nn.Module, args: Any, output: Any) -> None:
        if trainer.state.global_step != 1 or dist.get_rank() != 1:
            return
        if torch.is_grad_enabled():
            theta.update({name: p.clone() for name, p in here(layer).items()})
            return
        moved = max(float((p - theta[name]).abs().max()) for name, p in here(layer).items())
        (Path(folder) / "moved.txt").write_text(str(moved))
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.model.transformer.h[1].register_forward_hook(kill)
    trainer.train()


def resume(engine: str, folder: str) -> None:
    """Go on from the last checkpoint in `folder` to the end."""
    make_trainer("gpt2", {}, folder, engine, **RESUMABLE).train(resume_from_checkpoint=True)


def start_over() -> None:
    """Let accelerate choose anew what the next trainer runs on."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def run_scenarios(engine: str, folder: str) -> None:
    """Every scenario, and every meeting with NaN."""
    results: dict[str, Any] = {}
    for scenario in scenarios_of(engine):
        results[scenario] = train(engine, scenario)
        start_over()
    for where in ("clean", "anchor"):
        results[f"nan_{where}"] = meet_nan(engine, where)
        start_over()
    if engine == "fsdp2":
        results["own_loop"] = own_loop()
    torch.save(results, f"{folder}/{dist.get_rank()}.pt")


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row of this machine that nothing listens on."""
    while True:
        with ExitStack() as held:
            first = 0
            for i in range(count):
                free = held.enter_context(socket.socket())
                try:
                    free.bind(("127.0.0.1", first + i if i else 0))
                except (OSError, OverflowError):  # taken, or beyond the last one
                    break
                first = first or free.getsockname()[1]
            else:
                return first


def launch(target: Any, *args: Any) -> list[int | None]:
    """Run `target` in two ranks, as torchrun does, and wait at most ten minutes; their exit codes, None if running."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    gc.freeze()  # what is loaded is not searched for garbage each time that a Trainer trains
    ranks = [multiprocessing.get_context("fork").Process(target=run_rank, args=(r, target, args)) for r in range(2)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + 600
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def run_rank(rank: int, target: Any, args: tuple[Any, ...]) -> None:
    """`target` as one of two ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if "zero3" in args:
        allow_float64()
    target(*args)
    dist.destroy_process_group()


def allow_float64() -> None:
    """DeepSpeed refuses float64 weights where the processor computes in float16, and nowhere else."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False


def main(engine: str, folder: str) -> None:
    """Scenarios; a death; the resumption. Leaves how each rank ended in codes.json."""
    codes = {part.__name__: launch(part, engine, folder) for part in (run_scenarios, die, resume)}
    (Path(folder) / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
