"""Answers as the benchmarks read them.

Sources, read on 26 November 2026: AlpacaEval's README ("model_outputs"), `gen_answer.py` and
`utils/add_markdown_info.py` of Arena-Hard-Auto 2, and `llm_judge/gen_model_answer.py` of FastChat.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gapo.files import write_rows, write_text
from gapo.runs.generate.questions import Question

Row = dict[str, Any]


def write_answers(
    path: Path, layout: str, questions: Sequence[Question], answers: Sequence[Sequence[str]], times: Sequence[float],
    name: str,
) -> None:  # fmt: skip
    """Write the answers of the model `name` to `path`, in the layout of a format, atomically.

    Args:
        answers: of each question, one text for each of its turns.
        times: when each question was answered, in seconds since 1970.
    """
    rows = [_LAYOUTS[layout](*answered, name) for answered in zip(questions, answers, times, strict=True)]
    if path.suffix == ".json":
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    else:
        write_rows(path, rows)


def _jsonl(question: Question, answers: Sequence[str], time: float, name: str) -> Row:
    more = {"outputs": list(answers)} if len(question.turns) > 1 else {}
    return {**question.row, "output": answers[-1], **more, "generator": name}


def _alpaca_eval(question: Question, answers: Sequence[str], time: float, name: str) -> Row:
    of_set: Row = {key: value for key, value in question.row.items() if key in ("dataset", "datasplit")}
    return {**of_set, "instruction": question.turns[0], "output": answers[0], "generator": name}


def _arena_hard(question: Question, answers: Sequence[str], time: float, name: str) -> Row:
    prompt = question.turns[0]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {
        "uid": question.row["uid"],
        "ans_id": _id(name, question.row["uid"], answers),
        "model": name,
        "messages": [*asked, {"role": "assistant", "content": {"answer": answers[0]}}],
        "tstamp": time,
        "metadata": {},  # filled by Arena-Hard's own utils/add_markdown_info.py
    }


def _mt_bench(question: Question, answers: Sequence[str], time: float, name: str) -> Row:
    return {
        "question_id": question.row["question_id"],
        "answer_id": _id(name, question.row["question_id"], answers),
        "model_id": name,
        "choices": [{"index": 0, "turns": list(answers)}],
        "tstamp": time,
    }


def _id(*parts: Any) -> str:
    """An id of the answer: the same for the same texts."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(parts)))


_LAYOUTS: dict[str, Callable[[Question, Sequence[str], float, str], Row]] = {
    "jsonl": _jsonl,
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
}
