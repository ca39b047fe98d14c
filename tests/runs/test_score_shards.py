"""`gapo score` in parts: merged they are one run to the byte, and what is no whole is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from gapo import cli, data, files
from gapo.runs.errors import ConfigError
from gapo.runs.score import flow
from gapo.runs.score.score_config import ScoreConfig
from gapo.runs.score.shards import Shard, shard_of_environment

PAIRS = data.flip_pairs(data.generate_pairs(22, seed=3), rate=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, pairs, and their scores by one run, `whole`/s.jsonl."""
    folder = tmp_path_factory.mktemp("shards")
    for name, seed in (("model", 0), ("other", 1)):
        hf_models.make("llama", seed=seed).save_pretrained(folder / name)
        hf_models.tokenizer().save_pretrained(folder / name)
    data.write_rows(folder / "pairs.jsonl", PAIRS)
    assert cli.main(command(folder, folder / "whole" / "s.jsonl")) == 0
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """A folder with two finished shards that are not merged."""
    for shard in ("0/2", "1/2"):
        assert cli.main(command(folder, folder / "two" / "s.jsonl", "--shard", shard)) == 0
    return folder / "two"


@pytest.fixture
def shards(two: Path, tmp_path: Path) -> Path:
    """The output of two finished shards that are not merged."""
    return shutil.copytree(two, tmp_path / "two") / "s.jsonl"


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """`gapo score` with two models in two repeats of three batches each."""
    options = {"rho": "0.2", "batch_size": "8", "max_length": "64", "repeats": "2"}
    named = [text for name, value in options.items() for text in (f"--{name}", value)]
    models = [str(folder / name) for name in ("model", "other")]
    return ["score", str(folder / "pairs.jsonl"), "--model", *models, "--output", str(out), *named, *more]


def merge(folder: Path, out: Path, *more: str) -> list[str]:
    return ["score", str(folder / "pairs.jsonl"), "--output", str(out), "--merge", *more]


