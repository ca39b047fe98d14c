"""Which trainers GAPO can serve. What it cannot do raises; what it leaves out of a loss is named once in a warning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from gapo.adapters.hf.collator import PreferenceCollator
from gapo.adapters.hf.deepspeed_config import other_numbers
from gapo.adapters.hf.models import REENTRANT, peft_model, text_config
from gapo.columns import REFERENCE_ALPHA
from gapo.config import GAPOConfig
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logp_options import LogpOptions
from gapo.pairs import COLUMNS, REFERENCE

# Libraries whose preference trainers, of TRL's, stack pairs with "labels" in place of TRL's "completion_mask".
_STACKED_WITH_LABELS = ("llamafactory", "swift")
# The trainers of TRL whose batches are pairs. The others train on unpaired rows, triplets, or their own generations.
_TRL_TRAINERS = ("DPOTrainer", "CPOTrainer", "ORPOTrainer")
_TRL_COLLATORS = ("DataCollatorForPreference", "DataCollatorForVisionPreference", "DPODataCollatorWithPadding")
_TRL_LOSS = {
    *("beta", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
    *("label_smoothing", "use_weighting", "discopop_tau", "reference_free", "rpo_alpha", "cpo_alpha", "simpo_gamma"),
    *("alpha", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "router_aux_loss_coef"),
}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def require_supported(trainer: Trainer, options: LogpOptions) -> None:
    """Raise ValueError, saying what to do, for an option of this trainer that GAPO cannot serve or would ignore."""
    for message in _refusals(trainer):
        raise ValueError(message)
    alpha = LogpOptions(trls_alpha(trainer)).alpha
    if _measures_reference(trainer) and alpha != options.alpha:
        raise ValueError(
            f"TRL measures the reference with ld_alpha={alpha!r} (precompute_ref_log_probs), and GAPOCallback the "
            f"policy with ld_alpha={options.ld_alpha!r}: give both the same"
        )


def with_trls_alpha(batch: dict[str, Any], trainer: Trainer) -> Mapping[str, Any]:
    """`batch` with the alpha that TRL measured its reference with, which TRL's own batches do not tell."""
    alpha = LogpOptions(trls_alpha(trainer)).alpha
    if alpha is None or REFERENCE[0] not in batch or not _measures_reference(trainer):
        return batch
    return {**batch, REFERENCE_ALPHA: torch.full_like(batch[REFERENCE[0]], alpha)}


def trls_alpha(trainer: Trainer) -> float | None:
    """LD-DPO's alpha of a trainer of TRL; None without."""
    return getattr(trainer.args, "ld_alpha", None) if any(map(_is_trl, type(trainer.args).__mro__)) else None


def _measures_reference(trainer: Trainer) -> bool:
    return bool(getattr(trainer.args, "precompute_ref_log_probs", False))


def as_trls(batch: Mapping[str, Any], trainer: Trainer) -> Mapping[str, Any]:
    """The batch, in TRL's layout where LLaMA-Factory's or ms-swift's trainer for pairs has stacked it with labels.

    From another trainer, rows with labels are no pairs (supervised tuning), and stay as they are.
    """
    hosts = {kind.__module__.partition(".")[0] for kind in type(trainer).__mro__}
    if "completion_mask" in batch or "labels" not in batch or hosts.isdisjoint(_STACKED_WITH_LABELS):
        return batch
    if not any(_is_trl(kind) and kind.__name__ in _TRL_TRAINERS for kind in type(trainer).__mro__):
        return batch
    others = {name: value for name, value in batch.items() if name != "labels"}
    return {**others, "completion_mask": (batch["labels"] != IGNORE_INDEX).long()}


def require_update(trainer: Trainer, config: GAPOConfig) -> None:
    """Raise ValueError where the update's backward, taken at moved weights, would miss float16's gradient scaler."""
    if config.updates_at_anchor and trainer.accelerator.mixed_precision == "fp16":
        raise ValueError(
            "update='anchor' is not supported with fp16=True, whose gradient scaler would not see its backward: train "
            "in float32, or set update='policy'"
        )


