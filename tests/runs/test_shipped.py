"""The examples and recipes that come with the package: by name, listed and copied."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from frameworks import require

import gapo
from gapo.cli import main
from gapo.runs import shipped

PACKAGE = Path(gapo.__file__).parent
DEMO = PACKAGE / "examples" / "demo.yaml"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "examples/demo", "examples/demo.yaml"])
def test_a_shipped_configuration_is_run_by_name_from_any_folder(name: str, elsewhere: Path) -> None:
    require("jsonargparse")
    from gapo.commands.train import parse

    demo = yaml.safe_load(DEMO.read_text("utf-8"))
    for arguments in ([name], ["--config", name], [f"--config={name}"], ["--seed", "3", "--config", name]):
        config, step = parse([*arguments, "--batch_size", "8"])
        assert (config.demo_size, step.rho, config.batch_size) == (demo["demo_size"], demo["rho"], 8)


@pytest.mark.parametrize("local", ["demo", "demo.yaml"])
def test_a_local_file_of_that_name_wins(local: str, elsewhere: Path) -> None:
    require("jsonargparse")
    from gapo.commands.train import parse

    (elsewhere / "examples").mkdir()  # a folder of the package's name changes nothing
    (elsewhere / local).write_text("rho: 0.0125\n", "utf-8")
    assert parse(["demo"])[1].rho == 0.0125
    assert parse(["examples/demo"])[1].rho != 0.0125


def test_an_unknown_name_says_which_exist(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("jsonargparse")
    assert main(["train", "dmeo"]) == 2
    error = capsys.readouterr().err
    assert "there is no configuration file 'dmeo'" in error
    assert "demo, study_anchored" in error
    assert error.count("\n") == 1


def test_names_are_of_one_file_each() -> None:
    counts = Counter(shipped.configuration_names())
    assert {"demo", "study_small"} <= set(counts)
    assert set(counts.values()) == {1}


def test_the_list_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    on_disk = [
        str(path.relative_to(PACKAGE))
        for folder in shipped.FOLDERS
        for path in (PACKAGE / folder).rglob("*.*")
        if path.suffix != ".pyc"
    ]
    listed = dict(line.split(maxsplit=1) for line in lines[:-2])
    assert sorted(listed) == sorted(on_disk)
    assert all(len(text) > 25 and text[0].isalnum() for text in listed.values()), listed


def test_copies_are_the_files_and_overwrite_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", "demo", "trl_style", "--to", "new/folder"]) == 0
    assert capsys.readouterr().out.split() == [
        f"new/folder/{name}" for name in ("demo.yaml", "trl_style.py", "trl_style.yaml")
    ]
    copy = elsewhere / "new" / "folder" / "demo.yaml"
    assert copy.read_bytes() == DEMO.read_bytes()

    copy.write_text("mine", "utf-8")
    assert main(["examples", "study_small", "demo", "--to", "new/folder"]) == 1
    assert "new/folder/demo.yaml exists already: give --overwrite" in capsys.readouterr().err
    assert copy.read_text("utf-8") == "mine"
    assert not copy.with_name("study_small.yaml").exists()
    assert main(["examples", "demo", "--to", "new/folder", "--overwrite"]) == 0
    assert copy.read_bytes() == DEMO.read_bytes()


def test_a_folder_is_copied_whole(elsewhere: Path) -> None:
    assert main(["examples", "examples/", "--to", "."]) == 0
    copied = {path.relative_to(elsewhere).as_posix(): path.read_bytes() for path in elsewhere.rglob("*.*")}
    assert copied == {
        name: path.read_bytes() for name, path in shipped.shipped_files().items() if name.startswith("examples/")
    }


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["gone", "--to", "."], 1, "there is no example or recipe 'gone': examples/comve.yaml, examples/demo.yaml"),
        (["../files", "--to", "."], 1, "there is no example or recipe '../files'"),
        (["demo"], 2, "give both a NAME and --to FOLDER"),
        (["--to", "."], 2, "give both a NAME and --to FOLDER"),
    ],
)
def test_what_cannot_be_copied_is_named(
    arguments: list[str], status: int, message: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["examples", *arguments]))  # the parser exits by itself
    assert left.value.code == status
    assert message in capsys.readouterr().err
    assert not list(elsewhere.iterdir())
