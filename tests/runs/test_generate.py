"""`gapo generate`: the answers, the layouts of the benchmarks, interruptions and errors."""

import json
import logging
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from transformers import AutoModelForCausalLM

from gapo import cli, data
from gapo.data.raw_rows import PairError
from gapo.runs.errors import ConfigError
from gapo.runs.generate import generate as module
from gapo.runs.generate.generate_config import GenerateConfig

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} | {% endfor %}{% if add_generation_prompt %}yes: {% endif %}"
)
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without and one with a chat template; the tests only read them."""
    made = tmp_path_factory.mktemp("generate")
    for name in ("model", "chat"):
        hf_models.make("llama").save_pretrained(made / name)
        tokenizer = hf_models.tokenizer()
        tokenizer.chat_template = TEMPLATE if name == "chat" else None
        tokenizer.save_pretrained(made / name)
    return made


def settings(folder: Path, rows: list[dict[str, Any]], out: Path, model: str = "model", **more: Any) -> GenerateConfig:
    data.write_rows(out.parent / "prompts.jsonl", rows)
    quick = {"max_new_tokens": NEW, "batch_size": 2, "device": "cpu", **more}
    return GenerateConfig(
        prompts=str(out.parent / "prompts.jsonl"), model=str(folder / model), output=str(out), **quick
    )


def continued(folder: Path, text: str) -> str:
    """The likeliest continuation, token by token, each from a forward of its own; no padding, no cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), hf_models.tokenizer()
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + NEW:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


PROMPTS = ["What is the sum of 3 and 4?", "Say one.", "Which is greater, 5 or 2? Say it in one word, please."]


def test_answers_are_the_likeliest_continuations_whatever_else_is_in_the_batch(folder: Path, tmp_path: Path) -> None:
    done = module.generate(
        settings(folder, [{"prompt": p, "n": i} for i, p in enumerate(PROMPTS)], tmp_path / "a.jsonl")
    )
    rows = read(tmp_path / "a.jsonl")
    assert [row["output"] for row in rows] == [continued(folder, prompt) for prompt in PROMPTS]
    assert [(row["n"], row["generator"]) for row in rows] == [(0, "model"), (1, "model"), (2, "model")]
    assert done["answers"] == 3
    assert not (tmp_path / "a.jsonl.progress").exists()


