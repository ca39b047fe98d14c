"""Models and tokenizers from folders and the Hub, of which no file can run code: safetensors alone, no custom code."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapo.experiments.config import ConfigError


def load_model(name: str, *, tokenizer: str | None = None, adapter: str | None = None, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of the transformers library.

    Args:
        name: folder or Hub name of a causal language model.
        tokenizer: another tokenizer than the model's: a folder or Hub name.
        adapter: folder or Hub name of an adapter (peft) to put on the model; its weights alone are then trainable.
        dtype: of the weights.

    Raises:
        ConfigError: they cannot be loaded, or only by unpickling, or only by running code that comes with them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    for source in (name, adapter):
        _require_safetensors(Path(source or name))
    found = load_tokenizer(tokenizer or name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        what = f"model {name!r}" if adapter is None else f"model {name!r} with adapter {adapter!r}"
        raise ConfigError(_not_loaded(what, error)) from error
    return model, found


def require_model(name: str, *, tokenizer: str | None = None) -> Any:
    """The configuration of a model that `load_model` could load, None of an adapter; no weights are read.

    Raises:
        ConfigError: like `load_model`, as far as small files tell.
    """
    from transformers import AutoConfig

    _require_safetensors(Path(name))
    load_tokenizer(tokenizer or name)
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").exists():
        return None
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(f"model {name!r}", error)) from error


def require_positions(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError where a tokenised row is longer than the model has positions."""
    settings = require_model(name)
    most = getattr(settings and settings.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row[side]) for row in rows for side in ("chosen_input_ids", "rejected_input_ids"))
    if isinstance(most, int) and longest > most > 0:
        raise ConfigError(f"a pair has {longest} tokens, and model {name!r} has {most} positions: --max_length {most}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or Hub name. Raises ConfigError like `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(f"tokenizer {name!r}", error)) from error


def _not_loaded(what: str, error: Exception) -> str:
    return f"{what} is not what save_pretrained leaves, nor a Hub name that could be loaded: {error}"


def _require_safetensors(folder: Path) -> None:
    pickles = [path.name for path in folder.glob("*_model*.bin")]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which may run code when read: if you trust it, load "
            "it yourself and save it anew with save_pretrained, which writes safetensors"
        )
