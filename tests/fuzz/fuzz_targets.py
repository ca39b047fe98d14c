"""What is fuzzed: a target takes any bytes and gives the name of an accepted outcome, or raises: a finding.

Accepted are a result that is what its documentation says, and the documented error in words that name the file or the
field. The first byte says what the rest is.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_values

from gapo import GAPOConfig, data
from gapo.commands import score as score_command
from gapo.commands import study as study_command
from gapo.commands import train as train_command
from gapo.runs import options
from gapo.runs.errors import ConfigError
from gapo.runs.score import ScoreConfig
from gapo.runs.train.train_config import TrainConfig
from gapo.study.study_config import StudyConfig

# "g" is packed here; "v", below, is made of values
PAIR_FILES = {
    "j": ".json",
    "l": ".jsonl",
    "c": ".csv",
    "p": ".parquet",
    "z": ".jsonl.gz",
    "g": ".json.gz",
    "v": ".jsonl",
}
CONFIGS = "tsTSCyxY"  # YAML of train and of study, their command lines, that of score; the first three, made of values


_CLASSES = {"y": (TrainConfig, GAPOConfig), "x": (StudyConfig,), "Y": (TrainConfig, GAPOConfig)}


class Finding(AssertionError):
    """An outcome that is not accepted, though nothing was raised."""


@cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process, in memory where that can be, since each write is synced."""
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def folder() -> Path:
    """Where targets write the file that they then read."""
    return Path(temporary().name)


def pairs(raw: bytes) -> str:
    """`gapo.data.read_pairs` of a file of any kind; what it reads is written and read again."""
    kind, rest = _kind(raw, list(PAIR_FILES)), raw[1:]
    path = folder() / f"pairs{PAIR_FILES[kind]}"
    path.write_bytes({"g": lambda rest: gzip.compress(rest, 1), "v": fuzz_values.rows}.get(kind, bytes)(rest))
    try:
        found = data.read_pairs(path)
    except data.PairError as error:
        if str(path) not in str(error):
            raise Finding(f"the file is not named: {error}") from error
        return f"{kind} refused"
    for row in found.rows:
        if not all(isinstance(row[name], (str, list)) for name in ("prompt", "chosen", "rejected")):
            raise Finding(f"no pair: {row!r}")
    found.summary().encode()
    return f"{kind} read, {_again(found.rows)}, {'some' if found.problems else 'none'} left out"


def _kind(raw: bytes, kinds: Sequence[str]) -> str:
    """The one that the first byte names, or counts out."""
    return chr(raw[0]) if raw[:1] and chr(raw[0]) in kinds else kinds[sum(raw[:1]) % len(kinds)]


def _again(rows: list[dict[str, Any]]) -> str:
    copy = folder() / "again.jsonl"
    try:
        data.write_rows(copy, data.flip_pairs(rows, rate=1.0))
    except ValueError as error:  # dates and bytes of Parquet
        if "cannot be stored as JSON" not in str(error):
            raise
        return "not for JSON"
    again = data.read_pairs(copy, strict=True).rows
    if json.dumps(list(data.flip_pairs(rows, rate=1.0))) != json.dumps(list(again)):
        raise Finding("written and read again it is another")
    return "written"


def config(raw: bytes) -> str:
    """The parsers of `gapo train`, `gapo study` and `gapo score`: a YAML file, or arguments, one a line."""
    kind, rest = _kind(raw, CONFIGS), raw[1:]
    if kind in "yxY":
        made = fuzz_values.settings(rest, options.known_keys(_CLASSES[kind]))
        lines = (f"--{k}={v}" if kind == "Y" else f"{k}: {v}" for k, v in made.items())
        kind, rest = {"y": "t", "x": "s", "Y": "T"}[kind], "\n".join(lines).encode()
    arguments = rest.decode("utf-8", errors="surrogateescape").split("\n")
    if kind in "ts":
        path = folder() / "config.yaml"
        path.write_bytes(rest)
        arguments = [str(path)]
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()):
            found = _parsers()[kind](arguments)
    except ConfigError as error:
        if not str(error).strip() or "\n" in str(error) or len(str(error)) > 1000:
            raise Finding(f"not one line: {error}") from error
        return f"{kind} refused"
    except SystemExit as end:
        if end.code == 2 and "error: " not in told.getvalue():
            raise Finding("ended without a word") from end
        return f"{kind} {'refused' if end.code else 'help'}"
    for part in found:
        _require_types(part)
    return f"{kind} parsed"


@cache
def _parsers() -> Mapping[str, Callable[[list[str]], tuple[Any, ...]]]:
    for module in (train_command, study_command, score_command):  # making a parser takes longer than parsing
        module.make_parser = cache(module.make_parser)
    return {
        "t": train_command.parse,
        "T": train_command.parse,
        "s": lambda arguments: (study_command.parse(arguments),),
        "S": lambda arguments: (study_command.parse(arguments),),
        "C": score_command.parse,
    }


def _require_types(made: Any) -> None:
    """Every field is of its declared type, and can be written into config.json."""
    for name, hint in typing.get_type_hints(type(made)).items():
        value = getattr(made, name)
        if not _fits(value, hint):
            raise Finding(f"{name} is {value!r}, declared {hint}")
    json.dumps(vars(made), allow_nan=False).encode()


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        inner = [arg for arg in arguments if arg is not Ellipsis]
        return isinstance(value, origin) and all(any(_fits(v, arg) for arg in inner) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if arguments:
        return any(_fits(value, arg) for arg in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


TARGETS = {"pairs": pairs, "config": config}


def words(target: str) -> list[str]:
    """What inputs of a target are likely to hold, for the mutations."""
    if target == "pairs":
        row = [
            '{"prompt": "',
            '", "chosen": "',
            '", "rejected": "',
            '"}',
            '"is_flipped": true',
            '"is_flipped": 1',
            "\\ud800",
        ]
        messages = [
            '[{"role": "user", "content": "',
            '"}]',
            "prompt,chosen,rejected,is_flipped",
            "null",
            "NaN",
            "1e999",
        ]
        return [*row, *messages, '""', '"\n"', "\ufeff", "\x1f\ufffd", "PAR1", "[[[[", "{{{{", "\\u0000", "\r\n"]
    keys = options.known_keys((TrainConfig, GAPOConfig, StudyConfig, ScoreConfig))
    values = [
        ".nan",
        ".inf",
        "null",
        "true",
        "[1, 2]",
        "{a: 1}",
        "&a",
        "*a",
        "!!python/name:os.system",
        "<<: ",
        "1e9",
        "---",
    ]
    return [*dict.fromkeys(keys), *(f"--{key}" for key in dict.fromkeys(keys)), *values, "!!set", "!!binary", "\\x00"]


__all__ = ["TARGETS", "Finding", "folder", "words"]
