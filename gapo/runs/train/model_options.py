"""The options of `gapo train` on the model: how PyTorch loads it, and its adapters, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gapo._extras import named_extra
from gapo.runs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, its adapters, and the form in which its weights are loaded.

    Args:
        model: a Hub name, a local folder, or "tiny" for a small Llama trained on the spot.
        tokenizer: another tokenizer than the model's: a Hub name or folder.
        model_revision: branch, tag or commit of a Hub name.
        dtype: of the weights that are loaded. 16-bit ones lose small updates; bf16 computes in 16 bits all the same.
        attn_implementation: of the attention, such as eager, sdpa or flash_attention_2; none for transformers' choice.
        load_in_4bit: quantise the base of LoRA adapters to 4 bits when it is loaded (bitsandbytes).
        load_in_8bit: likewise to 8 bits.
        bnb_4bit_quant_type: kind of the 4 bits.
        use_bnb_nested_quant: quantise the constants of the 4 bits too.
        train_layers: train only the last so many layers, or the adapters on them; none for all. Layers below run once
            for each pair, and their states wait on disk.
        lora_r: rank of LoRA adapters (peft); 0 trains all weights.
        lora_alpha: scale of the adapters.
        lora_targets: names of the modules that get them, comma separated, or all-linear; none for peft's default.
        lora_dropout: dropout of the adapters; it needs disable_dropout false.
        lora_modules_to_save: names of modules to train whole beside them, comma separated.
        use_rslora: scale the adapters by lora_alpha / sqrt(lora_r).
        use_dora: decompose the weights into size and direction (DoRA).
        disable_dropout: set all dropout to 0, as TRL does.
    """

    model: str = "tiny"
    tokenizer: str | None = None
    model_revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = False
    train_layers: int | None = None
    lora_r: int = 0
    lora_alpha: int = 16
    lora_targets: str | list[str] | None = None
    lora_dropout: float = 0.0
    lora_modules_to_save: str | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    disable_dropout: bool = True

    def require_consistent(self) -> None:
        """Raise ValueError for options of the model that contradict each other, or that nothing would read."""
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.train_layers is not None and self.train_layers < 1:
            raise ValueError(f"train_layers must be >= 1, or none for all layers; got {self.train_layers!r}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one of them")
        if (self.load_in_4bit or self.load_in_8bit) and not self.lora_r:
            raise ValueError("quantised weights cannot be trained: train adapters on them, --lora_r 16")
        if self.model == "tiny" and self.model_revision is not None:
            raise ValueError(f"model_revision={self.model_revision!r} is of a name on the Hub, and model is tiny")
        if self.attn_implementation is not None and "/" in self.attn_implementation:
            raise ValueError(
                f"attn_implementation {self.attn_implementation!r} would run code from the Hub: give one that is "
                "installed, such as eager, sdpa or flash_attention_2"
            )


def names_in(text: str | list[str] | None) -> list[str] | None:
    """The names in a comma-separated text, or in a list; None for none."""
    parts = text.split(",") if isinstance(text, str) else text
    return [part.strip() for part in parts if part.strip()] if parts else None


def loading_options(options: ModelOptions) -> dict[str, Any]:
    """What `from_pretrained` takes of the options, besides dtype. Raises ConfigError where bitsandbytes is missing."""
    loading: dict[str, Any] = {"revision": options.model_revision, "attn_implementation": options.attn_implementation}
    loading = {name: value for name, value in loading.items() if value is not None}
    if options.load_in_4bit or options.load_in_8bit:
        import torch
        from transformers import BitsAndBytesConfig

        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ConfigError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes") from error
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=options.load_in_4bit,
            load_in_8bit=options.load_in_8bit,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        )
    return loading


def lora_config(options: ModelOptions) -> Any:
    """The `peft.LoraConfig` of the options; None where all weights are trained."""
    if not options.lora_r:
        return None
    with named_extra("gapo train with lora_r", "hf"):
        from peft import LoraConfig
    targets = names_in(options.lora_targets)
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=targets[0] if targets and len(targets) == 1 and targets[0] == "all-linear" else targets,
        lora_dropout=options.lora_dropout,
        modules_to_save=names_in(options.lora_modules_to_save),
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
    )
