"""The examples and recipes that come with the package, by name.

A name is a file's path within the package, such as `examples/demo.yaml`. The suffix may be left out, and so may the
folder of a file directly in it: `demo`.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import gapo

FOLDERS = ("examples", "recipes")
_PACKAGE = Path(gapo.__file__).parent


def shipped_files() -> dict[str, Path]:
    """Every example and recipe, by its path within the package."""
    return {
        path.relative_to(_PACKAGE).as_posix(): path
        for folder in FOLDERS
        for path in sorted((_PACKAGE / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def names_of(wanted: str) -> list[str]:
    """The files that a name stands for, as keys of `shipped_files`; for a folder, all that it holds."""
    wanted = wanted.rstrip("/")
    return [name for name in shipped_files() if wanted in _spellings(name) or name.startswith(f"{wanted}/")]


def _spellings(name: str) -> set[str]:
    path = PurePosixPath(name)
    full = {name, str(path.with_suffix(""))}
    return full | {path.name, path.stem} if len(path.parts) == 2 else full


def configuration(name: str) -> str:
    """The path of a configuration: a file of this name, with or without .yaml, or else the one that gapo ships.

    `name` itself where there is none.
    """
    for local in (name, f"{name}.yaml"):
        if os.path.isfile(local):
            return local
    files = shipped_files()
    matches = [str(files[match]) for match in files if match.endswith(".yaml") and name in _spellings(match)]
    return matches[0] if matches else name


def configuration_names() -> list[str]:
    """The short names of the configurations that gapo ships."""
    paths = map(PurePosixPath, shipped_files())
    return [path.stem for path in paths if path.suffix == ".yaml" and len(path.parts) == 2]


def summary(path: Path) -> str:
    """What an example or a recipe says of itself: its first line, a comment or a docstring's."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().lstrip('#"').strip()