def require_joined(trainer: Trainer, model: nn.Module) -> None:
    """Raise RuntimeError where DDP does not join the ranks: each would train on its own gradients, and they would part.

    accelerate leaves DDP out where `trainer.evaluate()` came before `trainer.train()`.
    """
    alone = str(trainer.accelerator.distributed_type.value).startswith("MULTI_")
    if alone and not any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "the model is not wrapped in DistributedDataParallel, so each process would train alone: call "
            "trainer.evaluate() after trainer.train(), or set eval_on_start=True in its place"
        )


def left_out(trainer: Trainer) -> Iterator[str]:
    """A line for each term that the trainer or the model would add to its loss, and GAPO leaves out."""
    config = trainer.args
    changed = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in fields(config)
        if f.name in _TRL_LOSS and getattr(config, f.name) != _default(f)
    ]
    if changed and any(map(_is_trl, type(config).__mro__)):
        yield f"{', '.join(sorted(changed))}: no effect, since the loss is that of gapo.GAPOConfig's settings"
    text = text_config(trainer.model)
    asked = getattr(text, "output_router_logits", False) or getattr(trainer, "aux_loss_enabled", False)
    if asked and getattr(text, "router_aux_loss_coef", 0):
        yield (
            f"router_aux_loss_coef={text.router_aux_loss_coef}: the experts' auxiliary loss is left out. GAPO weighs "
            "pairs, and it is no sum over pairs. Freeze the routers, or watch their load"
        )
    adapters: Any = getattr(peft_model(trainer.model), "active_peft_config", None)
    if getattr(adapters, "orth_reg_weight", 0) and hasattr(adapters, "target_r"):
        yield f"orth_reg_weight={adapters.orth_reg_weight}: AdaLoRA's orthogonality loss is left out"


def _refusals(trainer: Trainer) -> Iterator[str]:
    yield from _engines(trainer)
    yield from _without_effect(trainer)
    yield from _other_trainers(trainer)
    yield from _data(trainer)


def _engines(trainer: Trainer) -> Iterator[str]:
    args, accelerator = trainer.args, trainer.accelerator
    if getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
        yield 'FSDP1 is not supported: set fsdp_config={"version": 2}, or fsdp_version: 2 for accelerate'
    if args.n_gpu > 1:
        yield "nn.DataParallel is not supported: start the script with torchrun or `accelerate launch`"
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if getattr(args, name, False) and (getattr(args, f"{name}_kwargs", None) or {}).get("use_reentrant"):
            yield REENTRANT
    yield from other_numbers(getattr(accelerator.state, "deepspeed_plugin", None), args)
    layout = getattr(accelerator, "parallelism_config", None)
    for name, what in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
        if getattr(layout, f"{name}_enabled", False) or (name == "tp" and _tensor_parallel(trainer)):
            yield (
                f"{what} parallelism ({name}_size) is not supported: a rank would see parts of rows or of weights. "
                "Shard with FSDP2 or DeepSpeed"
            )
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        yield f"optim={optim!r} changes weights within the backward, and the step needs them as they were: use another"
    if accelerator.num_processes > 1 and _is_dispatched(trainer) and not _is_ours(trainer.data_collator):
        yield (
            "dispatch_batches cuts a batch into the ranks' shares row by row, which parts chosen rows from rejected "
            'ones: set accelerator_config={"dispatch_batches": False}'
        )


