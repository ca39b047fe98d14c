"""Pairs in, batches out."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pairs import CONVERSATION, GOOD

from gapo import data

BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"}': "column 'rejected' is missing",
    b'{"prompt": "a", "chosen": " ", "rejected": "c"}': "column 'chosen' is empty",
    b'{"prompt": "a", "chosen": "c", "rejected": "c"}': "chosen equals rejected",
    b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}': "not UTF-8",
    b'{"prompt": "a",': "not valid JSON",
    b"[1, 2]": "not an object with columns, but list",
    b"null": "not an object with columns, but null",
    b'{"prompt": "a", "chosen": 1, "rejected": "c"}': "column 'chosen' is neither text nor a list of messages",
    b'{"prompt": "a", "chosen": [{"role": "x", "content": "y"}], "rejected": "c"}': "text and messages are mixed",
    b'{"prompt": "a", "chosen": "b", "rejected": "c", "is_flipped": 3}': "column 'is_flipped' is not true or false",
    b'{"chosen": "a b ", "rejected": "a b c"}': "is empty after the shared prompt",
}


def write(path: Path, lines: list[bytes]) -> Path:
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json"])
def test_bad_rows_are_counted_and_named_with_their_line(tmp_path: Path, name: str) -> None:
    good = json.dumps(GOOD).encode()
    path = write(tmp_path / name, [good, *BAD_LINES, b"", good])
    pairs = data.read_pairs(path)
    assert pairs.rows == [GOOD, GOOD]
    assert [problem.line for problem in pairs.problems] == list(range(2, 2 + len(BAD_LINES)))
    for problem, reason in zip(pairs.problems, BAD_LINES.values(), strict=True):
        assert reason in problem.reason
    assert "2 pairs, 11 rows left out" in pairs.summary()
    assert "1 x not UTF-8 (line 5)" in pairs.summary()


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_strict_stops_at_the_first_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [json.dumps(GOOD).encode(), line])
    with pytest.raises(data.PairError, match=rf"line 2: .*{re.escape(reason)}.*Mend or remove the row"):
        data.read_pairs(path, strict=True)


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [{**GOOD, "prompt": f'line {i}\n"quoted", ', "is_flipped": bool(i % 2)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data.write_rows(tmp_path / "a.jsonl.gz", rows)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved"):
        assert data.read_pairs(tmp_path / name).rows == rows, name
    assert len(data.read_pairs(tmp_path / "a.json", limit=2).rows) == 2


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gone.jsonl", r"gone.jsonl does not exist"),
        ("data.pkl", r"is a .pkl file, which may run code when read; accepted are .json"),
        ("data.txt", r"has no known ending; accepted are .json"),
        ("no-such-data-set", r"is neither a file .* nor a data set that could be loaded \(split 'train'\)"),
        ("empty.jsonl", r"no usable pair found"),
        ("broken.jsonl.gz", r"is not a whole gzip file"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, name: str, match: str) -> None:
    for existing in ("data.pkl", "data.txt", "empty.jsonl", "broken.jsonl.gz"):
        (tmp_path / existing).write_bytes(b"")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}' * 100)[:-9])
    with pytest.raises(data.PairError, match=match):
        data.read_pairs(tmp_path / name)


def test_the_prompt_is_what_both_answers_begin_with(tmp_path: Path) -> None:
    rows = [
        {"chosen": "Why is it so? Because.", "rejected": "Why is it so? Become."},
        {part: CONVERSATION["prompt"] + CONVERSATION[part] for part in ("chosen", "rejected")},
    ]
    data.write_rows(tmp_path / "a.jsonl", rows)
    text, messages = data.read_pairs(tmp_path / "a.jsonl").rows
    assert text == {"prompt": "Why is it so? ", "chosen": "Because.", "rejected": "Become."}
    assert messages == CONVERSATION


@given(st.binary(max_size=200))
def test_reading_bytes_never_fails_otherwise(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.jsonl", "a.json", "a.csv", "a.jsonl.gz"):
        (folder / name).write_bytes(raw)
        with pytest.raises(data.PairError):  # no 200 random bytes are a pair
            data.read_pairs(folder / name)


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    data.write_rows(path, [GOOD])

    def failing() -> object:
        yield GOOD
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_rows(path, failing())  # type: ignore[arg-type]
    assert path.read_text() == json.dumps(GOOD) + "\n"
    assert list(tmp_path.iterdir()) == [path]


@given(n=st.integers(1, 60), rate=st.floats(0, 1), seed=st.integers(0, 9))
def test_random_flips(n: int, rate: float, seed: int) -> None:
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "bb"} for i in range(n)]
    flipped = data.flip_pairs(rows, rate=rate, seed=seed)
    assert sum(row["is_flipped"] for row in flipped) == round(rate * n)
    for before, after in zip(rows, flipped, strict=True):
        swapped = {**before, "chosen": "bb", "rejected": "a"} if after["is_flipped"] else before
        assert after == {**swapped, "is_flipped": after["is_flipped"]}
    assert flipped == data.flip_pairs(rows, rate=rate, seed=seed)
    assert "is_flipped" not in rows[0]


def test_length_flips_favour_a_length() -> None:
    rows = [{"prompt": "p", "chosen": "a" * i, "rejected": "b" * 5} for i in range(1, 10)]
    for favour, sign in (("longer", 1), ("shorter", -1)):
        flipped = [r for r in data.flip_pairs(rows, mode="length", rate=4 / 9, favour=favour) if r["is_flipped"]]
        assert len(flipped) == 4
        assert all(sign * (len(row["chosen"]) - len(row["rejected"])) > 0 for row in flipped)
    with pytest.raises(ValueError, match=r"rate=0.5 asks for 4 flips|the greatest rate here is 0.4444"):
        data.flip_pairs(rows, mode="length", rate=0.6)
    for wrong, match in (({"rate": 1.5}, "rate must be in"), ({"rate": 0, "mode": "x"}, "mode must be 'random'")):
        with pytest.raises(ValueError, match=match):
            data.flip_pairs(rows, **wrong)


def test_flipping_twice_is_the_truth_again() -> None:
    rows = data.flip_pairs([GOOD], rate=1)
    assert data.flip_pairs(rows, rate=1) == [{**GOOD, "is_flipped": False}]


def test_tokens_of_prompt_and_answer() -> None:
    tokenizer = hf_models.tokenizer()
    row = data.generate_pairs(1)[0]
    out = data.tokenize_pair(row, tokenizer)
    for side in ("chosen", "rejected"):
        ids, labels = out[f"{side}_input_ids"], out[f"{side}_labels"]
        assert tokenizer.decode([t for t in labels if t != -100]).strip() == (row[side] + "<|end|>").strip()
        assert len(ids) == len(labels)
        masked = labels.index(next(t for t in labels if t != -100))
        assert all(t == -100 for t in labels[:masked])
        assert ids[masked:] == labels[masked:]
    assert out["chosen_labels"][-1] == tokenizer.eos_token_id


@given(max_length=st.integers(2, 40), max_prompt=st.none() | st.integers(1, 20))
def test_truncation_keeps_the_start_of_the_answer(max_length: int, max_prompt: int | None) -> None:
    tokenizer = hf_models.tokenizer()
    row = data.generate_pairs(1)[0]
    whole = data.tokenize_pair(row, tokenizer)
    cut = data.tokenize_pair(row, tokenizer, max_length=max_length, max_prompt_length=max_prompt)
    for side in ("chosen", "rejected"):
        answer = [t for t in whole[f"{side}_labels"] if t != -100]
        kept = [t for t in cut[f"{side}_labels"] if t != -100]
        prompt = cut[f"{side}_input_ids"][: -len(kept)]
        assert len(cut[f"{side}_input_ids"]) <= max_length
        assert kept == answer[: max_length - 1]
        assert 1 <= len(prompt) <= (max_prompt or max_length)
        assert whole[f"{side}_input_ids"][: -len(answer)][-len(prompt) :] == prompt


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = hf_models.tokenizer()
    turn = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}assistant {% endif %}"
    try:
        out = data.tokenize_pair(CONVERSATION, tokenizer)
        assert tokenizer.decode([t for t in out["chosen_labels"] if t != -100]).strip() == "yes"
        assert "user" in tokenizer.decode(out["chosen_input_ids"])
    finally:
        tokenizer.chat_template = None


def test_tokenizing_what_has_no_token() -> None:
    with pytest.raises(ValueError, match=r"max_length must be >= 2"):
        data.tokenize_pair(GOOD, hf_models.tokenizer(), max_length=1)
    with pytest.raises(ValueError, match=r"max_prompt_length must be >= 1 or None, got 0"):
        data.tokenize_pair(GOOD, hf_models.tokenizer(), max_prompt_length=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    rows = hf_models.pairs(4)
    batch = data.collate_pairs(rows, pad_token_id=0, padding_side=side, pad_to_multiple_of=8)
    seq = batch["chosen_input_ids"].shape[1]
    assert seq % 8 == 0
    for answer in ("chosen", "rejected"):
        for i, row in enumerate(rows):
            real = batch[f"{answer}_attention_mask"][i] == 1
            assert batch[f"{answer}_input_ids"][i][real].tolist() == row[f"{answer}_input_ids"]
            assert (batch[f"{answer}_labels"][i][~real] == -100).all()
            assert real[0 if side == "right" else -1]
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'middle'"):
        data.collate_pairs(rows, pad_token_id=0, padding_side="middle")
    with pytest.raises(ValueError, match="'chosen_labels' is missing"):
        data.collate_pairs([{"chosen_input_ids": [1]}], pad_token_id=0)


@given(n=st.integers(1, 12), size=st.integers(1, 5), epochs=st.integers(1, 2), skip=st.integers(0, 3))
def test_batches_hold_every_row_once_an_epoch(n: int, size: int, epochs: int, skip: int) -> None:
    rows = [{name: [i, i] for name in data.collate.TOKENIZED} for i in range(n)]
    whole = list(data.batches(rows, size, pad_token_id=0, epochs=epochs, seed=1))
    seen = np.concatenate([batch["index"] for batch in whole])
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    for batch in whole:
        assert (batch["chosen_input_ids"][:, 0] == batch["index"]).all()
    rest = list(data.batches(rows, size, pad_token_id=0, epochs=epochs, seed=1, skip=skip))
    assert [b["index"].tolist() for b in rest] == [b["index"].tolist() for b in whole[skip:]]


def test_batches_have_few_lengths() -> None:
    rows = [{name: [1] * n for name in data.collate.TOKENIZED} for n in range(3, 41)]

    def lengths(**options: Any) -> set[int]:
        return {b["chosen_input_ids"].shape[1] for b in data.batches(rows, 1, pad_token_id=0, **options)}

    assert lengths() == {32, 40}  # never beyond the longest row, which the model must take in any case
    assert lengths(pad_to_multiple_of=1) == set(range(3, 41))
    assert lengths(pad_to_multiple_of=16) == {16, 32, 48}
    assert [b["chosen_labels"].shape for b in data.batches(rows[:2], 2, pad_token_id=0)] == [(2, 4)]


@pytest.mark.parametrize(("longest", "step"), [(512, 32), (513, 64), (2000, 128)])
def test_long_rows_have_at_most_16_lengths(longest: int, step: int) -> None:
    """Each is the next multiple, so that no row gains more than an eighth of the longest."""
    rows = [{name: [1] * n for name in data.collate.TOKENIZED} for n in range(3, longest + 1)]
    made = [(b["index"][0] + 3, b["chosen_input_ids"].shape[1]) for b in data.batches(rows, 1, pad_token_id=0)]
    assert all(width == min(longest, -(-n // step) * step) for n, width in made)
    assert len({width for _, width in made}) <= 16
    assert max(width - n for n, width in made) < longest / 8
    measured = set()

    def measure(batch: Any) -> tuple[list[float], list[float]]:
        measured.add(batch["chosen_input_ids"].shape[1])
        return [0.0], [0.0]

    data.with_reference_logps(rows, measure, pad_token_id=0, batch_size=1, progress=None)
    assert measured == {-(-n // step) * step for n in range(3, longest + 1)}


def test_generated_pairs_have_known_answers_and_disjoint_splits() -> None:
    train, test = (data.generate_pairs(500, split=split) for split in ("train", "test"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert train == data.generate_pairs(500)
    for row in train:
        if row["family"] == "greater":
            a, b = map(int, re.findall(r"\d+", row["prompt"]))
            assert int(re.findall(r"\d+", row["chosen"])[0]) == max(a, b)
            assert int(re.findall(r"\d+", row["rejected"])[0]) == min(a, b)
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in train])
    shorter = np.mean([len(row["chosen"]) < len(row["rejected"]) for row in train])
    assert abs(longer - shorter) < 0.1  # length does not tell
    assert len(data.warmup_text(7).split("\n")) >= 7


def summed(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Minus the sum of the ids that count, as if that were a log-probability."""
    sides = (batch[f"{side}_labels"] for side in ("chosen", "rejected"))
    chosen, rejected = (-np.where(labels == -100, 0, labels).sum(-1).astype(float) for labels in sides)
    return chosen, rejected


