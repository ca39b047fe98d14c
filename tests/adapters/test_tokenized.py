"""What the collator of a Trainer, and the data sets of `GAPOTrainer`, make of rows: cut, left out, refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import hf_models
import pytest
import torch
from token_pairs import bytes_tokenizer

from gapo import data
from gapo.adapters.hf import GAPOConfig, GAPOTrainer, PreferenceCollator
from gapo.data import tokenize_pair

BYTES = bytes_tokenizer(opens="<b>")
GOOD = {"prompt": "ab", "chosen": "1", "rejected": "2"}
EQUAL = {"prompt": "ab", "chosen": "01234567", "rejected": "01234599"}
ROWS = [GOOD, {**GOOD, "prompt": "abcdefgh"}, EQUAL, {**GOOD, "chosen": "3"}]
CHAT = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"


def trainer(folder: Path, rows: Any, **options: Any) -> GAPOTrainer:
    args = GAPOConfig(str(folder), report_to="none", use_cpu=True, max_steps=1, max_length=6, **options)
    return GAPOTrainer(hf_models.make("llama"), args, train_dataset=rows, processing_class=BYTES)


@pytest.mark.parametrize("kind", ["list", "table", "data set", "streamed"])
def test_pairs_that_come_out_equal_are_left_out_of_a_data_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    made = datasets.Dataset.from_list(ROWS)
    rows = {"list": ROWS, "table": made.to_pandas(), "data set": made, "streamed": made.to_iterable_dataset()}[kind]
    with caplog.at_level(logging.WARNING, logger="gapo"):
        found = list(trainer(tmp_path, rows).train_dataset)
    assert [row["chosen"] for row in found] == ["1", "1", "3"]
    for row, before in zip(found, (ROWS[0], ROWS[1], ROWS[3]), strict=True):
        expected = tokenize_pair(before, BYTES, max_length=6)
        assert {name: row[name] for name in expected} == expected
        assert not any(name.startswith("_") for name in row)
    if kind == "streamed":
        assert caplog.messages == [
            "train_dataset: max_length=6 cuts prompts or the ends of answers",
            "train_dataset: pairs whose answers are the same tokens are left out",
        ]
    else:
        assert caplog.messages == [
            "train_dataset: max_length=6, max_prompt_length=None cut the prompts of 2 (row 1, 2) and the ends of the "
            "answers of 1 (row 2) of 4 pairs; left out, since their answers are the same tokens: 1 (row 2)"
        ]


def test_what_holds_no_rows_is_refused_before_the_training(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    for rows, reason in ((splits, "a dict of train: choose a split"), ("a.jsonl", "'a.jsonl': read a file with")):
        with pytest.raises(TypeError, match=f"train_dataset must be a list of dicts, .*, got {reason}"):
            trainer(tmp_path, rows)


def test_rows_of_a_file_are_tokenised_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data.write_rows(tmp_path / "a.jsonl", ROWS)
    rows = data.read_pairs(tmp_path / "a.jsonl").rows
    expected = trainer(tmp_path, ROWS).train_dataset
    for _ in range(2):
        found = trainer(tmp_path, rows)
        assert found.train_dataset == expected
        assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    found.train()


def test_a_data_set_is_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokenizer and the collator went through before, for all ranks and for the next run."""
    calls = []
    whole = PreferenceCollator.tokens_of_each
    monkeypatch.setattr(PreferenceCollator, "tokens_of_each", lambda *args: calls.append(len(args[1])) or whole(*args))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    first = trainer(tmp_path, datasets.load_from_disk(tmp_path / "saved")).train_dataset
    BYTES("a longer text", truncation=True, max_length=3)
    again = trainer(tmp_path, datasets.load_from_disk(tmp_path / "saved")).train_dataset
    assert first[:] == again[:]
    assert calls == [4]
    args = GAPOConfig(str(tmp_path), report_to="none", use_cpu=True, max_length=None)
    other = GAPOTrainer(
        hf_models.make("llama"),
        args,
        train_dataset=datasets.load_from_disk(tmp_path / "saved"),
        processing_class=BYTES,
    ).train_dataset
    assert len(other) == 4
    assert calls == [4, 4]


def test_a_bad_row_is_named_by_number(tmp_path: Path) -> None:
    bad = [GOOD, GOOD, {**GOOD, "rejected": " "}]
    for rows in (bad, datasets.Dataset.from_list(bad)):
        with pytest.raises(ValueError, match=r"row 2 of train_dataset: a row is no preference pair: column 'rejected'"):
            trainer(tmp_path, rows)
    with pytest.raises(ValueError, match=r"row 0 of train_dataset: a row is no preference pair: not an object with c"):
        trainer(tmp_path, ["text"])
    with pytest.raises(ValueError, match=r"row 1 of train_dataset: column 'images' holds media, not text"):
        trainer(tmp_path, [GOOD, {**GOOD, "images": ["a.png"]}])
    with pytest.raises(ValueError, match=r"train_dataset: no pair is left"):
        trainer(tmp_path, [EQUAL])
    with pytest.raises(ValueError, match=r"row 1 of the batch: a row is no preference pair: column 'rejected'"):
        PreferenceCollator(BYTES)(bad[1:])


