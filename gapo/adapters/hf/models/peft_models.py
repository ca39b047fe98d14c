"""What PEFT has put around or into a model: learned prompts, and adapters that can be switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts a learned prompt before each row: as tokens with logits of their own, or as a cache."""
    peft = peft_model(model)
    return peft is not None and bool(peft.active_peft_config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """How many positions PEFT's learned prompt takes."""
    peft = peft_model(model)
    return int(peft.active_peft_config.num_virtual_tokens) if peft is not None and has_virtual_tokens(model) else 0


def prefix_is_cached(model: Any) -> bool:
    """Whether PEFT hands the learned prompt to the model as a cache of keys and values."""
    return _kind(model) in ("PREFIX_TUNING", "CARTRIDGE")


def takes_task_ids(model: Any) -> bool:
    """Whether the adapters choose their weights by the batch's "task_ids"."""
    return _kind(model) in ("MULTITASK_PROMPT_TUNING", "POLY")


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Run the base of a PEFT model. PEFT changes `requires_grad` meanwhile; all flags are restored afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def with_adapters(model: Any, peft_config: Any, args: Any) -> Any:
    """`model` with new adapters; a quantised one is made ready for them, with the checkpointing of `args`.

    Raises:
        ValueError: the model has adapters already.
    """
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if isinstance(model, PeftModel):
        raise ValueError("the model has adapters already: leave peft_config out, or merge and unload them first")
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=bool(args.gradient_checkpointing),
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
    return get_peft_model(model, peft_config)


def peft_model(model: Any) -> Any:
    """The `PeftModel` inside DDP and torch.compile; None without one."""
    while isinstance(model, nn.Module):
        if hasattr(model, "active_peft_config"):
            return model
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return None


def _kind(model: Any) -> str:
    """The type of the active adapter, such as "LORA"; empty without PEFT."""
    peft = peft_model(model)
    kind = peft.active_peft_config.peft_type if peft is not None else ""
    return str(getattr(kind, "value", kind))