def test_messages_and_benchmarks_go_through_the_chat_template(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": PROMPTS[1]}]}]
    module.generate(settings(folder, rows, tmp_path / "m.jsonl", "chat"))
    module.generate(settings(folder, [{"instruction": PROMPTS[1]}], tmp_path / "a.json", "chat", format="alpaca_eval"))
    module.generate(settings(folder, [{"prompt": PROMPTS[1]}], tmp_path / "s.jsonl", "chat", system="Be brief."))
    expected = continued(folder, f"user: {PROMPTS[1]} | yes: ")
    assert read(tmp_path / "m.jsonl")[0]["output"] == read(tmp_path / "a.json")[0]["output"] == expected
    assert expected != continued(folder, PROMPTS[1])
    briefly = continued(folder, f"system: Be brief. | user: {PROMPTS[1]} | yes: ")
    assert read(tmp_path / "s.jsonl")[0]["output"] == briefly


def test_a_second_turn_follows_the_first_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn is tokenised once."""
    turns: list[Any] = []
    plain = module.tokenize_prompt
    monkeypatch.setattr(module, "tokenize_prompt", lambda row, *more: turns.append(row) or plain(row, *more))
    rows = [{"question_id": 81, "category": "math", "turns": [PROMPTS[1], PROMPTS[0]]}]
    module.generate(settings(folder, rows, tmp_path / "mine.jsonl", "chat", format="mt_bench"))
    assert [len(row["prompt"]) for row in turns] == [1, 3]
    (row,) = read(tmp_path / "mine.jsonl")
    first = continued(folder, f"user: {PROMPTS[1]} | yes: ")
    second = continued(folder, f"user: {PROMPTS[1]} | assistant: {first} | user: {PROMPTS[0]} | yes: ")
    assert row["choices"] == [{"index": 0, "turns": [first, second]}]
    assert (row["question_id"], row["model_id"]) == (81, "mine")
    assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}


def test_layouts_of_alpaca_eval_and_arena_hard(folder: Path, tmp_path: Path) -> None:
    """AlpacaEval also brings its baseline's output, which must not stay."""
    rows: list[dict[str, Any]] = [{"dataset": "koala", "instruction": "Hi?", "output": "old", "generator": "gpt4"}]
    module.generate(settings(folder, rows, tmp_path / "a.json", "chat", format="alpaca_eval", generator="mine"))
    (row,) = read(tmp_path / "a.json")
    assert (row.pop("output") == "old", row) == (False, {"dataset": "koala", "instruction": "Hi?", "generator": "mine"})
    rows = [{"uid": "u1", "category": "hard_prompt", "prompt": "Hi?"}]
    module.generate(settings(folder, rows, tmp_path / "mine.jsonl", "chat", format="arena_hard"))
    (row,) = read(tmp_path / "mine.jsonl")
    answer = {"answer": continued(folder, "user: Hi? | yes: ")}
    assert row["messages"] == [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]
    assert (row["uid"], row["model"], row["metadata"]) == ("u1", "mine", {})


def test_an_answer_ends_at_its_closing_token(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing token that the model writes third leaves two tokens, and counts as no cut."""
    ids = hf_models.tokenizer()(PROMPTS[1])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    written: list[int] = []
    while len(written) < 3 or written[-1] in written[:-1]:
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    monkeypatch.setattr(module, "end_tokens", lambda *_: [written[-1]])
    done = module.generate(settings(folder, [{"prompt": PROMPTS[1]}], tmp_path / "a.jsonl"))
    assert done == {"answers": 1, "tokens": len(written) - 1, "cut": 0}


def test_temperatures_of_mt_bench_are_those_of_the_category(folder: Path, tmp_path: Path) -> None:
    def temperatures(**more: Any) -> list[float]:
        rows = [
            {"question_id": i, "category": c, "turns": ["x"]}
            for i, c in enumerate(("writing", "stem", "math", "other"))
        ]
        return [q.temperature for q in module.read_questions(settings(folder, rows, tmp_path / "q.jsonl", **more))]

    assert temperatures(format="mt_bench") == [0.7, 0.1, 0.0, 0.7]
    assert temperatures(format="mt_bench", temperature=0.5) == [0.5] * 4


def test_an_interrupted_call_goes_on_to_the_answers_of_a_whole_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS * 2]
    module.generate(settings(folder, rows, tmp_path / "whole.jsonl", temperature=1.0))
    config = settings(folder, rows, tmp_path / "again.jsonl", temperature=1.0)
    answer, calls = module._Answering.__call__, []

    def interrupted(self: Any, questions: Any, prompts: Any, batch: int) -> Any:
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, questions, prompts, batch)

    monkeypatch.setattr(module._Answering, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.generate(config)
    with pytest.raises(ConfigError, match=r"other settings \(seed: 0 -> 1\)"):
        module.generate(settings(folder, rows, tmp_path / "again.jsonl", temperature=1.0, seed=1))
    module.generate(config)
    assert calls == [1, 2, 2, 3]
    whole = [row["output"] for row in read(tmp_path / "whole.jsonl")]
    assert [row["output"] for row in read(tmp_path / "again.jsonl")] == whole
    assert whole[:3] != whole[3:], "sampled answers of equal prompts differ"


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"text": "x"}, {}, "line 1: jsonl takes one of the columns prompt, instruction, turns; the row has text"),
        ({"prompt": "x", "instruction": "y"}, {}, "takes one of the columns"),
        ({"prompt": "x"}, {"format": "arena_hard"}, "knows a question by its 'uid'"),
        ({"turns": []}, {}, "the column 'turns' must hold text"),
        ({"instruction": "x", "input": "y"}, {}, "'input' would be left out"),
        ({"prompt": [{"role": "user"}]}, {}, "the prompt must be text, or a list of messages"),
        ({"prompt": "x"}, {"chat": True}, "has no chat template"),
        ({"prompt": "x"}, {"max_new_tokens": 4096}, "go beyond the 2048 positions"),
        ({"prompt": "x"}, {"format": "mt_bench", "output": "m.jsonl"}, "takes one of the columns turns"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, row: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    config = settings(folder, [row], tmp_path / more.pop("output", "a.jsonl"), **more)
    with pytest.raises((PairError, ConfigError), match=message):
        module.generate(config)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_settings_that_contradict_each_other(folder: Path, tmp_path: Path) -> None:
    rows = [{"question_id": 1, "turns": ["x"]}]
    for more, message in (
        ({"format": "alpaca_eval"}, "must end in .json"),
        (
            {"format": "mt_bench", "generator": "other"},
            "names a model by its file of answers: give the output other.jsonl",
        ),
        ({"system": "x", "chat": False}, "leave out one of them"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(folder, rows, tmp_path / "mine.jsonl", **more)
    with pytest.raises(PairError, match="question_id 1 occurs twice"):
        module.read_questions(settings(folder, rows * 2, tmp_path / "mine.jsonl", format="mt_bench"))


def test_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data.write_rows(tmp_path / "p.jsonl", [{"instruction": "Hi?"}])
    command = ["generate", str(tmp_path / "p.jsonl"), "--model", str(folder / "model"), "--format", "alpaca_eval"]
    command += ["--output", str(tmp_path / "a.json"), "--max_new_tokens", "2"]
    with caplog.at_level(logging.WARNING):
        assert cli.main(command) == 0
    assert "continues each prompt as text" in caplog.text
    printed = capsys.readouterr()
    assert f"1 answers: {tmp_path / 'a.json'}" in printed.out
    assert cli.main(command) == 1
    assert "is there already: give another output, or overwrite" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
