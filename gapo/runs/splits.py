"""Splits of a data set: the training split must exist, and evaluation must never take the training split.

`gapo train --eval_pairs NAME` without a split would silently read "train", the default of the `datasets` library, and
report an accuracy on training pairs. So the split is taken from its name, or asked for.
"""

from __future__ import annotations

import json
from pathlib import Path

from gapo._extras import named_extra
from gapo.data.flip import names_evaluation
from gapo.runs.errors import ConfigError

_ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet")


def require_split(
    source: str, split: str, option: str = "split", *, config: str | None = None, revision: str | None = None
) -> None:
    """Raise ConfigError, listing the splits, where `source` has some and `split` is none of them.

    Parts and sums of splits ("train[:10%]", "train+test") are judged by the names in them.
    """
    try:
        splits = splits_of(source, config, revision)
    except Exception:  # the library raises many kinds; reading the rows will raise the real reason
        return
    if splits is not None and not {part.split("[")[0].strip() for part in split.split("+")} <= set(splits):
        raise ConfigError(f"{source!r} has no split {split!r}; it has {', '.join(splits)}: give {option}")


def evaluation_split(source: str, wanted: str | None, config: str | None = None, revision: str | None = None) -> str:
    """The split of `source` to evaluate on: `wanted`, or the only one whose name says that it is for evaluation.

    Raises:
        ConfigError: there is no such split, or several; or `wanted` is given for a source without splits.
    """
    if wanted is not None and _is_file(Path(source)):
        raise ConfigError(f"eval_split={wanted!r} is for a data set, but {source!r} is a file: leave it out")
    if wanted is not None:
        require_split(source, wanted, "eval_split", config=config, revision=revision)
        return wanted
    try:
        splits = splits_of(source, config, revision)
    except Exception as error:  # the library raises many kinds; all mean that the splits are not known
        raise ConfigError(
            f"{source!r} is neither a file nor a data set whose splits could be listed "
            f"({type(error).__name__}: {error})"
        ) from error
    if splits is None:
        return "train"  # the name that `read_pairs` ignores for such a source
    evaluated = [name for name in splits if names_evaluation(name)]
    if len(evaluated) != 1:
        raise ConfigError(
            f"which split of {source!r} to evaluate on is not clear; it has {', '.join(splits)}: give eval_split"
        )
    return evaluated[0]


def splits_of(source: str, config: str | None = None, revision: str | None = None) -> list[str] | None:
    """Names of the splits of a data set; None for a file, and for a folder that holds one data set as a whole."""
    path = Path(source)
    if _is_file(path) or (path / "state.json").is_file():
        return None
    if (path / "dataset_dict.json").is_file():
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    with named_extra("reading data sets", "hf"):
        import datasets
    return list(datasets.get_dataset_split_names(source, config, revision=revision))


def _is_file(path: Path) -> bool:
    """Whether `path` is a file, or has the ending of one; a misspelt file's name is no name on the Hub."""
    return not path.is_dir() and (path.exists() or path.suffix.lower() in _ENDINGS)
