"""The prompts of `gapo generate`: one or several turns of a user, from the layouts of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gapo.data.messages import is_conversation, media_of
from gapo.data.raw_rows import PairError, Source, Unreadable, read_rows
from gapo.runs.generate.generate_config import GenerateConfig

Row = dict[str, Any]

_COLUMNS = ("prompt", "instruction", "turns")
# The column by which a benchmark knows a question, and the columns of its layout.
_IDS = {"arena_hard": "uid", "mt_bench": "question_id"}
_OF_FORMAT = {"alpaca_eval": ("instruction",), "arena_hard": ("prompt",), "mt_bench": ("turns",)}
# MT-Bench's own, by category: `temperature_config` of FastChat's llm_judge/common.py, which has 0.7 for all others.
_TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
_OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Question:
    """What is put to the model.

    Attributes:
        row: the row as it was read.
        turns: what the user says, in order: texts, or one conversation. The model answers each before the next.
        temperature: of the answers.
    """

    row: Row
    turns: tuple[Any, ...]
    temperature: float


def read_questions(config: GenerateConfig) -> list[Question]:
    """The questions of `config.prompts`.

    Raises:
        PairError: the source cannot be read, or a row is not a question; it names the line. An incomplete set of
            answers would be scored as a whole one, so no row is left out.
    """
    questions: list[Question] = []
    for line, row in read_rows(Source(config.prompts, config.split)):
        try:
            questions.append(_question(row, config))
        except ValueError as error:
            raise PairError(f"{config.prompts}, line {line}: {error}") from None
        if len(questions) == config.limit:
            break
    if not questions:
        raise PairError(f"{config.prompts} holds no prompt")
    if (name := _IDS.get(config.format)) is not None:
        _require_distinct(questions, name, config)
    return questions


def _question(row: Any, config: GenerateConfig) -> Question:
    if isinstance(row, Unreadable):
        raise ValueError(row)
    if not isinstance(row, dict):
        raise ValueError(f"a prompt is a row with {' or '.join(_COLUMNS)}, got {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    accepted = _OF_FORMAT.get(config.format, _COLUMNS)
    named = [name for name in accepted if name in row]
    if len(named) != 1:
        columns = ", ".join(map(str, row))
        raise ValueError(f"{config.format} takes one of the columns {', '.join(accepted)}; the row has {columns}")
    if row.get("input"):
        raise ValueError("the column 'input' would be left out: join it to the instruction")
    name_of_id = _IDS.get(config.format)
    if name_of_id is not None and name_of_id not in row:
        raise ValueError(f"{config.format} knows a question by its {name_of_id!r}, which the row lacks")
    return Question(row, tuple(_turns(named[0], row[named[0]])), _temperature(row, config))


def _turns(name: str, value: Any) -> Iterator[Any]:
    if name == "prompt" and not isinstance(value, str):
        if not (is_conversation(value) and value):
            raise ValueError("the prompt must be text, or a list of messages with role and content")
        if media_of(value):
            raise ValueError(f"the prompt has a part of the type {media_of(value)[0]!r}; accepted are parts of text")
        yield value
        return
    for turn in value if name == "turns" and isinstance(value, list) and value else [value]:
        text = turn.get("content") if isinstance(turn, dict) else turn
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the column {name!r} must hold text, got {turn!r}")
        yield text


def _temperature(row: Row, config: GenerateConfig) -> float:
    if config.temperature is not None:
        return config.temperature
    return _TEMPERATURES.get(row.get("category", ""), _OTHER_TEMPERATURE) if config.format == "mt_bench" else 0.0


def _require_distinct(questions: list[Question], name: str, config: GenerateConfig) -> None:
    ids = [question.row[name] for question in questions]
    if twice := next((number for number in ids if ids.count(number) > 1), None):
        raise PairError(f"{config.prompts}: {name} {twice!r} occurs twice, and {config.format} would keep one answer")