def _without_effect(trainer: Trainer) -> Iterator[str]:
    args = trainer.args
    if args.label_smoothing_factor:
        yield (
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on a loss of pairs: set it to 0, and "
            "label_smoothing of gapo.GAPOConfig"
        )
    if callable(getattr(trainer, "compute_loss_func", None)):  # TRL puts a text there
        yield (
            "compute_loss_func would not be called, since the loss is GAPO's: leave it out, or train with it and "
            "without GAPOCallback"
        )
    if args.include_num_input_tokens_seen not in (False, "no") and _is_ours(trainer.data_collator):
        yield (
            "include_num_input_tokens_seen counts the batch's 'input_ids', and pairs have two of them: set it to 'no'"
        )
    if "inputs" in args.include_for_metrics:
        yield (
            "include_for_metrics=['inputs'] asks for one row of inputs for each prediction, and a pair has two: leave "
            "'inputs' out; compute_metrics gets the log-probabilities (N, 2) of chosen and rejected answers"
        )


def _other_trainers(trainer: Trainer) -> Iterator[str]:
    kind = next((c for c in type(trainer).__mro__ if _is_trl(c)), None)
    collator = type(trainer.data_collator)
    if kind is not None and kind.__name__ not in _TRL_TRAINERS and not _is_ours(trainer.data_collator):
        yield (
            f"TRL's {kind.__name__} does not train on pairs in batches: GAPOCallback takes the loss of "
            f"{', '.join(_TRL_TRAINERS)}, of a plain Trainer, or use GAPOTrainer"
        )
    elif any(map(_is_trl, collator.__mro__)) and not any(c.__name__ in _TRL_COLLATORS for c in collator.__mro__):
        yield (
            f"TRL's {collator.__name__} does not make batches of pairs: use gapo.adapters.hf.PreferenceCollator, or "
            f"one of TRL's {', '.join(_TRL_COLLATORS)}"
        )


def _data(trainer: Trainer) -> Iterator[str]:
    columns = _columns(trainer.train_dataset) or _columns(trainer.eval_dataset)
    collator = trainer.data_collator
    defaults = collator is default_data_collator or isinstance(collator, DataCollatorWithPadding)
    if defaults and columns and not set(COLUMNS) <= set(columns):
        yield (
            "the trainer has transformers' own collator, which makes no batches of pairs: give it "
            "data_collator=gapo.adapters.hf.PreferenceCollator(tokenizer)"
        )
    media = sorted(set(_MEDIA) & set(columns))
    if media and type(collator) is PreferenceCollator:
        yield (
            f"the data set has a column {media[0]!r}, and PreferenceCollator reads text: give data_collator="
            "trl.trainer.dpo_trainer.DataCollatorForVisionPreference(processor), or drop the column"
        )
    strategy, length = getattr(trainer.args, "train_sampling_strategy", None), trainer.args.length_column_name
    data_sets = [names for rows in (trainer.train_dataset, trainer.eval_dataset) if (names := _columns(rows))]
    if strategy in ("group_by_length", "batch_rebalance") and any(length not in names for names in data_sets):
        yield (
            f"train_sampling_strategy={strategy!r} needs a column {length!r} in a datasets.Dataset of pairs: add one "
            'with .map(), such as {"length": len(row["chosen"]) + len(row["rejected"])}'
        )


def _columns(rows: Any) -> Sequence[str]:
    """Names of a data set's columns, or as many as can be had without reading it."""
    if isinstance(rows, dict):
        rows = next(iter(rows.values()), None)
    if getattr(rows, "column_names", None):
        return list(rows.column_names)
    return list(rows[0]) if isinstance(rows, Sequence) and len(rows) and isinstance(rows[0], dict) else []


def _tensor_parallel(trainer: Trainer) -> bool:
    return hasattr(trainer, "get_tp_size") and trainer.get_tp_size() > 1


def _is_dispatched(trainer: Trainer) -> bool:
    dispatch = trainer.accelerator.dispatch_batches
    data_sets = [rows for rows in (trainer.train_dataset, trainer.eval_dataset) if rows is not None]
    streamed = any(isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") for rows in data_sets)
    return bool(dispatch) or (dispatch is None and streamed)


def _is_ours(collator: Any) -> bool:
    return isinstance(collator, PreferenceCollator)


def _is_trl(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trl" and kind.__name__ != "_BaseTrainer"


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
