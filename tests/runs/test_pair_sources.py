"""Where the pairs of a command come from: data sets with configurations and revisions, streams, tables, mixtures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from gapo import data
from gapo.commands import score as score_command
from gapo.commands import study as study_command
from gapo.commands.train import parse
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import read_both
from gapo.runs.train.run_data import load_data
from gapo.runs.train.train_config import TrainConfig
from gapo.study.material import load_split
from gapo.study.study_config import StudyConfig

README = """---
configs:
- config_name: main
  data_files: [{split: train, path: other.jsonl}]
- config_name: prefs
  data_files: [{split: train_prefs, path: train.jsonl}, {split: test_prefs, path: test.jsonl}]
---
"""


def rows(n: int, start: int = 0, word: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": f"{i}? ", "chosen": f"{word} {i}", "rejected": f"no {i}"} for i in range(start, start + n)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the Hub keeps a data set: a card that names configurations and splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    for name, part in (("train", rows(8)), ("test", rows(3, 50)), ("other", rows(2, 90))):
        data.write_rows(folder / f"{name}.jsonl", part)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_and_its_splits(hub: Path, streaming: bool) -> None:
    read = data.read_pairs(hub, config="prefs", split="test_prefs", streaming=streaming)
    assert read.rows == rows(3, 50)
    config = TrainConfig(
        pairs=str(hub), dataset_config="prefs", split="train_prefs", eval_split="test_prefs", streaming=streaming
    )
    found = load_data(config)
    assert [row["prompt"] for row in found.train] == [row["prompt"] for row in rows(8)]
    assert [row["prompt"] for row in found.held_out] == [row["prompt"] for row in rows(3, 50)]


def test_a_configuration_or_split_that_is_not_there(hub: Path) -> None:
    with pytest.raises(ConfigError, match="has no split 'test'; it has train_prefs, test_prefs: give eval_split"):
        load_data(TrainConfig(pairs=str(hub), dataset_config="prefs", split="train_prefs", eval_split="test"))
    with pytest.raises(ConfigError, match="has no split 'train'; it has train_prefs, test_prefs: give split"):
        load_data(TrainConfig(pairs=str(hub), dataset_config="prefs"))
    with pytest.raises(data.PairError, match=r"could be loaded \(split 'train', config 'gone', revision 'v2'\)"):
        data.read_pairs(hub, config="gone", revision="v2")


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((args, options))
        return rows(5)

    def names(*args: Any, **options: Any) -> list[str]:
        calls.append((args, options))
        return ["train_prefs", "test_prefs"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    config = TrainConfig(
        pairs="org/set",
        split="train_prefs",
        eval_pairs="org/other",
        dataset_config="prefs",
        dataset_revision="v2",
        streaming=True,
    )
    train, evaluated = read_both(config, generated=1)
    assert evaluated is not None
    assert train.rows == evaluated.rows == rows(5)
    other = (("org/other", None), {"split": "test_prefs", "revision": None, "streaming": True})
    own = (("org/set", "prefs"), {"split": "train_prefs", "revision": "v2", "streaming": True})
    assert [call for call in calls if "split" in call[1]] == [other, own]
    assert (("org/set", "prefs"), {"revision": "v2"}) in calls
    assert (("org/other", None), {"revision": None}) in calls


def test_of_a_stream_only_the_start_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def endless() -> Any:
        for i in itertools.count():
            taken.append(i)
            yield rows(1, i)[0]

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(endless))
    assert data.read_pairs("org/set", streaming=True, limit=3).rows == rows(3)
    assert len(taken) < 10

    class Breaks:
        def __iter__(self) -> Any:
            yield rows(1)[0]
            raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Breaks())
    with pytest.raises(data.PairError, match=r"'org/set' \(split 'train'\) cannot be read to its end: OSError: conn"):
        data.read_pairs("org/set")


def test_eval_split_alone_is_of_the_training_data_set(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", rows(4))
    with pytest.raises(ConfigError, match=r"eval_split='test' is for a data set, but .* is a file"):
        load_data(TrainConfig(pairs=str(tmp_path / "a.jsonl"), eval_split="test"))
    with pytest.raises(ValueError, match="eval_split='test' is a split of eval_pairs: give eval_pairs too"):
        TrainConfig(eval_split="test")


def test_what_is_of_the_hub_alone_is_refused_elsewhere(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", rows(4))
    with pytest.raises(data.PairError, match=r"config 'x' is of a data set on the Hub, but .*a\.jsonl is a file: l"):
        data.read_pairs(tmp_path / "a.jsonl", config="x")
    datasets.Dataset.from_list(rows(4)).save_to_disk(tmp_path / "saved")
    with pytest.raises(data.PairError, match=r"revision 'v2' is of a data set on the Hub, but .*saved is a saved data"):
        data.read_pairs(tmp_path / "saved", revision="v2")


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    """Streaming is for the Hub, an encoding for text; where another source takes the option, this one goes without."""
    table, parquet, saved = (tmp_path / name for name in ("a.csv", "a.parquet", "saved"))
    table.write_text("prompt,chosen,rejected\n" + "".join(f"{i}?,ä {i},ö {i}\n" for i in range(20)), "cp1252")
    datasets.Dataset.from_list(rows(4)).to_parquet(parquet)
    datasets.Dataset.from_list(rows(4)).save_to_disk(saved)
    for path, what in ((table, "a file"), (parquet, "a file"), (saved, "a saved data set")):
        with pytest.raises(data.PairError, match=f"streaming is for a data set on the Hub, but {path} is {what}: l"):
            data.read_pairs(path, streaming=True)
    for source, what in ((parquet, "a Parquet file"), (saved, "a data set"), ("org/set", "a data set")):
        with pytest.raises(data.PairError, match=f"encoding 'cp1252' is of a file of text, but {source} is {what}"):
            data.read_pairs(source, encoding="cp1252")
        assert source == "org/set" or len(data.read_pairs(source, encoding="UTF8").rows) == 4
    latin = {"encoding": "cp1252"}
    for options in (
        {"pairs": str(parquet), "eval_pairs": str(table), **latin},
        {"pairs": str(table), "eval_pairs": str(saved), **latin},
        {"mixture": [{"pairs": str(table)}, {"pairs": str(parquet)}], **latin},
        {"mixture": [{"pairs": str(table), **latin}, {"pairs": str(parquet)}]},
    ):
        train, evaluated = read_both(TrainConfig(**options), generated=1)
        answers = {row["chosen"] for part in (train, evaluated) for row in (part.rows if part is not None else ())}
        assert {"ä 3", "yes 3"} <= answers
    for options in (
        {"pairs": str(parquet), "eval_pairs": str(saved), **latin},
        {"mixture": [{"pairs": str(parquet), **latin}, {"pairs": str(table)}], "encoding": "utf-16"},
        {"mixture": [{"pairs": str(parquet)}, {"pairs": str(saved)}], **latin},
    ):
        with pytest.raises(data.PairError, match=r"encoding 'cp1252' is of a file of text, but \S+ is a "):
            read_both(TrainConfig(**options), generated=1)


def test_tables_in_every_command(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    lines = "".join(f"{i}? ;yes {i};no {i};1\n{i}? ;no {i};yes {i};2\n" for i in range(20))
    table.write_text("Frage;output_a;output_b;best\n" + lines)
    options = ["--pairs", str(table), "--columns", "prompt=frage", "--preference", "best"]
    config, _ = parse(options)
    found = load_data(config)
    assert all(row["chosen"].startswith("yes") for row in [*found.train, *found.held_out])
    (tmp_path / "a.yaml").write_text(f"pairs: {table}\ncolumns:\n  prompt: frage\npreference: best\n")
    assert parse([str(tmp_path / "a.yaml")])[0].columns == config.columns == {"prompt": "frage"}
    study = study_command.parse([*options, "--train_pairs", "9", "--validation_pairs", "4", "--test_pairs", "4"])
    assert all(row["chosen"].startswith("yes") for row in load_split(study).pool)
    scored, _ = score_command.parse([str(table), *options[2:], "--model", "m", "--output", str(tmp_path / "s.jsonl")])
    assert (scored.columns, scored.preference, scored.streaming) == ({"prompt": "frage"}, "best", False)
    for wrong, match in (("promt=a", "columns has the key 'promt'"), ("prompt", "columns must be name=column")):
        with pytest.raises(ConfigError, match=match):
            parse(["--columns", wrong])


def test_a_mixture_has_its_shares(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", rows(30))
    data.write_rows(tmp_path / "b.jsonl", [{**row, "good": row["chosen"], "chosen": 1} for row in rows(50, 100, "oui")])
    a, b = {"pairs": str(tmp_path / "a.jsonl")}, {"pairs": str(tmp_path / "b.jsonl"), "columns": "chosen=good"}

    def counts(**options: Any) -> tuple[int, int, Any]:
        train, _ = read_both(TrainConfig(**options), generated=1)
        prompts = [row["prompt"] for row in train.rows]
        assert len(set(prompts)) == len(prompts)  # drawn without replacement
        first = sum(row["chosen"].startswith("yes") for row in train.rows)
        return first, len(train.rows) - first, train

    weighted = [{**a, "weight": 0.75}, {**b, "weight": 0.25}]
    assert counts(mixture=weighted)[:2] == (30, 10)  # all of a, and a third as many of b
    assert counts(mixture=weighted, limit=16)[:2] == (12, 4)
    assert counts(mixture=[a, b])[:2] == (30, 50)
    assert counts(mixture=[a, b], limit=8)[:2] in {(3, 5), (4, 4)}
    one, same, other = (counts(mixture=weighted, seed=seed)[2].rows for seed in (0, 0, 1))
    assert one == same
    assert one != other
    summary = counts(mixture=weighted)[2].summary()
    assert f"30 of the 30 pairs of {tmp_path}/a.jsonl" in summary
    assert "together: 40 pairs" in summary
    path = tmp_path / "mixture.yaml"
    path.write_text(json.dumps({"mixture": weighted}))  # JSON is YAML
    assert parse([str(path)])[0].mixture == weighted
    found = load_data(parse([str(path), "--eval_fraction", "0.25"])[0])
    assert (len(found.train), len(found.held_out)) == (30, 10)


def test_bad_rows_of_a_mixture_are_named_by_source(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", [*rows(3), {"chosen": "x"}])
    train, _ = read_both(TrainConfig(mixture=[{"pairs": str(tmp_path / "a.jsonl")}]), generated=1)
    assert [problem.reason for problem in train.problems] == [f"{tmp_path}/a.jsonl: column 'rejected' is missing"]
    with pytest.raises(data.PairError, match="line 4: column 'rejected' is missing"):
        load_data(TrainConfig(mixture=[{"pairs": str(tmp_path / "a.jsonl")}], strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mixture": [{"file": "a"}]}, "a source of mixture has the key 'file'; accepted are pairs, weight, split"),
        ({"mixture": [{"weight": 1}]}, "a source of mixture needs pairs"),
        ({"mixture": [{"pairs": "a", "weight": 1}, {"pairs": "b"}]}, "needs a weight > 0, or none of them; got None"),
        ({"mixture": [{"pairs": "a", "weight": 0}]}, "needs a weight > 0, or none of them; got 0"),
        ({"mixture": [{"pairs": "a", "columns": "x"}]}, "columns must be name=column"),
        ({"mixture": [{"pairs": "a"}], "pairs": "b"}, "mixture and pairs='b' exclude each other"),
        ({"mixture": [{"pairs": "a"}], "dataset_config": "x"}, "dataset_config and dataset_revision are of one data"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be >= 1"),
    ],
)
def test_mixtures_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainConfig(**options)


def test_a_study_of_a_mixture(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a.jsonl", rows(30))
    mixture = [{"pairs": str(tmp_path / "a.jsonl")}]
    split = load_split(StudyConfig(mixture=mixture, train_pairs=9, validation_pairs=4, test_pairs=4))
    assert len(split.pool) + len(split.validation) + len(split.test) == 30


@pytest.mark.parametrize("option", [{"columns": "prompt=question"}, {"encoding": "cp1252"}, {"streaming": True}])
def test_how_generated_pairs_are_read_is_no_question(option: dict[str, Any]) -> None:
    """With pairs to evaluate on, or a mixture, the options are theirs."""
    (name,) = option
    with pytest.raises(
        ValueError, match=f"{name} says how pairs are read, and pairs='demo' generates them: give pairs"
    ):
        TrainConfig(**option)
    assert TrainConfig(eval_pairs="a.csv", **option).pairs == "demo"
    assert TrainConfig(mixture=[{"pairs": "a.csv"}], **option).pairs == "demo"
