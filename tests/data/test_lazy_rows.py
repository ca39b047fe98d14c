"""Rows on disk: the same rows, in little memory; read-only; and their tokens in a file that is found again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_pairs import GOOD, bytes_tokenizer

from gapo import data
from gapo.data import lazy_rows as stored
from gapo.data.lazy_rows import Rows, RowWriter, joined
from gapo.data.limits import Limits
from gapo.data.token_table import TokenRows, tokenized_rows

# `datasets` forks its workers; JAX, where another test of this process has imported it, warns of that.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

ROWS = [
    {"id": i, "prompt": f"{i}? ", "chosen": "yes" * (i + 1), "rejected": f"no {i}", "x": [i, None]} for i in range(9)
]


def written(rows: list[dict[str, Any]]) -> Rows:
    writer = RowWriter()
    for row in rows:
        writer.append(row)
    return writer.rows()


@pytest.fixture(params=["in memory", "on disk"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rows:
    if request.param == "on disk":
        monkeypatch.setattr(stored, "_IN_MEMORY", 300)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return written(ROWS)


def test_rows_are_a_sequence(rows: Rows) -> None:
    assert rows == ROWS
    assert list(rows) == [rows[i] for i in range(9)] == ROWS
    assert rows != ROWS[:8]
    assert (rows[-1], rows[2:5], len(rows[::-1])) == (ROWS[-1], ROWS[2:5], 9)
    assert list(reversed(rows)) == ROWS[::-1]
    assert joined(rows[:2], ROWS[4:6], rows[8:]) == [*ROWS[:2], *ROWS[4:6], ROWS[8]]
    assert rows.select([3, 1])[1:] == [ROWS[1]]
    with pytest.raises(IndexError):
        rows[9]


def test_a_change_that_would_be_lost_is_refused(rows: Rows) -> None:
    with pytest.raises(TypeError, match="a change would be lost: make new ones"):
        rows[0]["id"] = 1
    with pytest.raises(TypeError, match="a change would be lost"):
        rows[0].update(id=1)
    copy = {**rows[0]}
    copy["id"] = 5
    assert type(pickle.loads(pickle.dumps(rows[0]))) is dict
    assert rows[0] == ROWS[0]


def test_flips_of_a_view_are_those_of_a_list(rows: Rows) -> None:
    from gapo.data.flip import true_labels

    for options in (
        {"rate": 4 / 9},
        {"rate": 4 / 9, "seed": 3},
        {"mode": "length", "rate": 2 / 9, "favour": "shorter"},
    ):
        flipped = data.flip_pairs(rows, **options)
        assert isinstance(flipped, Rows)
        assert flipped == data.flip_pairs(ROWS, **options)
        assert true_labels(flipped) == true_labels(list(flipped))
        assert data.flip_pairs(flipped, rate=1) == data.flip_pairs(list(flipped), rate=1)


def test_the_file_goes_with_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stored, "_IN_MEMORY", 300)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    view = data.flip_pairs(written(ROWS), rate=0.5)[3:]
    assert len(list(tmp_path.iterdir())) == 1
    assert pickle.loads(pickle.dumps(view)) == list(view)  # as in a process that loads batches
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(len, (view,)) == 6  # whose end leaves the file alone
    assert list(tmp_path.iterdir())
    del view
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_IN_MEMORY", 10)
    file = stored._TemporaryFile()
    monkeypatch.setattr(stored, "_TemporaryFile", lambda: file)
    os.unlink(file.path)
    os.mkdir(file.path)
    with pytest.raises(OSError, match=r"the rows could not be written to .*gapo-rows.* TMPDIR"):
        written(ROWS)
    os.rmdir(file.path)


def test_reading_needs_little_memory(tmp_path: Path) -> None:
    """Of 10,000 pairs of 2 kB, as objects 22 MB, less than a quarter stays."""
    text = "word " * 200
    data.write_rows(
        tmp_path / "a.jsonl", ({"prompt": f"{i} {text}", "chosen": text, "rejected": "no"} for i in range(10_000))
    )
    code = (
        "from gapo.data import read_pairs\n"
        "def size(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]\n"
        f"before = size(); pairs = read_pairs({str(tmp_path / 'a.jsonl')!r}); print(len(pairs.rows), size() - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 10_000
    assert kilobytes < 5_500


@cache
def tokenizer() -> Any:
    return bytes_tokenizer(opens="<b>")


def table(rows: Any, folder: Path, **options: Any) -> TokenRows:
    settings = {"limits": Limits(8), "name": "pairs", "folder": folder, **options}
    return tokenized_rows(rows, tokenizer(), settings.pop("limits"), **settings)


@pytest.mark.parametrize("processes", [None, 2])
def test_tokens_from_a_file_are_those_of_each_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, processes: int | None
) -> None:
    pairs = [GOOD, {**GOOD, "chosen": "zzzzzzzz9", "rejected": "zzzzzzzz0"}, {**GOOD, "id": 2}]
    with caplog.at_level(logging.WARNING, logger="gapo"):
        found = table(written(pairs), tmp_path, processes=processes)
        expected = data.tokenize_pairs(pairs, tokenizer(), max_length=8, name="pairs")
    assert found == expected
    sides = [row[f"{side}_input_ids"] for row in expected for side in ("chosen", "rejected")]
    assert found.extent() == (max(map(max, sides)), max(map(len, sides)))  # without the row that is left out
    assert caplog.messages[0] == caplog.messages[1]
    assert "left out, since their answers are the same tokens: 1 (row 1)" in caplog.messages[0]


def test_a_file_is_read_again_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gapo.data import token_table

    calls = []
    whole = token_table.tokens_of_each
    monkeypatch.setattr(token_table, "tokens_of_each", lambda *a, **k: calls.append(1) or whole(*a, **k))
    pairs = [GOOD, {**GOOD, "id": 2}]
    first = table(pairs, tmp_path)
    assert table(pairs, tmp_path) == first
    assert len(calls) == 1
    others = [{**GOOD, "prompt": "R? "}, GOOD]
    assert table(others, tmp_path) == data.tokenize_pairs(others, tokenizer(), max_length=8)
    assert table(pairs, tmp_path, limits=Limits(5)) != first
    assert len(calls) == 3
    monkeypatch.setattr(tokenizer(), "chat_template", "{{ other }}")
    table(pairs, tmp_path)
    assert len(calls) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_a_bad_row_of_a_file_is_named(tmp_path: Path) -> None:
    bad = [GOOD, GOOD, {**GOOD, "images": ["a.png"]}, {**GOOD, "chosen": ""}]
    with pytest.raises(ValueError, match="row 2 of pairs: column 'images' holds media"):
        table(bad, tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


def test_the_texts_of_many_rows_are_tokenised_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    pairs = [{**GOOD, "prompt": "ab" * int(n), "chosen": "c" * int(n)} for n in rng.integers(1, 5, 600)]
    expected = [data.tokenize_pair(row, tokenizer()) for row in pairs]
    assert [{name: row[name] for name in expected[0]} for row in data.tokenize_pairs(pairs, tokenizer())] == expected
    pairs[300] = {**GOOD, "rejected": GOOD["chosen"]}
    pairs[299] = {**GOOD, "images": ["a.png"]}
    with pytest.raises(ValueError, match="row 299 of pairs: column 'images'"):
        data.tokenize_pairs(pairs, tokenizer())
