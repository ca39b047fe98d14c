"""`gapo score` as a user runs it: the numbers, the files, interruptions."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch

import gapo
from gapo import cli, data, files
from gapo.adapters.hf import PreferenceCollator
from gapo.adapters.hf.margins import pair_logps
from gapo.runs.output import tables
from gapo.runs.score import flow as score
from gapo.runs.score import measure as score_measure
from gapo.runs.score import score_table
from gapo.runs.score.score_config import ScoreConfig

PAIRS = data.flip_pairs(data.generate_pairs(22, seed=3), rate=0.25)
QUICK = {"rho": "0.2", "batch_size": "8", "max_length": "64"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one, an adapter of the first, and pairs; the tests only read them."""
    made = tmp_path_factory.mktemp("score")
    for name, seed in (("model", 0), ("other", 1)):
        hf_models.make("llama", seed=seed).save_pretrained(made / name)
        hf_models.tokenizer().save_pretrained(made / name)
    data.write_rows(made / "pairs.jsonl", PAIRS)
    return made


def command(folder: Path, out: Path, *more: str, model: str | None = "model", **options: str) -> list[str]:
    """`gapo score` of the pairs in `folder` to `out`, with quick settings."""
    named = ["--model", str(folder / model)] if model else []
    given = [text for name, value in {**QUICK, **options}.items() for text in (f"--{name}", value)]
    return ["score", str(folder / "pairs.jsonl"), "--output", str(out), *named, *given, *more]


def saw(folder: Path, **options: Any) -> gapo.StepResult:
    """What the public step says of the pairs `rows` in one batch."""
    rows, config = options.pop("rows"), gapo.GAPOConfig(rho=0.2, **options)
    batch = PreferenceCollator(hf_models.tokenizer(), max_length=64)([PAIRS[i] for i in rows])
    model = hf_models.make("llama")
    return gapo.value_and_grad(pair_logps, config, backend="torch", one_pass=False)(model, batch)[0]


