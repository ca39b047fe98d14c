"""Folders and files that a command line names, asked for before anything is imported or downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from gapo.runs.errors import ConfigError

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


def _is_local(name: str) -> bool:
    parts = name.replace(os.sep, "/").split("/")
    return (
        name.lower().endswith(_FILES)
        or len(parts) > 2
        or "" in parts
        or parts[0].startswith((".", "~"))
        or (len(parts) > 1 and os.path.isdir(parts[0]))
    )
