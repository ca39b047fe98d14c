"""Tables as people have them: other names, other layouts, other separators and encodings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from token_pairs import GOOD

from gapo import cli, data
from gapo.data.layouts import parse_columns
from gapo.runs.config_bases import PairSource

NAMES = {"prompt": "question", "chosen": "good", "rejected": "bad"}
TABLE = "id,Question,GOOD,Bad\n7,Q? ,yes,no\n"
READ = {"id": "7", **GOOD}


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", TABLE),
        ("a.csv", TABLE.replace(",", ";")),
        ("a.csv", TABLE.replace(",", "\t")),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.csv", TABLE.replace("Q? ", '"Q? "').replace(",", ";")),
        ("a.jsonl", '{"id": "7", "Question": "Q? ", "GOOD": "yes", "Bad": "no"}'),
    ],
)
def test_columns_of_other_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert data.read_pairs(tmp_path / name, columns=NAMES).rows == [READ]


def test_names_match_without_regard_to_case(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"Prompt": "Q? ", "CHOSEN": "yes", "rejected": "no", "Is_Flipped": True})
    assert data.read_pairs(path).rows == [{**GOOD, "is_flipped": True}]
    (tmp_path / "a.csv").write_text("Prompt;Chosen;Rejected;IS_FLIPPED\nQ? ;yes;no;true\n")
    assert data.read_pairs(tmp_path / "a.csv").rows == [{**GOOD, "is_flipped": True}]
    path = lines(tmp_path / "both.jsonl", {**GOOD, "Chosen": "other"})
    assert data.read_pairs(path).rows == [{**GOOD, "Chosen": "other"}]  # the exact name wins
    path = lines(tmp_path / "two.jsonl", {"Chosen": "a", "CHOSEN": "b", "rejected": "c"})
    with pytest.raises(data.PairError, match=r"line 1: columns 'Chosen' and 'CHOSEN' can both be 'chosen': say which"):
        data.read_pairs(path)


def test_a_table_can_be_read_the_other_way_round(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD)
    (row,) = data.read_pairs(path, columns={"chosen": "rejected", "rejected": "chosen"}).rows
    assert (row["chosen"], row["rejected"]) == (GOOD["rejected"], GOOD["chosen"])


def test_missing_columns_are_told_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    with pytest.raises(
        data.PairError, match=r"(?s)'chosen' is missing.*the columns are: id, Question, GOOD, Bad; name o"
    ):
        data.read_pairs(tmp_path / "a.csv")
    with pytest.raises(
        data.PairError, match="column 'text', named for 'prompt', is missing; the row has id, Question, "
    ):
        data.read_pairs(tmp_path / "a.csv", columns={**NAMES, "prompt": "text"})
    for columns, match in (
        ({"promt": "x"}, "columns has the key 'promt'; accepted are prompt, chosen, rejected, is_flipped"),
        ({"chosen": "x", "rejected": "X"}, "columns gives two names the same column"),
        ({"chosen": ""}, "columns must give 'chosen' the name of a column, got ''"),
    ):
        with pytest.raises(ValueError, match=match):
            data.read_pairs(tmp_path / "a.csv", columns=columns)


@pytest.mark.parametrize(
    ("values", "sides"),
    [
        (["a", "B", "tie"], "ab-"),
        (["A", " b ", "both bad"], "ab-"),
        ([1, 2, "tie"], "ab-"),
        ([2.0, 1.0, 1], "baa"),
        (["1", "2.0"], "ab"),
        (["model_a", "model_b", "tie (bothbad)"], "ab-"),
        (["Response_B", "answer_a", "output_a"], "baa"),
    ],
)
def test_preferences(tmp_path: Path, values: list[Any], sides: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "Q? ", "output_a": f"a{i}", "output_b": f"b{i}", "Winner": v} for i, v in enumerate(values)]
    with caplog.at_level(logging.WARNING, logger="gapo"):
        pairs = data.read_pairs(lines(tmp_path / "a.jsonl", *rows), preference="winner")
    expected = [(f"{side}{i}", f"{'ab'.replace(side, '')}{i}") for i, side in enumerate(sides) if side != "-"]
    assert [(row["chosen"], row["rejected"]) for row in pairs.rows] == expected
    assert not any("output_a" in row for row in pairs.rows)
    assert pairs.ties == sides.count("-") == len(caplog.messages)
    assert (f"{pairs.ties} ties dropped" in pairs.summary()) == bool(pairs.ties)


def test_outputs_of_other_names(tmp_path: Path) -> None:
    rows = [{"instruction": "Q? ", "output_1": "x", "output_2": "y", "preference": v} for v in (2, "output_1", 1)]
    columns = {"prompt": "instruction", "output_a": "output_1", "output_b": "output_2"}
    pairs = data.read_pairs(lines(tmp_path / "a.jsonl", *rows), preference="preference", columns=columns)
    assert [row["chosen"] for row in pairs.rows] == ["y", "x", "x"]
    assert {row["prompt"] for row in pairs.rows} == {"Q? "}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([1, 1], "column 'p' has the number 1 and never 2, so that it may count from 0: write a and b"),
        ([1, 0], "line 2: column 'p' has 0, which does not say which output is preferred: write a and b; accepted are"),
        ([True], "has True, which does not say"),
        (["left"], "column 'p' has 'left'; accepted are a or b, model_a or model_b"),
        ([3], "column 'p' has 3; accepted are"),
        ([None], r"(?s)no usable pair found.*column 'p' is empty"),
    ],
)
def test_preferences_that_are_not_clear_are_refused(tmp_path: Path, values: list[Any], match: str) -> None:
    path = lines(tmp_path / "a.jsonl", *({"output_a": "x", "output_b": "y", "p": value} for value in values))
    with pytest.raises(data.PairError, match=match):
        data.read_pairs(path, preference="p")


def test_a_preference_beside_chosen_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {**GOOD, "output_a": "x", "output_b": "y", "p": "a"})
    with pytest.raises(data.PairError, match="column 'chosen' is there already, beside the preference 'p'"):
        data.read_pairs(path, preference="p")
    with pytest.raises(data.PairError, match="column 'output_b' is missing; the row has output_a, p"):
        data.read_pairs(lines(tmp_path / "b.jsonl", {"output_a": "x", "p": "a"}), preference="p")


def test_text_of_windows_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt;chosen;rejected\nQ? ;ja;no\nQ? ;schön;no\nQ? ;größer;no\n".encode("cp1252"))
    with pytest.raises(data.PairError, match=r"a\.csv is not UTF-8, from line 3 on \(2 rows\): .*cp1252"):
        data.read_pairs(path)
    assert [row["chosen"] for row in data.read_pairs(path, encoding="cp1252").rows] == ["ja", "schön", "größer"]
    (tmp_path / "a.jsonl").write_bytes('{"chosen": "schön", "rejected": "no"}'.encode("utf-16"))
    assert data.read_pairs(tmp_path / "a.jsonl", encoding="utf-16").rows[0]["chosen"] == "schön"
    for encoding in ("klingon", "base64"):
        with pytest.raises(data.PairError, match=f"encoding must be .*, got '{encoding}'"):
            data.read_pairs(path, encoding=encoding)
    with pytest.raises(data.PairError, match=r"2 rows are no pairs(.|\n)*line 3: not ascii\n  line 4: not ascii"):
        data.read_pairs(path, encoding="ascii", strict=True)


def test_faults_of_a_table_are_named_by_the_first_line_of_their_row(tmp_path: Path) -> None:
    text = '\nprompt,chosen,rejected\n"a\nb",yes,no\n\n"two\nlines",yes,"\n"\nQ,yes,no,more\n'
    (tmp_path / "a.csv").write_text(text)
    pairs = data.read_pairs(tmp_path / "a.csv")
    assert [row["prompt"] for row in pairs.rows] == ["a\nb"]
    assert [(problem.line, problem.reason[:22]) for problem in pairs.problems] == [
        (6, "column 'rejected' is e"),
        (9, "more cells than the fi"),
    ]


def test_errors_are_listed_one_to_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"chosen": "a"}] * 30, GOOD)
    with pytest.raises(data.PairError) as raised:
        data.read_pairs(path, strict=True)
    head, *faults, last = str(raised.value).split("\n")
    assert head == f"{path}: 30 rows are no pairs. Mend or remove them, or read without strict:"
    assert faults == [f"  line {i}: column 'rejected' is missing" for i in range(1, 21)]
    assert last == "  and 10 more"
    assert cli.main(["flip", str(path), "--strict", "--output", str(tmp_path / "b.jsonl")]) == 1
    assert len(capsys.readouterr().err.strip().split("\n")) == 22


def test_columns_of_a_command_line() -> None:
    assert parse_columns("prompt=question, chosen=good") == {"prompt": "question", "chosen": "good"}
    assert PairSource(pairs="x", columns="chosen=a=b").columns == {"chosen": "a=b"}
    for text, match in (("prompt", "columns must be name=column"), ("a=b,a=c", "columns names 'a' twice")):
        with pytest.raises(ValueError, match=match):
            parse_columns(text)
    with pytest.raises(ValueError, match="columns has the key 'chosen'; accepted are prompt, output_a, output_b"):
        PairSource(pairs="x", columns="chosen=a", preference="p")


def test_flips_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        "Frage;output_a;output_b;p\nQ? ;schön;no\n".encode("cp1252").replace(b"no\n", b"no;b\n")
    )
    options = ["--columns", "prompt=frage", "--preference", "p", "--encoding", "cp1252", "--rate", "1"]
    assert cli.main(["flip", str(tmp_path / "a.csv"), *options, "--output", str(tmp_path / "b.jsonl")]) == 0
    (row,) = data.read_pairs(tmp_path / "b.jsonl").rows
    assert row == {"prompt": "Q? ", "chosen": "schön", "rejected": "no", "p": "b", "is_flipped": True}