def test_advice_on_columns_is_given_where_some_are_missing() -> None:
    collator = PreferenceCollator(BYTES)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        collator([{"prompt": "a"}])
    for row in ({**GOOD, "chosen": "2"}, {**GOOD, "chosen": 1}, {**GOOD, "is_flipped": "perhaps"}):
        with pytest.raises(ValueError, match="a row is no preference pair") as raised:
            collator([row])
        assert "remove_unused_columns" not in str(raised.value)


def test_a_collator_keeps_its_rows_and_tells_the_first_cut(caplog: pytest.LogCaptureFixture) -> None:
    collator = PreferenceCollator(BYTES, max_length=6)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        batch = collator([ROWS[1], EQUAL, EQUAL])
    assert torch.equal(batch["chosen_input_ids"][1:], batch["rejected_input_ids"][1:])
    cut, equal = caplog.messages
    assert cut.startswith("max_length=6, max_prompt_length=None cut 5 tokens of a prompt and 0 of the ends of its ans")
    assert "are the same tokens within max_length=6" in equal
    assert "It is kept" in equal


def test_no_limit_and_limits_that_are_none() -> None:
    long = {**GOOD, "prompt": "a" * 2000}
    assert PreferenceCollator(BYTES, max_length=None)([long])["chosen_input_ids"].shape == (1, 2003)
    assert PreferenceCollator(BYTES)([long])["chosen_input_ids"].shape == (1, 1024)
    for wrong, match in (
        ({"max_length": "512"}, "max_length must be a whole number or None, got '512'"),
        ({"max_length": 1}, "max_length must be >= 2"),
        ({"max_prompt_length": 0}, "max_prompt_length must be >= 1 or None, got 0"),
        ({"pad_to_multiple_of": "auto"}, "pad_to_multiple_of must be a whole number or None, got 'auto'"),
        ({"padding_side": "auto"}, "padding_side must be 'left' or 'right', got 'auto'"),
    ):
        with pytest.raises(ValueError, match=match):
            PreferenceCollator(BYTES, **wrong)


def test_the_tokenizer_of_a_processor_reads_the_texts() -> None:
    """A processor has its own pad token in its tokenizer alone, and reads texts and images together."""
    processor = SimpleNamespace(tokenizer=BYTES, image_processor=object())
    expected = PreferenceCollator(BYTES)([GOOD])
    for name, array in PreferenceCollator(processor)([GOOD]).items():
        assert torch.equal(array, expected[name])
    assert tokenize_pair(GOOD, processor) == tokenize_pair(GOOD, BYTES)
    with pytest.raises(
        ValueError, match="tokenizer must be a transformers tokenizer, or a processor that has one; got"
    ):
        PreferenceCollator(SimpleNamespace(image_processor=object()))


def test_a_kept_column_that_says_nothing_is_named_by_row() -> None:
    collator = PreferenceCollator(BYTES, keep=("is_flipped",))
    rows = [{**GOOD, "is_flipped": True}, {**GOOD, "is_flipped": None}]
    with pytest.raises(ValueError, match=r"column 'is_flipped' was to be kept, but a row lacks it: row 1 of the batch"):
        collator(rows)
    assert collator(rows[:1])["is_flipped"].tolist() == [True]


def test_tools_of_a_data_set_reach_the_template(tmp_path: Path) -> None:
    """Arrow fills in keys that other messages have; the template must not see them."""
    template = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + CHAT.replace(
        "<e>", "{% if m.tool_calls is defined %}<call>{{ m.tool_calls[0].name }}{% endif %}<e>"
    )
    t = bytes_tokenizer(template)
    ask, call = {"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}
    row = {"prompt": [ask], "chosen": [{**call, "content": ""}], "rejected": [{"role": "assistant", "content": "no"}],
           "tools": '[{"name": "f"}]'}  # fmt: skip
    args = GAPOConfig(str(tmp_path), report_to="none", use_cpu=True)
    found = GAPOTrainer(
        hf_models.make("llama"), args, train_dataset=datasets.Dataset.from_list([row]), processing_class=t
    ).train_dataset[0]
    assert t.decode(found["chosen_input_ids"]) == "[f]hi<e><call>f<e>"
    assert t.decode(found["rejected_input_ids"]) == "[f]hi<e>no<e>"
