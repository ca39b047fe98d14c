"""`GAPOTrainer`: a `transformers.Trainer` with GAPO's callback, collator and model card, in the shape of TRL's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback

from gapo.adapters.hf.arguments import GAPOConfig
from gapo.adapters.hf.callback import GAPOCallback
from gapo.adapters.hf.collator import PreferenceCollator
from gapo.adapters.hf.models.peft_models import with_adapters
from gapo.adapters.hf.tokenized import tokenized
from gapo.config import named
from gapo.logp_options import LogpOptions
from gapo.objectives import Objective

_CARD = """
## Training method

Trained with the objective `{name}`{paper}, by the `gapo` library: {settings}.
"""

# Of every objective with an anchor.
_GAPO = """
The anchor is that of GAPO, Geometric Anchor Preference Optimization, of Cho, Kim and Kim
([arXiv 2602.04909](https://arxiv.org/abs/2602.04909)).

```bibtex
@article{cho2026gapo,
  title = {Learning Where It Matters: Geometric Anchoring for Robust Preference Alignment},
  author = {Cho and Kim and Kim},
  year = 2026,
  eprint = {2602.04909},
  archivePrefix = {arXiv},
}
```
"""


class GAPOTrainer(Trainer):
    """Tune a causal language model on preference pairs with GAPO.

    `GAPOTrainer("path or id", GAPOConfig(output_dir=...), train_dataset=pairs).train()`. Everything else is
    `transformers.Trainer`'s: checkpoints, resuming, trackers, `push_to_hub`, accelerate's engines.

    Args:
        model: a path or Hub id, a causal `PreTrainedModel`, or a PEFT model.
        args: a `gapo.adapters.hf.GAPOConfig`; None for the defaults in the folder "gapo".
        train_dataset: pairs in TRL's formats ("prompt", "chosen", "rejected", text or messages; the prompt may be left
            implicit), or rows of `gapo.data.tokenize_pair`: a `datasets.Dataset`, an `IterableDataset`, a sequence.
        eval_dataset: likewise, or a dict of them.
        processing_class: the tokenizer; None for the model's own.
        data_collator: None for `PreferenceCollator` with the limits of `args`.
        peft_config: adapters to train instead of the model's weights. A quantised model is made ready for it.
        objective: a `gapo.objectives.Objective`, or any function of a `gapo.objectives.LogProbs` that returns the loss
            of each pair, (N,). None for the objective that `args` names.
        objective_settings: settings of this `objective`; None for its defaults.
        quantization_config: of transformers, such as BitsAndBytesConfig(load_in_4bit=True), for a model by path or id;
            it needs peft_config.
        ref_model: None alone, so that a call of TRL's `DPOTrainer` without a reference model fits.
        compute_metrics: as in `transformers.Trainer`, like the next two.
        callbacks: besides GAPO's own.
        optimizers: (optimizer, scheduler); None in a place for the one that `args` names.

    Raises:
        TypeError, ValueError: an argument is not accepted; a row is no pair (naming the row and the fault).
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        args: GAPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        objective: Objective | Callable[..., Tensor] | str | None = None,
        objective_settings: Mapping[str, Any] | None = None,
        quantization_config: Any = None,
        ref_model: None = None,
    ) -> None:
        if ref_model is not None:
            raise ValueError(
                "GAPO has no reference model: leave ref_model out, or give None. Objectives that compare with a "
                "reference read its log-probabilities from the data set: see with_reference_logps"
            )
        args = GAPOConfig("gapo") if args is None else args
        if not isinstance(args, GAPOConfig):
            raise TypeError(
                f"args must be a gapo.adapters.hf.GAPOConfig, got {named(args)}. Settings of the step alone "
                "(gapo.GAPOConfig) go in as GAPOConfig(output_dir=..., **dataclasses.asdict(config)); with plain "
                "TrainingArguments, give GAPOCallback(config) to a transformers.Trainer"
            )
        if isinstance(model, str):
            model = _loaded(model, args, quantization_config, peft_config)
        else:
            for name, options in (
                ("model_init_kwargs", args.model_init_kwargs),
                ("quantization_config", quantization_config),
            ):
                if options:
                    raise ValueError(f"{name} were given, but the model is loaded already: give its path or id")
        if args.checkpointing_by_default and not getattr(model, "supports_gradient_checkpointing", False):
            args.turn_checkpointing_off()
        if processing_class is None:
            name = model.config._name_or_path
            if not name:
                raise ValueError(
                    "the model was not loaded by name, so its tokenizer is not known: give processing_class"
                )
            processing_class = AutoTokenizer.from_pretrained(name)
        if peft_config is not None:
            model = with_adapters(model, peft_config, args)
        if data_collator is None:
            data_collator = PreferenceCollator(
                processing_class,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        if isinstance(data_collator, PreferenceCollator):
            train_dataset = tokenized(train_dataset, "train_dataset", data_collator, args)
            eval_dataset = (
                {name: tokenized(rows, name, data_collator, args) for name, rows in eval_dataset.items()}
                if isinstance(eval_dataset, dict)
                else tokenized(eval_dataset, "eval_dataset", data_collator, args)
            )
        if objective is None:
            if objective_settings is not None:
                raise ValueError("objective_settings are of objective=, which is not given: put them into args")
            of_args: Any = args.objective_settings
            objective, objective_settings = args.objective, of_args
        elif args.objective != GAPOConfig.objective:
            raise ValueError(f"args name the objective {args.objective!r}, and objective= names another: leave one out")
        step = GAPOCallback(
            args.step_config(),
            objective=objective,
            objective_settings=objective_settings,
            disable_dropout=args.disable_dropout,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
        )
        self._loss, self._options = step.loss, step.options
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[step, *(callbacks or [])],
            optimizers=optimizers,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tags)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of `transformers.Trainer`, with the objective, its settings, its source and GAPO's citation."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if not self.is_world_process_zero() or not path.exists():
            return
        from huggingface_hub import ModelCard

        card = ModelCard.load(path)
        card.data.tags = sorted({*(card.data.tags or []), *self._tags})
        card.text = card.text.rstrip() + "\n" + self._method()
        card.save(path)

    @property
    def _tags(self) -> list[str]:
        return [self._loss.name, "preference-optimization"]

    def _method(self) -> str:
        """The section of the model card on the objective."""
        loss, config = self._loss, self.args.step_config()
        settings = dict(loss.settings)
        if loss.needs_anchor or config.updates_at_anchor:
            radius = {"rho": config.rho} if config.target_gap is None else {"target_gap": config.target_gap}
            update = {"update": config.update} if config.updates_at_anchor else {}
            settings |= {**radius, "anchor": config.anchor, **update}
        settings |= {name: x for name, x in asdict(self._options).items() if x != getattr(LogpOptions, name)}
        paper = f" ({loss.objective.paper})" if loss.objective.paper else ""
        listed = ", ".join(f"{name} {value}" for name, value in settings.items()) or "no settings"
        card = _CARD.format(name=loss.name, paper=paper, settings=listed)
        return card + _GAPO if loss.needs_anchor else card

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)


def _loaded(name: str, args: GAPOConfig, quantization_config: Any, peft_config: Any) -> PreTrainedModel:
    """The model of a path or id. Raises ValueError for a quantisation that is twice there, or without adapters."""
    init: Any = args.model_init_kwargs or {}  # text was parsed when `args` was made
    options = dict(init)
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("quantization_config is in model_init_kwargs too: give it once")
        if peft_config is None:
            raise ValueError("quantized weights cannot be trained: give peft_config, to train adapters on them")
        options["quantization_config"] = quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, **{"dtype": "float32", "use_safetensors": True, **options}
    )
    return model
