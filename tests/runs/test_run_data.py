"""The pairs of a run: which are trained on, which are evaluated on, by which labels, and what is said of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from gapo import cli, data
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import in_both
from gapo.runs.splits import evaluation_split, require_split
from gapo.runs.train.run_data import load_data
from gapo.runs.train.train_config import TrainConfig
from gapo.study.material import load_split
from gapo.study.study_config import StudyConfig


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    numbers = range(start, start + n)
    return [{"id": i, "prompt": f"{i}? ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in numbers]


def true(found: list[dict[str, Any]]) -> bool:
    """Whether every row has the labels of `rows`."""
    return all((row["chosen"], row["rejected"]) == (f"yes {row['id']}", f"no {row['id']}") for row in found)


def saved(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    import datasets

    sets = {name: datasets.Dataset.from_list(found) for name, found in splits.items()}
    datasets.DatasetDict(sets).save_to_disk(folder)
    return str(folder)


def test_held_out_pairs_of_a_flipped_file_are_evaluated_on_their_true_labels(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "pairs.jsonl", rows(200))
    noisy = tmp_path / "noisy.jsonl"
    assert cli.main(["flip", str(tmp_path / "pairs.jsonl"), "--rate", "0.3", "--output", str(noisy)]) == 0
    found = load_data(TrainConfig(pairs=str(noisy), eval_fraction=0.25))
    assert true(found.held_out)
    assert not any(row["is_flipped"] for row in found.held_out)
    assert 5 <= found.held_out_flipped <= 25
    told = (
        f"{found.held_out_flipped} of the 50 held-out pairs are flipped (is_flipped); they are evaluated on their true"
    )
    assert told in found.summary
    trained = [row["chosen"].startswith("no") for row in found.train]
    assert trained == [row["is_flipped"] for row in found.train]  # training labels stay as they are
    assert sum(trained) == 60 - found.held_out_flipped


def test_pairs_of_a_file_of_their_own_likewise(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "train.jsonl", rows(20))
    data.write_rows(tmp_path / "test.jsonl", data.flip_pairs(rows(10, start=20), rate=0.5))
    found = load_data(TrainConfig(pairs=str(tmp_path / "train.jsonl"), eval_pairs=str(tmp_path / "test.jsonl")))
    assert true(found.held_out)
    assert (found.held_out_flipped, len(found.train), found.in_both) == (5, 20, 0)
    demo = load_data(TrainConfig(pairs="demo", demo_size=30, limit=7, eval_pairs=str(tmp_path / "test.jsonl")))
    assert (len(demo.train), len(demo.held_out)) == (7, 10)  # neither option is left aside with generated pairs


def test_flips_of_flipped_labels_are_counted(tmp_path: Path) -> None:
    """The same seed draws the same rows: a second flip of a whole file undoes the first."""
    data.write_rows(tmp_path / "noisy.jsonl", data.flip_pairs(rows(20), rate=0.5))
    data.write_rows(tmp_path / "test.jsonl", rows(5, start=20))
    files = {"pairs": str(tmp_path / "noisy.jsonl"), "eval_pairs": str(tmp_path / "test.jsonl")}
    found = load_data(TrainConfig(**files, flip_rate=0.5))
    assert "flipped: 0 of 20 training labels; 10 came flipped, 10 of which were flipped back" in found.summary


@pytest.mark.parametrize("name", ["test", "validation", "eval_prefs", "test_prefs", "heldOut"])
def test_the_split_to_evaluate_on_is_not_the_training_one(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "set", {"train": rows(12), name: rows(5, start=50)})
    found = load_data(TrainConfig(pairs=folder, eval_pairs=folder))
    assert sorted(row["id"] for row in found.held_out) == list(range(50, 55))
    assert sorted(row["id"] for row in found.train) == list(range(12))
    study = load_split(StudyConfig(pairs=folder, eval_pairs=folder, train_pairs=4, validation_pairs=3))
    assert sorted(row["id"] for row in study.test) == list(range(50, 55))


def test_a_split_that_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", {"train": rows(12), "test": rows(5, 50), "validation": rows(4, 70)})
    with pytest.raises(ConfigError, match=r"which split of .* is not clear; it has train, test, validation: give eval"):
        load_data(TrainConfig(pairs=folder, eval_pairs=folder))
    found = load_data(TrainConfig(pairs=folder, eval_pairs=folder, eval_split="validation"))
    assert len(found.held_out) == 4
    with pytest.raises(ConfigError, match="has no split 'dev'; it has train, test, validation: give eval_split"):
        evaluation_split(folder, "dev")
    with pytest.raises(ConfigError, match="has no split 'train_prefs'; it has train, test, validation: give split"):
        require_split(folder, "train_prefs")
    require_split(folder, "train[:50%]+test")
    only = saved(tmp_path / "only", {"train": rows(3)})
    with pytest.raises(ConfigError, match="is not clear; it has train: give eval_split"):
        load_data(TrainConfig(pairs=folder, eval_pairs=only))


def test_files_have_no_splits(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", rows(4))
    with pytest.raises(ConfigError, match=r"eval_split='test' is for a data set, but .* is a file"):
        evaluation_split(str(tmp_path / "a.jsonl"), "test")
    with pytest.raises(ValueError, match="eval_split='test' is a split of eval_pairs: give eval_pairs too"):
        TrainConfig(eval_split="test")
    import datasets

    datasets.Dataset.from_list(rows(6)).save_to_disk(tmp_path / "one")
    assert evaluation_split(str(tmp_path / "one"), None) == "train"  # it has none: all of it
    with pytest.raises(data.PairError, match=r"gone\.jsonl does not exist"):  # before the training pairs are read
        load_data(TrainConfig(pairs="other.jsonl", eval_pairs="gone.jsonl"))


def test_training_pairs_among_those_evaluated_on_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flipped = data.flip_pairs(rows(4), rate=0.5)  # a flipped copy is the same pair
    data.write_rows(tmp_path / "train.jsonl", rows(20))
    data.write_rows(tmp_path / "test.jsonl", [*flipped, *rows(6, start=20)])
    with caplog.at_level(logging.WARNING):
        found = load_data(TrainConfig(pairs=str(tmp_path / "train.jsonl"), eval_pairs=str(tmp_path / "test.jsonl")))
    assert found.in_both == 4
    assert "4 of the 10 held-out pairs are training pairs too" in caplog.text
    assert "4 of the 10 held-out pairs are training pairs too" in found.summary
    others = [{**row, "prompt": "another"} for row in rows(4)]  # the same ids and answers, other pairs
    assert in_both(rows(4), others) == 0


def test_a_study_takes_flipped_pairs_by_their_true_labels(tmp_path: Path) -> None:
    """Were they taken as given, its own flips would be swapped once more, and test pairs be called clean."""
    data.write_rows(tmp_path / "noisy.jsonl", data.flip_pairs(rows(60), rate=0.5))
    split = load_split(
        StudyConfig(pairs=str(tmp_path / "noisy.jsonl"), train_pairs=20, validation_pairs=9, test_pairs=9)
    )
    assert all(map(true, (split.pool, split.validation, split.test)))
    assert "30 of the 60 pairs came flipped (is_flipped); the study takes all by their true labels" in split.summary
    data.write_rows(tmp_path / "test.jsonl", rows(7))
    options = {"pairs": str(tmp_path / "noisy.jsonl"), "eval_pairs": str(tmp_path / "test.jsonl")}
    split = load_split(StudyConfig(**options, train_pairs=20, validation_pairs=9))
    assert "7 of the 7 test pairs are training pairs too" in split.summary


def test_a_study_of_too_few_pairs_says_so(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "few.jsonl", rows(10))
    with pytest.raises(ConfigError, match="train_pairs=20, but only 0 pairs are left to train on"):
        load_split(StudyConfig(pairs=str(tmp_path / "few.jsonl"), train_pairs=20, validation_pairs=10, test_pairs=5))


def test_no_pair_left_on_one_side(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "few.jsonl", rows(3))
    with pytest.raises(ConfigError, match="no pair is held out"):
        load_data(TrainConfig(pairs=str(tmp_path / "few.jsonl"), eval_fraction=0.05))
    with pytest.raises(ConfigError, match=r"eval_fraction=0.9 leaves no pair to train on"):
        load_data(TrainConfig(pairs=str(tmp_path / "few.jsonl"), eval_fraction=0.9))
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"eval_fraction must be in \(0, 1\) without eval_pairs"):
            TrainConfig(pairs="few.jsonl", eval_fraction=share)


def test_a_data_set_without_that_split(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", {"train_prefs": rows(3), "test_prefs": rows(3)})
    with pytest.raises(ConfigError, match="has no split 'train'; it has train_prefs, test_prefs: give split"):
        load_data(TrainConfig(pairs=folder))
