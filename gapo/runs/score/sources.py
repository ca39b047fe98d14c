"""The models that `gapo score` measures with: listed, fingerprinted, loaded one at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gapo._extras import named_extra
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import load_model, require_model
from gapo.runs.score.run_settings import model_folder
from gapo.runs.score.score_config import ScoreConfig

_ADAPTER = "adapter_config.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt"),
    "*.model",
)
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", _ADAPTER)  # a checkpoint's optimizer.pt is none of the model


@dataclass(frozen=True)
class Source:
    """A model to score with: its name in the column "checkpoint", a model's folder or Hub name, and an adapter's."""

    name: str
    model: str
    adapter: str | None = None


def find_sources(config: ScoreConfig) -> list[Source]:
    """The models of `config`, in order: as given, or the checkpoints of a training by their step.

    Raises:
        ConfigError: there is none, or which one is meant is not clear.
    """
    if config.checkpoints is not None:
        return [_of_checkpoint(folder, config) for folder in _checkpoint_folders(config.checkpoints)]
    if not config.model:
        raise ConfigError(
            "nothing to score with: give model, a folder or Hub name, or checkpoints, a training's folder"
        )
    if len(set(config.model)) < len(config.model):
        raise ConfigError(f"a model is named twice: {', '.join(config.model)}")
    return [source_of(name, config.adapter) for name in config.model]


def source_of(name: str, adapter: str | None) -> Source:
    """The source of a model, or of an adapter with the base that it names, by folder or Hub name.

    The folder of a run of `gapo train` stands for its model.

    Raises:
        ConfigError: `name` is itself an adapter and another one is to be put on it, or its base is not named.
    """
    folder = model_folder(name)
    if not _is_adapter(Path(folder)):
        return Source(name, folder, None if adapter is None else model_folder(adapter))
    if adapter is not None:
        raise ConfigError(
            f"model {name!r} is itself an adapter: give its base as model, or leave out adapter {adapter!r}"
        )
    return Source(name, _base_of(Path(folder)), folder)


def _of_checkpoint(folder: Path, config: ScoreConfig) -> Source:
    if _is_adapter(folder):
        return Source(folder.name, config.model[0] if config.model else _base_of(folder), str(folder))
    if config.model:
        raise ConfigError(f"{folder} is a whole model and needs no base: leave out model {config.model[0]!r}")
    return Source(folder.name, str(folder))


def _checkpoint_folders(name: str) -> list[Path]:
    for folder in (Path(name), Path(name) / "checkpoints"):
        numbered = {int(match[1]): path for path in folder.glob("*") if (match := _numbered(path))}
        if numbered:
            return [numbered[step] for step in sorted(numbered)]
    raise ConfigError(f"no checkpoint-* folder in {name!r}: give the folder that holds a training's checkpoints")


def _numbered(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file() and not (folder / "config.json").exists()


def _base_of(folder: Path) -> str:
    base = json.loads((folder / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"adapter {str(folder)!r} does not name its base model: give it as model")
    return str(base)


class Tokenizing(Protocol):
    """The setting by which a tokenizer is loaded."""

    @property
    def tokenizer(self) -> str | None: ...


class Loading(Tokenizing, Protocol):
    """The settings by which a model is loaded."""

    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...


def require_loadable(sources: list[Source], config: Loading) -> None:
    """Raise ConfigError for models, tokenizers and a device that cannot be used, as far as small files show."""
    find_device(config.device)
    for model in dict.fromkeys(source.model for source in sources):
        require_model(model, tokenizer=config.tokenizer)
    if any(source.adapter is not None for source in sources):
        with named_extra("gapo score with adapters", "hf"):
            import peft  # noqa: F401


def fingerprint(sources: list[Source]) -> str:
    """A digest of the weights of `sources`: it changes when a folder's files do.

    Files of local folders count by their content, a name on the Hub by itself.
    """
    return _digest([name for source in sources for name in (source.model, source.adapter) if name], _WEIGHTS)


def tokenizers_fingerprint(sources: list[Source], config: Tokenizing) -> str:
    """A digest of their tokenizers, since other tokens have other margins."""
    return _digest(_tokenizers(sources, config), _TOKENIZERS)


def tokenizers_differ(sources: list[Source], config: Tokenizing) -> bool:
    """Whether two of them, in local folders, are not the same."""
    files = {Path(name, "tokenizer.json") for name in _tokenizers(sources, config)}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.is_file()]
    return len({json.dumps([content["model"], content["added_tokens"]]) for content in contents}) > 1


def _tokenizers(sources: list[Source], config: Tokenizing) -> list[str]:
    return [config.tokenizer or _tokenizer_of(source) or source.model for source in sources]


def _digest(names: Sequence[str], patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if not Path(name).is_dir():
            digest.update(name.encode())
        for path in sorted(path for pattern in patterns for path in Path(name).glob(pattern)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def load(source: Source, config: Loading) -> tuple[Any, Any]:
    """(model, tokenizer) on the device, without dropout. With an adapter, its weights alone are trainable.

    Raises:
        ConfigError: a folder or name cannot be loaded, or there is no such device.
    """
    device = find_device(config.device)
    model, tokenizer = load_model(
        source.model, tokenizer=config.tokenizer or _tokenizer_of(source), adapter=source.adapter, dtype=config.dtype
    )
    return model.eval().to(device), tokenizer


def _tokenizer_of(source: Source) -> str | None:
    """The adapter's folder, where it holds a tokenizer."""
    if source.adapter is not None and Path(source.adapter, "tokenizer_config.json").exists():
        return source.adapter
    return None


def find_device(name: str) -> Any:
    """The `torch.device` of this name. Raises ConfigError if it is not there.

    "auto" is CUDA where there is one; torchrun's processes take a device each.
    """
    import torch

    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:0, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked, but PyTorch finds no CUDA device: give cpu or auto")
    return device
