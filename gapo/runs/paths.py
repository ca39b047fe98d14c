"""Folders and files that a command line names, asked for before anything is imported or downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from gapo.runs.errors import ConfigError

# Files of a model, an adapter and a tokenizer, one of which is in the cache where the whole is.
_OF_MODELS = ("config.json", "adapter_config.json", "tokenizer_config.json")
_FILES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt")


def require_there(option: str, name: str | None) -> None:
    """Raise ConfigError for a name that can only be a local file or folder, and is not there.

    Such a name has the ending of a file of pairs, more than one slash, a slash at an end, a first part that is a local
    folder, or a dot or a tilde in front. Any other may be on the Hub, and is asked for there.
    """
    if name is None or os.path.exists(name) or not _is_local(name):
        return
    parent = Path(name).parent
    names = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []
    beside = f"; {parent} has {', '.join(shown)}" if (shown := [n for n in names if not n.startswith(".")][:8]) else ""
    raise ConfigError(f"{option}: {name} does not exist, neither as a file nor as a folder{beside}")


def require_model(option: str, name: str | None, revision: str | None = None) -> None:
    """Like `require_there`, for a model, adapter or tokenizer: one that is on no disk must be on the Hub.

    The Hub is asked once. Loading would ask it again and again, for a minute where it cannot be reached.

    Args:
        option: names the option in the error.
        name: folder or Hub name.
        revision: branch, tag or commit of a Hub name.

    Raises:
        ConfigError: it is no folder, and the Hub has no such name, or cannot be asked.
    """
    require_there(option, name)
    if name is None or os.path.exists(name):
        return
    try:
        from huggingface_hub import HfApi, constants, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    except ImportError:
        return  # the command names what to install
    try:
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _OF_MODELS):
            return
        HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return
    except (RepositoryNotFoundError, HFValidationError):
        why = "the Hub has no model of that name that you may read"
    except HfHubHTTPError:
        return  # loading it will say what is wrong
    except Exception as error:  # the library's, its HTTP client's, or the system's: the Hub was not reached
        why = f"the Hub cannot be asked for a model of that name ({type(error).__name__})"
    raise ConfigError(
        f"{option}: {name!r} is no folder here, and {why}: give the path of a folder, or a name on the Hub"
    )


def _is_local(name: str) -> bool:
    parts = name.replace(os.sep, "/").split("/")
    return (
        name.lower().endswith(_FILES)
        or len(parts) > 2
        or "" in parts
        or parts[0].startswith((".", "~"))
        or (len(parts) > 1 and os.path.isdir(parts[0]))
    )