@pytest.mark.pictures
def test_merged_shards_are_one_run_to_the_byte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.jsonl"
    assert cli.main(command(folder, out, "--shard", "3/4")) == 0
    plain = files.JsonLines.write

    def interrupted(log: files.JsonLines, row: dict[str, Any]) -> None:
        plain(log, row)
        if row.get("step") == 5:  # of the shard 0/4: 1, 5, 7 and 11
            raise KeyboardInterrupt

    monkeypatch.setattr(files.JsonLines, "write", interrupted)
    assert cli.main(command(folder, out, "--shard", "0/4")) == 130
    monkeypatch.undo()
    for rank in ("0", "1", "2"):  # as torchrun starts them
        for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": rank, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert cli.main(command(folder, out)) == 0
        assert f"shard {rank}/4, by RANK, WORLD_SIZE; --shard 0/1" in capsys.readouterr().out
    monkeypatch.undo()
    assert not torch.distributed.is_initialized()
    steps = [[row.get("step") for row in files.read_lines(path)] for path in sorted(tmp_path.iterdir())]
    assert steps == [[None, 1, 5, 7, 11], [None, 2, 6, 8, 12], [None, 3, 9], [None, 4, 10]]
    assert cli.main(merge(folder, out, "--select", "lowest", "0.5", "--select_output", str(tmp_path / "k.jsonl"))) == 0
    for name in ("s.jsonl", "s.jsonl.json", "s.jsonl.html"):
        assert (tmp_path / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.jsonl", "s.jsonl", "s.jsonl.html", "s.jsonl.json"]
    assert cli.main(command(folder, out, "--shard", "2/4")) == 0  # finished scores are not measured again
    assert len(list(tmp_path.iterdir())) == 4


def change_head(path: Path, part: str, **changes: Any) -> None:
    head, *lines = path.read_text().splitlines()
    entry = json.loads(head)
    entry[part].update(changes)
    path.write_text("\n".join([json.dumps(entry), *lines]) + "\n")


def test_what_is_no_whole_is_not_merged(folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (shards.with_name(f"s.jsonl.shard-{i}-of-2") for i in range(2))
    content = second.read_text()
    lines = content.splitlines(keepends=True)

    def refused(message: str, *more: str) -> None:
        before = {path: path.read_bytes() for path in shards.parent.iterdir()}
        assert cli.main(merge(folder, shards, *more)) == 1
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in shards.parent.iterdir()} == before
        second.write_text(content)

    second.write_text("".join(lines[:-2]))
    refused("shard 1/2 of " + str(shards) + " has 4 of 6 batches: run it again, and it goes on")
    second.write_text("".join([*lines[:-1], lines[-2]]))  # as many, but not those
    refused("shard 1/2")
    second.write_text("")
    refused("shards 1/2 of " + str(shards) + " are missing")
    change_head(second, "settings", rho=0.3)
    refused("shards 0/2 and 1/2 of " + str(shards) + " have other settings (rho: 0.2 and 0.3)")
    change_head(second, "versions", torch="2.6")
    refused("have other versions (torch: '" + torch.__version__)
    refused("holds scores of other settings (max_length: 64 -> 32)", *command(folder, shards, "--max_length", "32")[2:])
    shutil.copy(first, shards.with_name("s.jsonl.shard-4-of-5"))
    refused("are shards of 2 and of 5: remove those of the other division")
    shards.with_name("s.jsonl.shard-4-of-5").unlink()
    second.unlink()
    assert cli.main(merge(folder, shards)) == 1
    assert "shards 1/2 of" in capsys.readouterr().err
    assert cli.main(command(folder, shards)) == 1  # an element of an array that was started again by itself
    assert "are shards (0/2): give --shard I/N, --merge or --overwrite" in capsys.readouterr().err
    first.unlink()
    assert cli.main(merge(folder, shards)) == 1
    assert "no shards to merge beside" in capsys.readouterr().err


def test_other_pairs_are_not_merged(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_rows(tmp_path / "pairs.jsonl", [*PAIRS[:-1], {**PAIRS[-1], "chosen": "another"}])
    assert cli.main(merge(tmp_path, shards)) == 1
    assert "holds scores of other settings (pairs_sha256: " in capsys.readouterr().err


def test_shards_beside_finished_scores(
    folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that a kill left after the merge go; others are not passed over in silence."""
    monkeypatch.setattr(flow, "write_page", lambda *_: None)
    left = shards.with_name("s.jsonl.shard-1-of-2")
    content = left.read_text()
    assert cli.main(merge(folder, shards)) == 0
    left.write_text(content)
    change_head(left, "settings", rho=0.3)
    assert cli.main(merge(folder, shards)) == 1
    assert "holds scores of other settings (rho: " in capsys.readouterr().err
    left.write_text(content)
    assert cli.main(merge(folder, shards)) == 0
    assert not left.exists()


def test_one_process_measures_a_shard(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.jsonl"
    claim = tmp_path / "s.jsonl.shard-0-of-2.claim"
    claim.write_text('{"host": "elsewhere", "process": 7}')
    assert cli.main(command(folder, out, "--shard", "0/2")) == 1
    assert "is being measured by process 7 on elsewhere: give each its own" in capsys.readouterr().err
    assert cli.main(command(folder, out, "--shard", "0/99")) == 1
    assert "shard 0/99 of 6 batches would be empty: divide by 6 at most" in capsys.readouterr().err


def array(own: int, first: int, last: int, count: int) -> dict[str, str]:
    """What SLURM tells the element `own` of a job array."""
    names = {"ID": own, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, None),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1"}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "RANK": "0"}, None),
        ({"WORLD_SIZE": "4", "RANK": "3"}, None),  # not torchrun's
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1", "RANK": "3"}, "3/4"),
        (array(3, 0, 7, 8), "3/8"),
        (array(5, 1, 7, 4), "2/4"),
        (array(2, 1, 3, 3) | {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}, "3/6"),
    ],
)  # fmt: skip
def test_shards_of_the_environment(environment: dict[str, str], shard: str | None) -> None:
    assert (started := shard_of_environment(environment)) == (None if shard is None else (Shard.of(shard), started[1]))


@pytest.mark.parametrize(("own", "first", "last", "count"), [(1, 1, 8, 3), (4, 1, 7, 4), (2, 2, 2, 2)])
def test_arrays_of_other_steps_are_refused(own: int, first: int, last: int, count: int) -> None:
    with pytest.raises(ConfigError, match="not evenly spaced: give --shard I/N"):
        shard_of_environment(array(own, first, last, count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "4/4"}, "shard must be I/N with 0 <= I < N, such as 0/4 to 3/4; got 4/4"),
        ({"shard": "1"}, "got '1'"),
        ({"shard": "1/2", "merge": True}, "shard and merge exclude each other"),
        ({"shard": "1/2", "select": ("lowest", 0.5), "select_output": "k.jsonl"}, "select needs the scores of every"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig(pairs="p.jsonl", output="s.jsonl", **options)
