"""From prompts and a model to a file of answers, batch by batch, resumed after an interruption.

Each batch is a line of a log beside the output. Sampling is seeded for each batch and turn, so that a
resumed call writes the answers of an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gapo.adapters.hf.generation import generation_config, left_padded
from gapo.adapters.hf.models.architecture import end_tokens, most_positions
from gapo.data.streams import stream
from gapo.data.tokenize import tokenize_prompt
from gapo.files import JsonLines, read_lines, require_writable
from gapo.runs import held_out
from gapo.runs.errors import ConfigError, changes
from gapo.runs.generate.formats import write_answers
from gapo.runs.generate.generate_config import GenerateConfig, settings_of
from gapo.runs.generate.questions import Question, read_questions
from gapo.runs.ranks import require_one
from gapo.runs.score.sources import fingerprint, load, require_loadable, source_of

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def generate(config: GenerateConfig) -> Row:
    """Answer the prompts and write the answers.

    Returns:
        "answers", their number; "tokens", their mean length without the closing token; "cut", how many of them
        max_new_tokens ended.

    Raises:
        ConfigError: the model cannot be loaded, a prompt does not fit it, or the output is there already.
        gapo.data.PairError: the prompts cannot be read; it names the line.
    """
    require_one("gapo generate")
    output = Path(config.output)
    require_writable(output.parent)
    if output.exists() and not config.overwrite:
        raise ConfigError(f"{output} is there already: give another output, or overwrite")
    source = source_of(config.model, config.adapter)
    require_loadable([source], config)
    questions = read_questions(config)
    settings = {
        **settings_of(config),
        "prompts_sha256": held_out.fingerprint([question.row for question in questions]),
        "weights_sha256": fingerprint([source]),
    }
    log_path = output.with_name(f"{output.name}.progress")
    lines = _earlier(log_path, settings, config.overwrite)
    model, tokenizer = load(source, config)
    answering = _Answering(model, tokenizer, config)
    first_turns = [answering.ids(question, []) for question in questions]
    batches = list(_plan(questions, [len(ids) for ids in first_turns], config.batch_size))
    log = JsonLines(log_path, until_step=len(lines))
    try:
        if not lines:
            log.write({"settings": settings})
        bar = tqdm(total=len(questions), initial=sum(len(line["rows"]) for line in lines), desc="generating")
        with bar:
            for number, rows in list(enumerate(batches, start=1))[len(lines) :]:
                texts, counts = answering([questions[i] for i in rows], [first_turns[i] for i in rows], number)
                line = {"step": number, "rows": rows, "texts": texts, "tokens": counts, "time": time.time()}
                log.write(line)
                lines.append(line)
                bar.update(len(rows))
    finally:
        log.close()
    return _finish(questions, lines, config, output, log_path)


def _earlier(path: Path, settings: Row, overwrite: bool) -> list[Row]:
    """The lines of an interrupted call with the same settings."""
    head, *lines = read_lines(path) or [{}]
    if overwrite or not head:
        return []
    settings, earlier = json.loads(json.dumps(settings)), head.get("settings", {})
    if changed := changes(settings, earlier, settings):
        raise ConfigError(f"{path} holds answers of other settings ({changed}): give another output, or overwrite")
    return lines


def _plan(questions: Sequence[Question], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of one temperature and number of turns, the longest prompts first: a batch too large fails at once."""
    kinds: dict[tuple[float, int], list[int]] = {}
    for i in sorted(range(len(questions)), key=lambda i: -lengths[i]):
        kinds.setdefault((questions[i].temperature, len(questions[i].turns)), []).append(i)
    for rows in kinds.values():
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


