"""Read preference pairs from files and data sets; count and name the rows that are no pair."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSWERS = ("chosen", "rejected")
_FILES = ".json, .jsonl (each also .gz), .csv, .parquet"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")


class PairError(ValueError):
    """A source of pairs cannot be read, or a row of it is no pair and `strict` was asked for."""


@dataclass(frozen=True)
class Problem:
    """A row that is no pair: its line (from 1; row number for Parquet and data sets) and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Pairs:
    """Checked pairs, and what was left out.

    Attributes:
        rows: the good rows: "prompt", "chosen", "rejected" (text, or lists of messages) and whatever else stood there.
        problems: the bad ones, in order.
        source: where they came from.
    """

    rows: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""

    def summary(self) -> str:
        """Counts of good rows and of each fault, with the first lines of each."""
        text = f"{self.source}: {len(self.rows)} pairs"
        if self.problems:
            text += f", {len(self.problems)} rows left out"
        for reason, count in Counter(problem.reason for problem in self.problems).most_common():
            lines = [str(problem.line) for problem in self.problems if problem.reason == reason][:5]
            text += f"\n  {count} x {reason} (line {', '.join(lines)}{', ...' if count > len(lines) else ''})"
        return text


def read_pairs(source: str | Path, *, split: str = "train", strict: bool = False, limit: int | None = None) -> Pairs:
    """Read and check preference pairs.

    A pair has "chosen" and "rejected", two different non-empty answers, and mostly "prompt": text, or lists of
    {"role", "content"} messages (TRL's standard and conversational formats). Without "prompt", what both answers begin
    with is the prompt. Other columns are kept; "is_flipped", where present, must be true or false.

    Args:
        source: a file (.json, .jsonl, each also .gz, .csv, .parquet), a folder saved by `datasets`, or the name of a
            data set on the Hub.
        split: which split of a data set; files have none.
        strict: True raises at the first bad row; False counts and names them in `problems`.
        limit: stop after this many good rows.

    Raises:
        PairError: nothing can be read from `source`, no good row is in it, or `strict` and a row is bad.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.
    """
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for line, row in _read(source, split):
        reason = row if isinstance(row, str) else fault(row)
        if reason is None:
            rows.append(with_prompt(row))  # type: ignore[arg-type]
            if limit is not None and len(rows) >= limit:
                break
            continue
        if strict:
            raise PairError(f"{source}, line {line}: {reason}. Mend or remove the row, or read without strict")
        problems.append(Problem(line, reason))
    pairs = Pairs(rows, problems, str(source))
    if not rows:
        raise PairError(f"no usable pair found. {pairs.summary()}")
    return pairs


def fault(row: Any) -> str | None:
    """Why `row` is no preference pair, or None if it is one."""
    if not isinstance(row, dict):
        return f"not an object with columns, but {type(row).__name__}"
    missing = [name for name in ANSWERS if row.get(name) is None]
    if missing:
        return f"column {missing[0]!r} is missing"
    columns = [name for name in ("prompt", *ANSWERS) if row.get(name) is not None]
    for name in columns:
        if not isinstance(row[name], str) and not is_conversation(row[name]):
            return f"column {name!r} is neither text nor a list of messages with role and content"
    if len({isinstance(row[name], str) for name in columns}) > 1:
        return "text and messages are mixed"
    for name in ANSWERS:
        if not text_of(row[name]).strip():
            return f"column {name!r} is empty"
    if row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    if not isinstance(row.get("is_flipped", False), bool):
        return "column 'is_flipped' is not true or false"
    full = with_prompt(row)
    for name in ANSWERS:
        if not text_of(full[name]).strip():
            return f"column {name!r} is empty after the shared prompt"
    return None


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each with a role and a text."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with "prompt": as it stands, or what both answers begin with (whole words of text, whole messages)."""
    if row.get("prompt") is not None:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    shared = common_length(chosen, rejected)
    if isinstance(chosen, str):
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items `a` and `b` have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def text_of(answer: str | list[dict[str, str]]) -> str:
    """The text of an answer; of messages, their contents one after another."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)


def _read(source: str | Path, split: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each row of `source` with its line, or the reason why it cannot be read."""
    path = Path(source)
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind in _PICKLES:
        raise PairError(f"{source} is a {kind} file, which may run code when read; accepted are {_FILES}")
    if path.is_file():
        readers = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv}
        if kind in readers:
            return readers[kind](path)
        if kind == ".parquet":
            return enumerate(_datasets().Dataset.from_parquet(str(path), cache_dir=None), start=1)
        raise PairError(f"{source} has no known ending; accepted are {_FILES}, or the name of a data set")
    if kind in (".jsonl", ".json", ".csv", ".parquet"):
        raise PairError(f"{source} does not exist; give a file ({_FILES}) or the name of a data set")
    return enumerate(_load_dataset(str(source), split), start=1)


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        return gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw
    except (OSError, EOFError, ValueError) as error:
        raise PairError(f"{path} is not a whole gzip file: {error}") from error


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(line)


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    parsed = _parse(_bytes(path))
    if not isinstance(parsed, list):
        return _read_lines(path)  # one object a line under a .json name is common
    return enumerate(parsed, start=1)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not valid JSON"


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    text = io.StringIO(_bytes(path).decode("utf-8", errors="surrogateescape"), newline="")
    reader = csv.DictReader(text)
    try:
        for row in reader:
            if any(isinstance(cell, str) and not _is_utf8(cell) for cell in row.values()):
                yield reader.line_num, "not UTF-8"
                continue
            flag = {"true": True, "false": False, "1": True, "0": False}
            if (flipped := row.get("is_flipped")) is not None:
                row["is_flipped"] = flag.get(str(flipped).lower(), flipped)
            yield reader.line_num, {name: cell for name, cell in row.items() if isinstance(name, str)}
    except csv.Error as error:
        yield reader.line_num, f"not valid CSV: {error}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = 'reading Parquet files and data sets needs datasets: pip install "gapo[hf]"'
        raise ModuleNotFoundError(message, name="datasets") from error
    return datasets


def _load_dataset(name: str, split: str) -> Iterable[Any]:
    datasets = _datasets()
    try:
        if Path(name).is_dir() and any(Path(name, file).exists() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds; all mean that nothing can be read
        raise PairError(
            f"{name!r} is neither a file ({_FILES}) nor a data set that could be loaded (split {split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, gzipped if the name ends in .gz; whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as raw:  # a gzip file without name and time: the same rows give the same bytes
            opened = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            with io.TextIOWrapper(opened, encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
