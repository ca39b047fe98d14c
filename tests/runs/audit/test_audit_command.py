"""The command line of `gapo audit`: its help, and what it refuses before any work."""

from dataclasses import fields
from pathlib import Path

import pytest

from gapo import cli
from gapo.commands.audit import make_parser, parse
from gapo.runs.audit import AuditConfig


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    shown = make_parser().format_help()
    for field in fields(AuditConfig):
        assert field.name == "pairs" or f"--{field.name}" in shown, field.name
    assert cli.main(["audit"]) == 0
    assert "Rank preference pairs" in capsys.readouterr().out


def test_options_reach_the_configuration() -> None:
    config = parse(
        ["p.jsonl", "--drop", "0.2", "--clean_output", "c.jsonl", "--objective_settings", '{"beta": 0.2}', "--strict"]
    )
    assert (config.pairs, config.drop, config.objective_settings, config.strict) == (
        "p.jsonl",
        0.2,
        {"beta": 0.2},
        True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "1"], "folds must be >= 2, so that a policy can train on other pairs; got 1"),
        (["--drop", "1.5", "--clean_output", "c.jsonl"], "drop must be in [0, 1] or 'auto', got 1.5"),
        (["--drop", "all", "--clean_output", "c.jsonl"], "drop must be in [0, 1] or 'auto', got 'all'"),
        (["--flip", "auto", "--clean_output", "c.jsonl"], "flip must be a number or null, got 'auto'"),
        (["--drop", "auto"], "drop, flip, threshold and apply need clean_output"),
        (["--drop", "0.1"], "drop, flip, threshold and apply need clean_output"),
        (["--clean_output", "c.jsonl"], "clean_output needs drop, flip, threshold or apply"),
        (["--drop", "0.1", "--flip", "0.2", "--clean_output", "c.jsonl"], "must be >= flip; got drop=0.1 and flip=0.2"),
        (["--output", "audit.txt"], "output must end in .jsonl, .jsonl.gz, .parquet, .csv, got 'audit.txt'"),
        (["--output", "p.jsonl"], "these must be different files"),
        (["--objective", "dop"], "objective must be one of"),
        (["--objective_settings", '{"beat": 1}'], "objective_settings: "),
        (["--objective_settings", '{"clip": -1}'], "clip must be"),
        (["--marked", "burn"], "marked must be one of flip, drop, leave, got 'burn'"),
        (["--tokenizer", "t"], "tokenizer is for a model of your own, and model 'tiny' makes its own"),
        (["--seads", "3"], "Did you mean 'seeds'?"),
        (["--rho", "-1"], "rho must be > 0, got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", "p.jsonl", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "a.jsonl")]) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text("")
    arguments = ["audit", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    assert cli.main([*arguments, "--model", str(tmp_path / "x" / "model")]) == 1
    assert "model" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    assert cli.main([*arguments, "--model", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "t")]) == 1
    assert f"tokenizer: {tmp_path / 't'} does not exist" in capsys.readouterr().err
    assert cli.main([*arguments, "--apply", str(tmp_path / "m.json"), "--clean_output", str(tmp_path / "c.jsonl")]) == 1
    assert "m.json does not exist" in capsys.readouterr().err