class _Answering:
    """A loaded model that answers batches of questions of one temperature and number of turns."""

    def __init__(self, model: Any, tokenizer: Any, config: GenerateConfig) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._ends = end_tokens(model, tokenizer)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        by_default = config.system is not None or (config.format != "jsonl" and has_template)
        self._chat = by_default if config.chat is None else config.chat
        if self._chat and not has_template:
            raise ConfigError(
                f"the tokenizer of {config.model!r} has no chat template to put a message in: leave out chat and "
                "system, or set a template and save the tokenizer"
            )
        if config.format != "jsonl" and not self._chat:
            logger.warning(
                "the model continues each prompt as text: its tokenizer has no chat template, or chat is false"
            )

    def __call__(
        self, questions: Sequence[Question], prompts: list[list[int]], batch: int
    ) -> tuple[list[list[str]], list[list[int]]]:
        """The answers of each question, one for each turn, and their tokens; -1 where max_new_tokens cut it.

        `prompts` are the ids of the first turns.
        """
        texts: list[list[str]] = [[] for _ in questions]
        counts: list[list[int]] = [[] for _ in questions]
        for turn in range(len(questions[0].turns)):
            if turn:
                prompts = [self.ids(question, said) for question, said in zip(questions, texts, strict=True)]
            torch.manual_seed(_seed(self._config.seed, batch, turn))
            for place, ids in enumerate(self._generate(prompts, questions[0].temperature)):
                ended = bool(ids) and ids[-1] in self._ends
                texts[place].append(self._tokenizer.decode(ids, skip_special_tokens=True).strip())
                counts[place].append(len(ids) - 1 if ended else -1)
        return texts, counts

    def ids(self, question: Question, said: Sequence[str]) -> list[int]:
        """The ids of the conversation so far: the user's turns, each but the last with its answer.

        Raises:
            ConfigError: they leave no room for an answer.
        """
        row = {**question.row, "prompt": self._prompt(question, said)}
        ids = tokenize_prompt(row, self._tokenizer)
        most = most_positions(self._model)
        if most is not None and len(ids) + self._config.max_new_tokens > most:
            raise ConfigError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={self._config.max_new_tokens} go beyond the "
                f"{most} positions of model {self._config.model!r}: lower max_new_tokens, or shorten the prompt that "
                f"begins {str(question.turns[0])[:60]!r}"
            )
        return ids

    def _prompt(self, question: Question, said: Sequence[str]) -> Any:
        turns = question.turns[: len(said) + 1]
        if isinstance(turns[0], list):
            messages = list(turns[0])
        elif self._chat:
            messages = [{"role": "user", "content": turns[0]}]
            for answer, turn in zip(said, turns[1:], strict=True):
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        else:
            parts = [turns[0], *(part for pair in zip(said, turns[1:], strict=True) for part in pair)]
            return "\n\n".join(parts)
        if self._config.system is not None:
            messages = [{"role": "system", "content": self._config.system}, *messages]
        return messages

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Sequence[int]], temperature: float) -> Iterator[list[int]]:
        """The ids of each answer, to its first closing token."""
        config = self._config
        ids, mask = left_padded([torch.tensor(prompt) for prompt in prompts], self._model.device)
        how = generation_config(
            max_new_tokens=config.max_new_tokens, temperature=temperature, top_p=config.top_p, ends=self._ends
        )
        output = self._model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        for answer in output[:, ids.shape[1] :].tolist():
            end = next((place + 1 for place, token in enumerate(answer) if token in self._ends), len(answer))
            yield answer[:end]


def _seed(seed: int, *more: int) -> int:
    """A seed of PyTorch's generator for one batch and turn."""
    return int(stream(seed, "answers", *more).integers(2**32))


def _finish(
    questions: Sequence[Question], lines: Sequence[Row], config: GenerateConfig, output: Path, log: Path
) -> Row:
    texts: dict[int, list[str]] = {}
    times: dict[int, float] = {}
    counts: list[int] = []
    for line in lines:
        for i, said, tokens in zip(line["rows"], line["texts"], line["tokens"], strict=True):
            texts[i], times[i] = said, line["time"]
            counts += tokens
    places = range(len(questions))
    write_answers(output, config.format, questions, [texts[i] for i in places], [times[i] for i in places], config.name)
    log.unlink(missing_ok=True)
    whole = [count for count in counts if count >= 0]
    mean = sum(whole) / len(whole) if whole else float("nan")
    return {"answers": len(counts), "tokens": mean, "cut": len(counts) - len(whole)}