@pytest.mark.parametrize("options", [{}, {"anchor": "first_order"}, {"last_layers": 1}, {"adaptive": False}])
def test_scores_are_what_the_step_says_of_the_batches(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {name: str(value).lower() for name, value in options.items()}
    assert cli.main(command(folder, tmp_path / "s.jsonl", repeats="3", seed="5", **given)) == 0
    rows = tables.read_table(tmp_path / "s.jsonl")
    measured = {name: np.zeros((3, 22)) for name in score_table.MEASURES}
    for repeat, batch, index in score_table.plan(22, 8, 3, seed=5):
        result = saw(folder, rows=index, **options)
        for name, field in score_table.MEASURES.items():
            measured[name][repeat, index] = getattr(result, field).numpy()
        assert all(rows[i]["batches"][repeat] == batch for i in index)
    assert measured["gap"].std() > 1e-4
    for i, row in enumerate(rows):
        assert (row["row"], row["id"], row["is_flipped"]) == (i, PAIRS[i]["id"], PAIRS[i]["is_flipped"])
        for name, values in measured.items():
            assert row[name] == pytest.approx(np.mean(values[:, i]), rel=1e-4, abs=2e-6)
        for name in ("gap", "weight"):  # to ten units in the last place of a float32 log-prob
            assert row[f"{name}_std"] == pytest.approx(np.std(measured[name][:, i], ddof=1), rel=1e-2, abs=5e-6)
        assert row["gaps"] == pytest.approx(measured["gap"][:, i].tolist(), rel=1e-4, abs=2e-6)
        assert row["margin"] - row["anchor_margin"] == pytest.approx(row["gap"], abs=1e-6)


def test_measuring_leaves_the_weights_as_they_are(folder: Path) -> None:
    config = ScoreConfig(pairs="pairs.jsonl", output="s.jsonl", model=(str(folder / "model"),), max_length=64)
    source = score.find_sources(config)[0]
    measure = score_measure.Measure(source, PAIRS, config, gapo.GAPOConfig(rho=0.5))
    before = {name: p.clone() for name, p in measure._model.state_dict().items()}
    assert measure((0, 0, np.arange(8)))["anchor_gaps"] != [0.0] * 8
    for name, p in measure._model.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert all(p.grad is None for p in measure._model.parameters())


@pytest.mark.slow
def test_killed_in_the_middle_of_a_line_it_ends_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl.gz", tmp_path / "cut" / "whole.jsonl.gz"
    assert cli.main(command(folder, whole, repeats="2")) == 0
    code = f"""
import os, signal
from gapo import cli
from gapo import files
plain = files.JsonLines.write
def write(log, row):
    if row.get("step") == 4:
        log._file.write('{{"step": 4, "check')
        log._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    plain(log, row)
files.JsonLines.write = write
cli.main({command(folder, cut, repeats="2")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in cut.parent.iterdir()] == ["whole.jsonl.gz.progress"]
    assert len(files.read_lines(cut.with_name("whole.jsonl.gz.progress"))) == 1 + 3
    assert cli.main(command(folder, cut, repeats="2")) == 0
    for path in (whole, whole.with_name("whole.jsonl.gz.json")):
        assert (cut.parent / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in cut.parent.iterdir()) == [whole.name + end for end in ("", ".html", ".json")]


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        (0, {"probe": "margin"}),
        (1, {"last_layers": "1"}),
        (3, {"anchor": "first_order"}),
        (4, {"direction": "gaussian"}),
    ],
)
def test_interrupted_anywhere_only_the_rest_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int, options: dict[str, str]
) -> None:
    """Two models of three batches each; the interruption comes after so many lines."""
    out = tmp_path / "s.jsonl"
    arguments = command(folder, out, model=None, **options)
    arguments += ["--model", str(folder / "model"), str(folder / "other")]
    plain = files.JsonLines.write

    def interrupted(log: files.JsonLines, row: dict[str, Any]) -> None:
        if row.get("step") == lines + 1:
            raise KeyboardInterrupt
        plain(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(files.JsonLines, "write", interrupted)
        assert cli.main(arguments) == 130
    assert not out.exists()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(files.JsonLines, "write", lambda log, row: (steps.append(row.get("step")), plain(log, row)))
        assert cli.main(arguments) == 0
    assert steps == list(range(lines + 1, 7))
    resumed = out.read_bytes()
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert out.read_bytes() == resumed
    rows = tables.read_table(out)
    assert [row["checkpoint"] for row in rows] == [str(folder / "model")] * 22 + [str(folder / "other")] * 22
    assert rows[0]["margin"] != rows[22]["margin"]


def test_other_settings_are_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(score, "write_table", interrupt)
        assert cli.main(command(folder, out)) == 130
    capsys.readouterr()
    assert cli.main(command(folder, out, rho="0.3", seed="2")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "s.jsonl.progress holds scores of other settings (seed: 0 -> 2, rho: 0.2 -> 0.3): give another" in error
    assert cli.main(command(folder, out)) == 0
    before = out.read_bytes()
    for options, named in (({"probe": "margin"}, "probe: 'loss' -> 'margin'"), ({"limit": "9"}, "limit: None -> 9")):
        assert cli.main(command(folder, out, **options)) == 1
        assert named in capsys.readouterr().err
    assert cli.main(command(folder, out, model="other")) == 1
    assert re.search(r"models: \['.*model'\] -> \['.*other'\], weights_sha256: ", capsys.readouterr().err)
    assert out.read_bytes() == before
    assert cli.main(command(folder, out, "--overwrite", rho="0.3")) == 0
    assert out.read_bytes() != before


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_other_weights_under_the_same_name_are_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "pairs.jsonl", tmp_path)
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl")) == 0
    hf_models.make("llama", seed=7).save_pretrained(tmp_path / "model")
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl")) == 1
    assert "holds scores of other settings (weights_sha256: " in capsys.readouterr().err


def test_another_tokenizer_under_the_same_name_is_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "pairs.jsonl", tmp_path)
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl")) == 0
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl")) == 1
    assert "holds scores of other settings (tokenizers_sha256: " in capsys.readouterr().err
    both = ["--model", str(folder / "other"), str(tmp_path / "model")]
    assert cli.main(command(tmp_path, tmp_path / "t.jsonl", *both, "--overwrite", model=None)) == 0
    assert "the models have different tokenizers" in caplog.text


def test_scores_of_an_earlier_version_are_read_but_not_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It drew other batches."""
    out = tmp_path / "s.jsonl"
    assert cli.main(command(folder, out)) == 0
    sidecar = tmp_path / "s.jsonl.json"
    old = {name: v for name, v in json.loads(sidecar.read_text()).items() if name not in ("draws", "tokenizers_sha256")}
    sidecar.write_text(json.dumps(old))
    select = ["--select", "lowest", "0.5", "--select_output", str(tmp_path / "kept.jsonl")]
    assert cli.main(command(folder, out, *select, model=None)) == 0
    assert len(data.read_pairs(tmp_path / "kept.jsonl").rows) == 11
    assert cli.main(command(folder, out)) == 1
    assert "draws: None -> 2" in capsys.readouterr().err


def test_finished_scores_are_selected_from_without_a_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "s.parquet", tmp_path / "kept.jsonl"
    assert cli.main(command(folder, out, limit="20")) == 0
    page = out.with_name("s.parquet.html")
    page.unlink()  # as if interrupted before it
    monkeypatch.setattr(score, "Measure", interrupt)
    plain = ["score", str(folder / "pairs.jsonl"), "--output", str(out)]
    assert cli.main([*plain, "--select", "lowest", "0.3", "--select_output", str(kept)]) == 0
    assert "the 0.3 of the pairs with the lowest gaps" in capsys.readouterr().out
    assert page.exists()
    rows = data.read_pairs(kept).rows
    scores = tables.read_table(out)
    lowest = sorted(scores, key=lambda row: row["gap"])[:6]
    assert [row["id"] for row in rows] == [row["id"] for row in sorted(lowest, key=lambda row: row["row"])]
    for row in rows:
        found = next(score for score in scores if score["id"] == row["id"])
        assert row == {**PAIRS[found["row"]], "gap": found["gap"], "weight": found["weight"]}
    assert cli.main([*plain, "--rho", "0.4"]) == 1
    assert "other settings (rho: 0.2 -> 0.4)" in capsys.readouterr().err
    assert cli.main(["score", str(folder / "pairs.jsonl"), "--output", str(tmp_path / "new.jsonl")]) == 1
    assert "nothing to score with: give model, a folder or Hub name, or checkpoints" in capsys.readouterr().err


def test_parquet_holds_the_same_rows(folder: Path, tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.parquet"):
        assert cli.main(command(folder, tmp_path / name, repeats="2")) == 0
    assert tables.read_table(tmp_path / "s.parquet") == tables.read_table(tmp_path / "s.jsonl")


def test_a_batch_that_is_not_finite_is_named_and_nothing_else_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token has no number, and one pair has the token; its batch is the last of three."""
    model, letter = hf_models.make("llama"), hf_models.tokenizer().convert_tokens_to_ids("Z")
    model.model.embed_tokens.weight.data[letter] = torch.nan
    model.save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    index = list(score_table.plan(22, 8, 1, 0))[2][2]
    rows = [{**row, "rejected": row["rejected"] + " Z" * int(i == index[1])} for i, row in enumerate(PAIRS)]
    data.write_rows(tmp_path / "pairs.jsonl", rows)
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl", adaptive="false")) == 1  # adaptive, no batch has a norm
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"gapo: error: {tmp_path / 'model'}, repeat 0, batch 2: the margins of pairs [1] are not")
    named = ", ".join(f"{i} (id {rows[i]['id']})" for i in index)
    assert error.endswith(f"Its pairs, from 0: rows {named}")
    assert len(files.read_lines(tmp_path / "s.jsonl.progress")) == 1 + 2
    assert not (tmp_path / "s.jsonl").exists()


def test_a_full_disk_costs_no_measurement(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    plain = files.JsonLines.write

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def full(log: files.JsonLines, row: dict[str, Any]) -> None:
        if row.get("step") == 3:
            log._file.write('{"step": 3')
            log._file.flush = full_disk  # type: ignore[method-assign]
        plain(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(files.JsonLines, "write", full)
        assert cli.main(command(folder, out)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"s\.jsonl\.progress could not be written: No space left on device\. .*make room", error), error
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl.progress"]

    with monkeypatch.context() as patch:
        patch.setattr("gapo.files.os.replace", full_disk)
        assert cli.main(command(folder, out)) == 1
    assert not list(tmp_path.glob("*.part"))
    assert not out.exists()
    assert cli.main(command(folder, out)) == 0
    resumed = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.JsonLines, "write", full)
        assert cli.main(command(folder, out, "--overwrite")) == 1
    assert [path.name for path in tmp_path.iterdir()] == [
        "s.jsonl.progress"
    ]  # what was asked to go is not taken for new
    assert cli.main(command(folder, out)) == 0
    assert out.read_bytes() == resumed


def test_a_failed_start_leaves_old_scores(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.jsonl"
    assert cli.main(command(folder, out)) == 0
    before = out.read_bytes()
    assert cli.main(command(folder, out, "--overwrite", model="gone")) == 1
    assert "gone" in capsys.readouterr().err
    assert out.read_bytes() == before
    out.with_name("s.jsonl.json").unlink()
    assert cli.main(command(folder, out)) == 1
    assert "s.jsonl is there already, without the settings (s.jsonl.json) of a gapo score" in capsys.readouterr().err


def test_gaussian_draws_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    gaps = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / f"{name}.jsonl"
        assert cli.main(command(folder, out, direction="gaussian", batch_size="22", seed=seed)) == 0
        gaps.append(sorted(row["gap"] for row in tables.read_table(out)))
    assert gaps[0] == gaps[1]
    assert max(abs(a - b) for a, b in zip(gaps[0], gaps[2], strict=True)) > 1e-4


def test_what_the_numbers_cannot_tell_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(command(folder, tmp_path / "a.jsonl", batch_size="1", limit="3")) == 0
    assert "a pair that has an anchor to itself" in caplog.text
    import peft

    base = hf_models.make("llama")
    fresh = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fresh.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)  # PEFT 0.18 would look for a config file
    assert cli.main(command(folder, tmp_path / "b.jsonl", adapter=str(tmp_path / "adapter"))) == 0
    assert "abs(theta) * g is 0 for every selected parameter" in caplog.text
    assert all(row["gap"] == 0 for row in tables.read_table(tmp_path / "b.jsonl"))


def test_16_bit_weights_are_scored_to_first_order(folder: Path, tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "batch_size": "22", "rho": "0.02"}
    with pytest.warns(RuntimeWarning, match="16-bit weights round the perturbation away"):
        cli.main(command(folder, tmp_path / "exact.jsonl", anchor="exact", **options))
    assert cli.main(command(folder, tmp_path / "first.jsonl", **options)) == 0
    assert cli.main(command(folder, tmp_path / "wide.jsonl", anchor="first_order", batch_size="22", rho="0.02")) == 0
    first, wide = (
        np.array([row["gap"] for row in tables.read_table(tmp_path / f"{name}.jsonl")]) for name in ("first", "wide")
    )
    assert np.corrcoef(first, wide)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--rho", "-1"], 2, "rho must be a finite number >= 0, got -1.0"),
        (["--rho", "x"], 2, "rho"),
        (["--batch_size", "0"], 2, "batch_size must be >= 1, got 0"),
        (["--output", "s.csv"], 2, "output must end in .jsonl, .jsonl.gz, .parquet, got 's.csv'"),
        (["--select", "best", "0.3", "--select_output", "k.jsonl"], 2, "select must be lowest or highest and a share"),
        (
            ["--select", "lowest", "many", "--select_output", "k.jsonl"],
            2,
            "select must be lowest or highest and a share",
        ),
        (["--select", "lowest", "1.5", "--select_output", "k.jsonl"], 2, "in (0, 1], got 'lowest' 1.5"),
        (["--select", "lowest", "0.5"], 2, "select and select_output belong together"),
        (["--select_output", "k.jsonl"], 2, "select and select_output belong together"),
        (["--checkpoints", "a", "--adapter", "b"], 2, "adapter and checkpoints exclude each other"),
        (["--no_such"], 2, "no_such"),
        (["--device", "tpu7"], 1, "device must be auto, cpu, cuda or cuda:0, got 'tpu7'"),
        (["--perturb", "nothing"], 1, "selects none of the"),
        (["--split", "x", "--limit", "0"], 2, "limit must be >= 1"),
    ],
)
def test_errors_are_one_clear_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], status: int, message: str
) -> None:
    arguments = [*command(folder, tmp_path / "s.jsonl"), *more]
    try:
        found = cli.main(arguments)
    except SystemExit as exit_:
        found = exit_.code  # type: ignore[assignment]
    assert found == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nor a log, whose settings would stand in the way of the right ones


def test_pairs_that_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*PAIRS[:6], {"prompt": "x", "chosen": "", "rejected": "y"}]
    data.write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "model").symlink_to(folder / "model")
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl", "--strict")) == 1
    assert "line 7: column 'chosen' is empty" in capsys.readouterr().err
    assert cli.main(command(tmp_path, tmp_path / "s.jsonl")) == 0
    assert "1 rows left out" in capsys.readouterr().out
    assert len(tables.read_table(tmp_path / "s.jsonl")) == 6


def test_help_names_every_option_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["score", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in (*ScoreConfig.__dataclass_fields__, *gapo.GAPOConfig.__dataclass_fields__):
        assert (f"--{name}" in text) == (name not in ("pairs", "sft_weight", "update")), name
    assert "example: gapo score pairs.jsonl --model" in " ".join(text.split())


def test_help_needs_no_framework() -> None:
    code = """
import sys
from gapo import cli
try:
    cli.main(["score", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--repeats" in done.stdout


def test_in_python(folder: Path, tmp_path: Path) -> None:
    config = ScoreConfig(
        pairs=str(folder / "pairs.jsonl"), output=str(tmp_path / "s.jsonl"), model=(str(folder / "model"),), limit=4
    )
    rows = score.score(config)
    assert rows == [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    with pytest.raises(ValueError, match="sft_weight changes no score"):
        score.score(config, gapo.GAPOConfig(sft_weight=0.1))
    with pytest.raises(ValueError, match="update changes no score: leave it at 'policy', got 'anchor'"):
        score.score(config, gapo.GAPOConfig(update="anchor"))
    with pytest.raises(ValueError, match="pairs, output must be different files"):
        ScoreConfig(pairs="a.jsonl", output="./a.jsonl")
