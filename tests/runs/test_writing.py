"""Whatever happens while a file is written: it is the old one or the new one, and the same command goes on after it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import quick_runs
from frameworks import require

from gapo import cli, data, files
from gapo.runs.output import plots, tables

ROWS = data.generate_pairs(2000)
SCRIPT = Path(hf_models.__file__).with_name("writing_script.py")


def write_safetensors(path: Path, rows: list[dict[str, Any]]) -> None:
    """As checkpoints and starting policies are written."""
    from safetensors.numpy import save_file

    with files.whole(path) as partial:
        save_file({"x": np.ones(100 * len(rows))}, partial)


Writer = Callable[[Path, list[dict[str, Any]]], None]
WRITERS: dict[str, Writer] = {
    "page.html": lambda path, rows: files.write_text(path, json.dumps(rows)),
    "rows.jsonl": data.write_rows,
    "rows.jsonl.gz": data.write_rows,
    "table.parquet": tables.write_table,
    "state.safetensors": write_safetensors,
}


@contextmanager
def small_disk() -> Iterator[None]:
    """No file grows beyond 16 kB: a real write fails, be it in Python, in C++ or in Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def raising(error: BaseException, name: str | None = None) -> Callable[..., Any]:
    """In place of `os.fsync` or `os.replace`: raises `error`, of a rename only where the new name is `name`."""
    plain = os.replace

    def call(*arguments: Any) -> Any:
        if name is None or Path(arguments[1]).name == name:
            raise error
        return plain(*arguments)

    return call


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("old", [None, ROWS[:2]], ids=["new", "old"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_really_full(tmp_path: Path, name: str, old: Any) -> None:
    path, write = tmp_path / "folder" / name, WRITERS[name]
    if old:
        write(path, old)
    before = path.read_bytes() if old else None
    match = rf"{name} could not be written: .*File too large.*\. Nothing is half written; make room, then run it again"
    with pytest.raises(OSError, match=match) as raised, small_disk():
        write(path, ROWS)
    assert raised.value.errno == errno.EFBIG
    assert [p.name for p in path.parent.iterdir()] == ([name] if old else [])
    assert (path.read_bytes() if old else None) == before
    write(path, ROWS)
    assert path.stat().st_size > 16_000


@pytest.mark.parametrize("error", [full(), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_fault_just_before_the_file_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str, error: BaseException
) -> None:
    path, write = tmp_path / name, WRITERS[name]
    write(path, ROWS[:2])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, raising(error))
        with pytest.raises(type(error)) as raised:
            write(path, ROWS)
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
        told = "could not be written: No space left on device. Nothing is half written; make room, then run it again"
        assert str(raised.value) == f"{path} {told}"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = ["a[1].txt", f"a[1].txt.part{os.getppid()}", "a[1].txt.partial", "b.txt.part99", "a1.txt.part99"]
    for name in (*names, f"a[1].txt.part{ended.pid}"):
        (tmp_path / name).write_text("x")
    (tmp_path / "a[1].txt.part99999999999999999999" / "inner").mkdir(parents=True)
    files.write_text(tmp_path / "a[1].txt", "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_log_on_a_full_disk_keeps_its_whole_lines(tmp_path: Path) -> None:
    path, row = tmp_path / "log.jsonl", {"step": 1, "text": "x" * 45}
    log = files.JsonLines(path, until_step=0)
    whole = 16_000 // len(json.dumps(row) + "\n")
    with small_disk():
        for _ in range(whole):
            log.write(row)
        with pytest.raises(OSError, match=r"log\.jsonl could not be written: .*make room, then run it again"):
            log.write(row)
    log.close()
    assert path.stat().st_size == 16_000
    assert files.read_lines(path) == [row] * whole
    files.JsonLines(path, until_step=0).close()
    assert path.read_bytes() == b""


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/a\.html could not be written: .*; see that the folder can be written to"):
        files.write_text(tmp_path / "file" / "a.html", "x")


def test_another_process_may_make_the_same_tiny_model_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gapo.runs.models import tiny
    from gapo.runs.train.train_config import TrainConfig

    def make(config: Any, plain: str, answers: list[str], folder: Path) -> None:
        for made in (folder, folder.with_name(folder.name.split(".")[0])) if other else (folder,):
            made.mkdir(parents=True)
            (made / "config.json").write_text(str(made))

    monkeypatch.setattr(tiny, "_make", make)
    texts = ["an answer"]
    for other in (True, False):
        folder = tiny.tiny_model(TrainConfig(pairs="a", cache_dir=str(tmp_path), seed=int(other)), texts)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not list(tmp_path.glob("*.part*"))
    monkeypatch.setattr(tiny.os, "replace", raising(full()))
    with pytest.raises(OSError, match=r"tiny-[0-9a-f]+ could not be written: No space left on device"):
        tiny.tiny_model(TrainConfig(pairs="a", cache_dir=str(tmp_path), seed=3), texts)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_json_cannot_hold_is_told_by_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2 cannot be stored as JSON: .*bytes.* Drop that column"):
        data.write_rows(tmp_path / "a.jsonl", [{"a": 1}, {"a": b"x"}])
    assert list(tmp_path.iterdir()) == []


# Commands: killed first, then met by one fault after another, and in the end as if nothing had happened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and pairs, for the commands."""
    made = tmp_path_factory.mktemp("writing")
    hf_models.make("llama").save_pretrained(made / "model")
    hf_models.tokenizer().save_pretrained(made / "model")
    data.write_rows(made / "pairs.jsonl", data.generate_pairs(24))
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str], Path]:
    """What an undisturbed command leaves, by its name."""

    @cache
    def run(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "_svg", quick_runs.plain_svg)
            assert cli.main(commands(folder, "whole")[name]) == 0
        return folder / "whole" / name

    return run


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """What the same commands leave that are killed while they write, each twice."""
    require("scipy")
    faulty = commands(folder, "faulty")
    kills: list[tuple[str, str, Any]] = [
        ("flip", "noisy.jsonl", "half"), ("flip", "noisy.jsonl", "written"), ("score", "scores.jsonl.json", "half"),
        ("score", "scores.jsonl", "half"), ("train", "metrics.jsonl", 3), ("train", "report.html", "half"),
        ("study", "*.json", "half"), ("study", "results.csv", "written"),
    ]  # fmt: skip
    jobs = [{"arguments": faulty[name], "file": file, "when": when} for name, file, when in kills]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, SCRIPT, folder / "jobs.json"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [json.dumps([-signal.SIGKILL] * len(jobs))], done.stderr[-2000:]
    return folder / "faulty"


def commands(folder: Path, name: str) -> dict[str, list[str]]:
    """Each command with quick settings, its files in `folder`/`name`."""
    out, pairs, model = folder / name, str(folder / "pairs.jsonl"), str(folder / "model")
    quick: dict[str, Any] = {"max_length": 64, "rho": 0.2}
    small = {"hidden_size": 16, "layers": 1, "heads": 2, "vocab": 300, "text_steps": 0, "answer_steps": 1}
    settings: dict[str, dict[str, Any]] = {
        "flip": {"rate": 0.25, "output": out / "flip" / "noisy.jsonl"},
        "score": {"model": model, "batch_size": 8, "output": out / "score" / "scores.jsonl", **quick,
                  "select_output": out / "score" / "kept.parquet"},
        "train": {"pairs": pairs, "model": model, "eval_fraction": 0.3, "max_steps": 3, "eval_steps": 1, **quick,
                  "batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "output_dir": out / "train"},
        "study": {"demo_size": 120, "train_pairs": 16, "validation_pairs": 8, "test_pairs": 8, "batch_size": 8,
                  "seeds": 1, "flip_rates": "[0.25]", "flip_modes": "random", "learning_rates": "[1e-3]",
                  "arms": "simpo,gapo", **{f"tiny_{name}": value for name, value in small.items()}, "workers": 1,
                  "cache_dir": folder / "cache", "output_dir": out / "study"},
    }  # fmt: skip
    first = {"flip": [pairs], "score": [pairs, "--select", "lowest", "0.5"]}
    return {
        name: [name, *first.get(name, []), *(text for k, v in given.items() for text in (f"--{k}", str(v)))]
        for name, given in settings.items()
    }


def named(folder: Path) -> list[str]:
    """Every file but those of a Trainer's checkpoints and the study's cells, whose names are digests."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(("checkpoints", "cells")))


STEPS = {
    "flip": [("noisy.jsonl", full())],
    "score": [("scores.jsonl.json", full()), ("scores.jsonl", KeyboardInterrupt()), ("scores.jsonl.html", full()),
              ("kept.parquet", full())],
    "train": [("report.html", full()), ("summary.json", KeyboardInterrupt())],
    "study": [("study.html", KeyboardInterrupt()), ("results.parquet", full())],
}  # fmt: skip


# Files without times in them.
SAME = {
    "flip": ["noisy.jsonl"],
    "score": ["scores.jsonl", "scores.jsonl.json", "scores.jsonl.html", "kept.parquet"],
    "train": ["steps.jsonl", "model/model.safetensors"],
    "study": ["tries.csv"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_one_fault_after_another_and_then_as_if_nothing_had_happened(
    folder: Path,
    killed: Path,
    whole: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    arguments, out, undisturbed = commands(folder, "faulty")[name], killed / name, whole(name)
    assert len([file for file in named(out) if ".part" in file]) == 1  # of the last kill; it removed the first one's
    for file, error in STEPS[name]:
        before = (out / file).read_bytes() if (out / file).exists() else None
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", raising(error, file))
            assert cli.main(arguments) == (1 if isinstance(error, OSError) else 130)
        told = capsys.readouterr().err.splitlines()[-1]
        if isinstance(error, OSError):
            assert told.startswith(f"gapo: error: {out / file} could not be written: No space left on device. "), told
        assert ((out / file).read_bytes() if (out / file).exists() else None) == before
    assert cli.main(arguments) == 0
    if name == "score":  # killed between the scores and the end of their log
        (out / "scores.jsonl.progress").write_text("{}\n")
        assert cli.main(arguments) == 0
    assert named(out) == named(undisturbed)
    assert not list(out.rglob("*.part*"))
    for file in SAME[name]:
        assert (out / file).read_bytes() == (undisturbed / file).read_bytes(), file


def test_a_checkpoint_on_a_full_disk(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out, undisturbed = commands(folder, "full")["train"], folder / "full" / "train", whole("train")
    with small_disk():
        assert cli.main(arguments) == 1
    assert re.search(r"checkpoint-1 could not be written: .*File too large.*make room", capsys.readouterr().err)
    assert list((out / "checkpoints").iterdir()) == []
    assert cli.main(arguments) == 0
    assert named(out) == named(undisturbed)
    assert (out / "steps.jsonl").read_bytes() == (undisturbed / "steps.jsonl").read_bytes()
