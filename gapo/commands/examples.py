"""`gapo examples`: list the examples and recipes that come with gapo, or copy them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from gapo.commands.one_line import OneLineParser
from gapo.files import write_bytes
from gapo.runs.shipped import FOLDERS, names_of, shipped_files, summary


def main(arguments: Sequence[str]) -> int:
    """Run `gapo examples` with `arguments`; returns the exit status."""
    parser = OneLineParser(
        prog="gapo examples",
        description="List the configurations and scripts that come with gapo, or copy some to edit them. "
        "`gapo train` and `gapo study` take a configuration by its name, without a copy.",
        epilog="example: gapo examples demo --to . && gapo train demo.yaml",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a file or a folder ({', '.join(FOLDERS)}) to copy")
    parser.add_argument("--to", metavar="FOLDER", help="where to copy them")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    options = parser.parse_args(arguments)
    if bool(options.names) != (options.to is not None):
        parser.error("to copy, give both a NAME and --to FOLDER; to list, neither")
    if options.names:
        for target in _copy(options.names, Path(options.to), options.overwrite):
            print(target)
    else:
        _list()
    return 0


def _list() -> None:
    files = shipped_files()
    width = max(map(len, files))
    for name, path in files.items():
        print(f"{name:<{width}}  {summary(path)}")
    print("\ngapo train NAME and gapo study NAME run a .yaml; gapo examples NAME --to FOLDER copies a file or a folder")


def _copy(names: Sequence[str], folder: Path, overwrite: bool) -> list[Path]:
    """Copy the files of these names: one by its own name, those of a folder by their paths from there.

    Raises:
        ValueError: nothing is called so. Nothing is copied then.
        FileExistsError: a file is there already and `overwrite` is not set. Nothing is copied then.
    """
    files = shipped_files()
    targets: dict[Path, Path] = {}
    for name in names:
        matches = names_of(name)
        if not matches:
            raise ValueError(f"there is no example or recipe {name!r}: {', '.join(files)}")
        below = PurePosixPath(name.rstrip("/")).parent
        whole = matches[0].startswith(f"{name.rstrip('/')}/")
        for match in matches:
            path = PurePosixPath(match)
            targets[folder / (path.relative_to(below) if whole else path.name)] = files[match]
    present = sorted(str(target) for target in targets if target.exists())
    if present and not overwrite:
        raise FileExistsError(f"{', '.join(present)} exists already: give --overwrite to replace it, or another --to")
    for target, source in targets.items():
        write_bytes(target, source.read_bytes())
    return list(targets)
