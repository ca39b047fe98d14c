"""Models and tokenizers from folders and the Hub, loaded so that no file of theirs can run code.

Weights are read from safetensors alone, never from pickles, and code that comes with a model is never run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gapo.data.token_table import TokenRows
from gapo.pairs import SIDES
from gapo.runs.errors import ConfigError
from gapo.runs.paths import require_there


def load_model(
    name: str,
    *,
    tokenizer: str | None = None,
    adapter: str | None = None,
    dtype: str,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of the transformers library.

    Args:
        name: folder or Hub name of a causal language model.
        tokenizer: another tokenizer than the model's: a folder or Hub name.
        adapter: folder or Hub name of an adapter (peft) to put on the model; its weights alone are then trainable.
        dtype: of the weights.
        options: of `from_pretrained` besides, such as revision.

    Raises:
        ConfigError: they cannot be loaded, or only by unpickling, or only by running code that comes with them.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options = options or {}
    for source in (name, adapter):
        _require_safetensors(Path(source or name))
    loaded = load_tokenizer(tokenizer or name, revision=None if tokenizer else options.get("revision"))
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **{**options, **safe})
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (OSError, ValueError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        what = f"model {name!r}" if adapter is None else f"model {name!r} with adapter {adapter!r}"
        raise ConfigError(_not_loaded(what, error)) from error
    return model, loaded


def require_same_ids(tokenizer: Any, source: str, model: str) -> None:
    """Raise ConfigError for a tokenizer with other ids than the model's own: the model would read other text."""
    try:
        own = load_tokenizer(model)
    except ConfigError:
        return  # the model has no tokenizer to compare with
    ids = own.get_vocab()
    other = next((token for token, i in tokenizer.get_vocab().items() if ids.get(token, i) != i), None)
    if other is not None:
        raise ConfigError(
            f"tokenizer {source!r} numbers the token {other!r} {tokenizer.get_vocab()[other]}, and that of model "
            f"{model!r} {ids[other]}: give a tokenizer that the model was trained with"
        )


def require_model(name: str, *, tokenizer: str | None = None, revision: str | None = None) -> Any:
    """The configuration of a model that `load_model` could load, None of an adapter; no weights are read.

    Args:
        name: folder or Hub name.
        tokenizer: another tokenizer than the model's.
        revision: branch, tag or commit of a Hub name.

    Raises:
        ConfigError: like `load_model`, as far as its small files show.
    """
    from transformers import AutoConfig

    require_there("model", name)
    require_there("tokenizer", tokenizer)
    if revision is not None and Path(name).is_dir():
        raise ConfigError(f"model_revision={revision!r} is of a name on the Hub, and model {name!r} is a local folder")
    _require_safetensors(Path(name))
    loaded = load_tokenizer(tokenizer or name, revision=None if tokenizer else revision)
    if tokenizer is not None:
        require_same_ids(loaded, tokenizer, name)
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").exists():
        return None
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **_of_revision(revision))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(f"model {name!r}", error)) from error


def require_fit(settings: Any, name: str, *, highest: int, longest: int) -> None:
    """Raise ConfigError where token ids, or sequences, go beyond what a model has.

    Args:
        settings: the model's configuration; values that it lacks are not checked.
        name: of the model.
        highest: greatest token id.
        longest: most tokens of prompt and answer.
    """
    inner = settings.get_text_config() if settings is not None else None
    vocabulary, positions = (getattr(inner, what, None) for what in ("vocab_size", "max_position_embeddings"))
    if isinstance(vocabulary, int) and highest >= vocabulary > 0:
        raise ConfigError(
            f"the tokenizer gives the id {highest}, and model {name!r} has embeddings of {vocabulary} tokens: use the "
            "model's own tokenizer, or resize its embeddings and save it"
        )
    if isinstance(positions, int) and longest > positions > 0:
        raise ConfigError(
            f"a pair has {longest} tokens, and model {name!r} has {positions} positions: --max_length {positions}"
        )


def extent(*parts: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(greatest token id, most tokens) of tokenised rows, for `require_fit`."""
    highest = longest = 0
    for part in parts:
        for high, length in [part.extent()] if isinstance(part, TokenRows) else _extents(part):
            highest, longest = max(highest, high), max(longest, length)
    return highest, longest


def _extents(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    for row in rows:
        for side in SIDES:
            ids = row[f"{side}_input_ids"]
            yield max(ids), len(ids)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder or Hub name. Raises ConfigError like `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_of_revision(revision))
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(f"tokenizer {name!r}", error)) from error


def _of_revision(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"revision": revision}


def _not_loaded(what: str, error: Exception) -> str:
    return f"{what} is not what save_pretrained leaves, nor a Hub name that could be loaded: {error}"


def _require_safetensors(folder: Path) -> None:
    pickles = [path.name for path in folder.glob("*_model*.bin")]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which may run code when read: if you trust it, load "
            "it yourself and save it anew with save_pretrained, which writes safetensors"
        )
