"""`gapo flip`, and the names that it takes for evaluation data. What flips do to pairs is tested in test_data.py."""

import re
from pathlib import Path

import pytest
from frameworks import require

from gapo import cli, data
from gapo.data.flip import evaluation_name, true_labels


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("pairs_test.jsonl.gz", "train", "pairs_test.jsonl.gz"),
        ("HeldOut.csv", "train", "HeldOut.csv"),
        ("a/held-out-2.parquet", "train", "held-out-2.parquet"),
        ("hold_out.json", "train", "hold_out.json"),
        ("myPairsValid.jsonl", "train", "myPairsValid.jsonl"),
        ("org/pairs", "test_prefs", "test_prefs"),
        ("org/pairs", "train+validation[:10%]", "train+validation[:10%]"),
        ("org/pairs-eval", "train", "pairs-eval"),
        ("test/dev/pairs.jsonl", "train", None),
        ("latest_devices_validated_threshold_output.jsonl", "train", None),
        ("org/pairs", "train_prefs", None),
        ("org/pairs.v1", "test", "test"),
    ],
)
def test_names_of_evaluation_data(source: str, split: str, name: str | None) -> None:
    assert evaluation_name(source, split) == name


def test_evaluation_pairs_are_flipped_only_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "pairs_test.jsonl", tmp_path / "out.jsonl"
    data.write_rows(source, data.generate_pairs(20))
    assert cli.main(["flip", str(source), "--output", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gapo: error: 'pairs_test.jsonl' says that these pairs are for evaluation")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]
    assert cli.main(["flip", str(source), "--output", str(out), "--allow-eval"]) == 0
    assert sum(row["is_flipped"] for row in data.read_pairs(out).rows) == 4
    plain = source.rename(tmp_path / "pairs.jsonl")
    assert cli.main(["flip", str(plain), "--split", "test", "--output", str(out)]) == 0  # a file has no splits


def test_an_evaluation_split_of_a_data_set_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = require("datasets")

    folder = tmp_path / "pairs"
    rows = datasets.Dataset.from_list(data.generate_pairs(10))
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder)
    out = tmp_path / "out.jsonl"
    command = ["flip", str(folder), "--output", str(out)]
    assert cli.main([*command, "--split", "validation"]) == 1
    assert "'validation' says that these pairs are for evaluation" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(command) == 0
    assert len(data.read_pairs(out).rows) == 10


def test_flips_already_there_are_kept(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    pairs = data.generate_pairs(40)
    data.write_rows(first, data.flip_pairs(pairs, rate=0.5, seed=1))
    options = ["--mode", "length", "--favour", "shorter", "--rate", "0.25", "--seed", "2"]
    assert cli.main(["flip", str(first), *options, "--output", str(second)]) == 0
    rows = data.read_pairs(second).rows
    for row, truth in zip(rows, pairs, strict=True):
        assert (row["chosen"] == truth["rejected"]) == row["is_flipped"]
    before = data.read_pairs(first).rows
    changed = [new for old, new in zip(before, rows, strict=True) if old != new]
    assert len(changed) == 10
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in changed)


def test_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    data.write_rows(tmp_path / "a.jsonl", data.generate_pairs(20))
    lines = iter(range(20))
    plain = json.dumps

    def full(*args: object, **options: object) -> str:
        if next(lines) == 7:
            raise OSError(28, "No space left on device")
        return plain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("gapo.files.json.dumps", full)
    assert cli.main(["flip", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "b.jsonl")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"gapo: error: .*b\.jsonl could not be written: No space left on device\. .*\n", error), error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_help_has_an_example_and_wrong_lines_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), (["a.jsonl"], 2), (["a.jsonl", "--output", "b.txt"], 2)):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["flip", *arguments])
        assert exit_.value.code == status
    assert "example: gapo flip pairs.jsonl" in capsys.readouterr().out


def test_what_belongs_to_an_answer_is_flipped_with_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0,
         "score_chosen": 9, "score_rejected": 1, "chosen_by": "ann"}
        for i in range(4)
    ]  # fmt: skip
    data.write_rows(tmp_path / "pairs.jsonl", rows)
    for row in (
        *data.flip_pairs(rows, rate=1.0),
        *data.flip_pairs(data.read_pairs(tmp_path / "pairs.jsonl").rows, rate=1.0),
    ):
        assert (row["chosen"], row["ref_chosen_logps"], row["score_chosen"]) == ("b", -2.0, 1)
        assert (row["rejected"], row["ref_rejected_logps"], row["score_rejected"]) == ("a", -1.0, 9)
        assert (row["chosen_by"], row["is_flipped"]) == ("ann", True)
    assert list(true_labels(data.flip_pairs(rows, rate=1.0))) == [{**row, "is_flipped": False} for row in rows]