def test_reference_log_probs_stand_beside_the_tokens_and_in_the_batches() -> None:
    rows = [
        {"chosen_input_ids": [9] * n, "chosen_labels": [-100, *[n] * (n - 1)]}
        | {"rejected_input_ids": [9, 1], "rejected_labels": [-100, n]}
        for n in (3, 7, 2, 5)
    ]
    found = data.with_reference_logps(rows, summed, pad_token_id=0, batch_size=3)
    assert [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in found] == [
        (-6.0, -3.0),
        (-42.0, -7.0),
        (-2.0, -2.0),
        (-20.0, -5.0),
    ]
    assert "ref_chosen_logps" not in rows[0]
    for batch in data.batches(found, 2, pad_token_id=0):
        np.testing.assert_array_equal(batch["ref_chosen_logps"], summed(batch)[0])
        assert batch["ref_rejected_logps"].dtype == np.float32
    assert "ref_chosen_logps" not in data.collate_pairs([found[0], rows[1]], pad_token_id=0)
    with pytest.raises(FloatingPointError, match=r"reference log-probabilities of row 1 are nan \(chosen\) and -7.0"):
        data.with_reference_logps(
            rows, lambda batch: (np.where(summed(batch)[0] < -40, np.nan, 0), summed(batch)[1]), pad_token_id=0
        )
    with pytest.raises(ValueError, match=r"tokenised pairs need the columns"):
        data.with_reference_logps([{"chosen": "a"}], summed, pad_token_id=0)
