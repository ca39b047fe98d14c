"""`gapo audit` as a user runs it: pairs that are easily learned, of which some labels are flipped."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest

import gapo
from gapo import cli, data
from gapo.runs.audit import AuditConfig, audit_flow, page
from gapo.runs.audit.audit_files import AuditFiles
from gapo.runs.audit.combination import Scores
from gapo.runs.claims import Claims
from gapo.runs.output.noise import auroc
from gapo.runs.output.tables import read_table

TINY = {
    "tiny_hidden_size": 16, "tiny_layers": 1, "tiny_heads": 2, "tiny_vocab": 300, "tiny_answer_steps": 2,
    "tiny_batch_size": 2, "max_length": 64, "folds": 3, "seeds": 2, "epochs": 2, "batch_size": 8,
    "learning_rate": 0.02, "workers": 1,
}  # fmt: skip
WORDS = ["stone", "river", "cloud", "table", "garden", "window", "candle", "bridge"]


def easy_pairs(count: int = 120, rate: float = 0.15) -> list[dict[str, Any]]:
    """The better answer is "yes ...", the other "no ...", each prompt twice; a share of the labels is flipped."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{WORDS[i // 2 % 8]} {i // 2}?\n", "id": f"pair-{i}"}
        | {side: f"{word} {' '.join(rng.choice(WORDS, 2))}" for side, word in (("chosen", "yes"), ("rejected", "no"))}
        for i in range(count)
    ]
    return list(data.flip_pairs(rows, rate=rate, seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with a bad first row, and their audit, which the tests only read."""
    folder = tmp_path_factory.mktemp("audit")
    data.write_rows(folder / "pairs.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "a"}, *easy_pairs()])
    assert cli.main(command(folder, folder / "audit.jsonl")) == 0
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is tested in a file of its own; its pictures take seconds."""
    monkeypatch.setattr(page, "write_page", lambda path, result: path.write_text(f"{len(result)} pairs"))


def command(folder: Path, output: Path, **options: Any) -> list[str]:
    settings = {**TINY, "cache_dir": str(folder / "cache"), "output": str(output), **options}
    return [
        "audit",
        str(folder / "pairs.jsonl"),
        *(str(x) for name, value in settings.items() for x in (f"--{name}", value)),
    ]


def copied(folder: Path, to: Path) -> Path:
    """The audit of `folder` in another one; returns its output."""
    for path in folder.glob("audit.jsonl*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, to / path.name)
    return to / "audit.jsonl"


def test_the_ranking_finds_the_flipped_labels(folder: Path) -> None:
    rows = read_table(folder / "audit.jsonl")
    pairs = easy_pairs()
    assert [row["rank"] for row in rows] == list(range(1, 121))
    assert sorted(row["row"] for row in rows) == list(range(120))
    p = np.array([row["p_wrong"] for row in rows])
    assert (np.diff(p) <= 0).all()
    assert auroc(p, np.array([row["is_flipped"] for row in rows])) > 0.9
    for row in rows:
        pair = pairs[row["row"]]
        assert row["line"] == row["row"] + 2  # the first line is no pair
        assert all(row[name] == pair[name] for name in ("id", "prompt", "chosen", "rejected", "is_flipped"))
        assert row["policies"] == 2
        assert row["weight"] == pytest.approx(2.5 / (1 + np.exp(2.5 * row["gap"] - 0.25)), rel=1e-5)
        assert row["mark"] is None
    summary = json.loads((folder / "audit.jsonl.json").read_text())
    assert summary["learned"]
    assert summary["share"]["low"] <= 0.15 <= summary["share"]["high"]
    assert summary["expected_wrong"] == pytest.approx(p.sum(), abs=0.1)
    assert summary["detection"]["auroc"]["p_wrong"] > 0.9
    assert summary["detection"]["flipped_share"] == 0.15
    assert set(summary["chosen_longer"]) == {"share", "pairs"}
    assert (folder / "audit.jsonl.html").read_text().startswith("<!doctype html>")


def test_pairs_whose_chosen_answer_is_longer_are_counted_among_those_of_two_lengths() -> None:
    def of(*counts: tuple[int, int]) -> dict[str, Any]:
        nothing = np.zeros((1, len(counts)))
        return Scores(nothing[None], nothing[None], nothing, nothing[0], np.array(counts)).chosen_longer()

    assert of((3, 1), (1, 2), (2, 2), (9, 8)) == {"share": 2 / 3, "pairs": 3}
    assert of((2, 2)) == {"share": None, "pairs": 0}


def test_no_policy_judges_a_prompt_that_it_trained_on(folder: Path) -> None:
    config = AuditConfig(pairs=str(folder / "pairs.jsonl"), cache_dir=str(folder / "cache"), **TINY)
    judges = audit_flow.Judges(config, easy_pairs())
    arrays = judges.measure(audit_flow.Member(0, 1), watched=True)
    assert sorted([*arrays["rows"], *arrays["trained"]]) == list(range(120))
    assert not set(arrays["rows"] // 2) & set(arrays["trained"] // 2)
    assert arrays["logps"].shape == (2, len(arrays["rows"]), 2)
    assert arrays["trained_logps"].shape == (2, len(arrays["trained"]), 2)
    kept = audit_flow.open_tensors(AuditFiles(str(folder / "audit.jsonl")).part(audit_flow.Member(0, 1)))
    with kept as file:  # the same, in another process's order of runs
        np.testing.assert_array_equal(file.get_tensor("logps"), arrays["logps"])


def test_an_interrupted_audit_goes_on_and_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = copied(folder, tmp_path)
    files = AuditFiles(str(output))
    whole = output.read_bytes()
    for path in (output, files.page, files.part(audit_flow.Member(1, 2))):
        path.unlink()
    asked = []
    plain = audit_flow.Judges.measure
    monkeypatch.setattr(audit_flow.Judges, "measure", lambda self, member: asked.append(member) or plain(self, member))
    assert cli.main(command(folder, output)) == 0
    assert asked == [audit_flow.Member(1, 2)]
    assert output.read_bytes() == whole
    assert cli.main(command(folder, output)) == 0  # and nothing is measured again
    assert len(asked) == 1


def test_other_settings_or_pairs_are_refused_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copied(folder, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(command(folder, output, epochs=3, rho=0.5)) == 1
    error = capsys.readouterr().err
    assert "measurements of other settings (epochs: 2 -> 3, rho: 0.25 -> 0.5): give another output" in error
    assert cli.main(command(folder, output, limit=50)) == 1
    assert "pairs_sha256" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text("mine\n")
    assert cli.main(command(folder, tmp_path / "other.jsonl")) == 1
    assert "without the measurements (other.jsonl.parts) of a gapo audit" in capsys.readouterr().err
    with Claims() as claims:
        assert claims.take(AuditFiles(str(output)).part(audit_flow.Member(0, 0)))
        claims._held.clear()  # as another copy's
        (tmp_path / "audit.jsonl.parts" / "seed-0-fold-0.safetensors.claim").write_text(
            '{"host": "elsewhere", "process": 1}'
        )
        assert cli.main([*command(folder, output), "--overwrite"]) == 1
    assert "is in the hands of another copy" in capsys.readouterr().err
    for name, content in before.items():
        assert next(tmp_path.rglob(name)).read_bytes() == content, name


def test_pairs_are_cleaned_by_probability_and_by_marks(folder: Path, tmp_path: Path) -> None:
    output = copied(folder, tmp_path)
    ranked, pairs = read_table(output), easy_pairs()
    top = [row["row"] for row in ranked[:12]]
    assert cli.main(command(folder, output, drop=0.05, clean_output=tmp_path / "kept.jsonl")) == 0
    kept = read_table(tmp_path / "kept.jsonl")
    assert [row["id"] for row in kept] == [pair["id"] for i, pair in enumerate(pairs) if i not in top[:6]]
    assert cli.main(command(folder, output, drop="auto", clean_output=tmp_path / "kept.jsonl")) == 0
    count = round(summary(output)["share"]["mean"] * len(pairs))
    assert count > 6
    suspects = {row["row"] for row in ranked[:count]}
    assert [row["id"] for row in read_table(tmp_path / "kept.jsonl")] == [
        pair["id"] for i, pair in enumerate(pairs) if i not in suspects
    ]
    marks = {"format": "gapo-marks", "version": 1, "pairs_digest": summary(output)["digest"]}
    marks["marks"] = [{"row": top[0], "mark": "right"}, {"row": ranked[-1]["row"], "mark": "wrong"}]
    (tmp_path / "marks.json").write_text(json.dumps(marks))
    options = {"apply": tmp_path / "marks.json", "flip": 0.1, "clean_output": tmp_path / "flipped.parquet"}
    assert cli.main(command(folder, output, **options)) == 0
    flipped = read_table(tmp_path / "flipped.parquet")
    turned = {i for i, row in enumerate(flipped) if row["chosen"] == pairs[i]["rejected"]}
    assert turned == {*(row["row"] for row in ranked[1:13]), ranked[-1]["row"]}
    assert all(row["is_flipped"] != pairs[i]["is_flipped"] for i, row in enumerate(flipped) if i in turned)
    assert {row["row"]: row["mark"] for row in read_table(output) if row["mark"]} == {
        top[0]: "right", ranked[-1]["row"]: "wrong"
    }  # fmt: skip


def summary(output: Path) -> dict[str, Any]:
    return json.loads(AuditFiles(str(output)).sidecar.read_text())


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_the_table_in_other_formats(folder: Path, tmp_path: Path, ending: str) -> None:
    copied(folder, tmp_path)
    output = tmp_path / f"audit{ending}"
    (tmp_path / "audit.jsonl.parts").rename(tmp_path / f"{output.name}.parts")
    assert cli.main(command(folder, output)) == 0
    wanted = read_table(folder / "audit.jsonl")
    if ending == ".parquet":
        assert read_table(output) == wanted
        return
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in wanted]  # with their line breaks
    assert [float(row["p_wrong"]) for row in rows] == [row["p_wrong"] for row in wanted]
    assert [row["is_flipped"] for row in rows] == [str(row["is_flipped"]).lower() for row in wanted]


def test_where_nothing_is_learned_no_number_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_rows(tmp_path / "pairs.jsonl", easy_pairs(60, rate=0.5))
    options = {"seeds": 1, "epochs": 1, "output": tmp_path / "audit.jsonl"}
    assert cli.main(command(tmp_path, **options)) == 0
    assert "Nothing can be told: the policies did not learn these pairs (held-out accuracy" in capsys.readouterr().out
    rows = read_table(tmp_path / "audit.jsonl")
    assert [row["row"] for row in rows] == list(range(60))
    assert all(row["p_wrong"] is None and row["rank"] is None for row in rows)
    assert summary(tmp_path / "audit.jsonl")["share"] is None
    assert cli.main(command(tmp_path, **options, drop=0.1, clean_output=tmp_path / "kept.jsonl")) == 1
    assert "no pair is dropped or flipped, since the policies did not learn" in capsys.readouterr().err
    assert not (tmp_path / "kept.jsonl").exists()


def test_as_a_library_it_takes_lists_and_data_sets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    settings = {**TINY, "cache_dir": str(folder / "cache")}
    result = gapo.audit(easy_pairs(), **settings, output=str(copied(folder, tmp_path)))  # measured in a file's audit
    wanted = read_table(folder / "audit.jsonl")
    assert len(result) == 120
    assert [row["p_wrong"] for row in result] == [row["p_wrong"] for row in wanted]
    assert result[0]["line"] == result[0]["row"] + 1
    assert result.to_pandas()["p_wrong"].tolist() == [row["p_wrong"] for row in wanted]
    assert str(result).startswith("About 10 % of your labels look wrong ")
    before = sorted(tmp_path.rglob("*"))
    small = {**settings, "seeds": 1, "epochs": 1, "folds": 2}
    short, of_table = (
        gapo.audit(rows, **small)
        for rows in (Dataset.from_list(easy_pairs()[:30]), Dataset.from_list(easy_pairs()[:30]).to_pandas())
    )
    assert len(short) == 30
    assert list(of_table) == list(short)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="audit has no setting 'fold'; accepted are split, "):
        gapo.audit(easy_pairs(), fold=3)
    with pytest.raises(data.PairError, match="no usable pair"):
        gapo.audit([{"chosen": "a"}], **settings)


def test_a_tokenizer_beside_the_model_gives_what_the_model_s_own_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, whole, words = (tmp_path / name for name in ("bare", "whole", "words"))
    hf_models.make("llama").save_pretrained(bare)
    hf_models.make("llama").save_pretrained(whole)
    for place in (whole, words):
        hf_models.tokenizer().save_pretrained(place)
    options = {"train_layers": 1, "limit": 20, "folds": 2, "seeds": 1, "epochs": 1, "cache_dir": tmp_path / "cache"}
    assert cli.main(command(folder, tmp_path / "own.jsonl", model=whole, **options)) == 0
    apart = {"model": bare, "tokenizer": words, **options}
    assert cli.main(command(folder, tmp_path / "apart.jsonl", **apart)) == 0
    assert read_table(tmp_path / "apart.jsonl") == read_table(tmp_path / "own.jsonl")
    assert cli.main(command(folder, tmp_path / "none.jsonl", model=bare, **options)) == 1
    assert f"tokenizer '{bare}' is not what save_pretrained leaves" in capsys.readouterr().err
    path = words / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert cli.main(command(folder, tmp_path / "apart.jsonl", **apart)) == 1
    assert "measurements of other settings (tokenizers_sha256" in capsys.readouterr().err


def test_the_last_layers_of_a_model_are_tuned_and_other_weights_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_models.make("llama").save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "audit.jsonl"
    options = {"model": tmp_path / "model", "train_layers": 1, "limit": 20, "folds": 2, "seeds": 1, "epochs": 1}
    assert cli.main(command(folder, output, **options)) == 0
    assert len(read_table(output)) == 20
    config = AuditConfig(pairs="p.jsonl", model=str(tmp_path / "model"), train_layers=1, cache_dir=str(tmp_path))
    judges = audit_flow.Judges(config, easy_pairs(4))
    trained = [name for name, p in judges.policy.model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)
    hf_models.make("llama", seed=1).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert cli.main(command(folder, output, **options)) == 1
    assert "measurements of other settings (weights_sha256" in capsys.readouterr().err
