"""Tables as JSON lines and Parquet: the same rows, the same bytes, whole or not at all."""

import time
from pathlib import Path

import pytest

from gapo.runs.output.tables import ENDINGS, read_table, require_ending, write_table

ROWS = [
    {"row": 0, "prompt": "Grüße\u2028 <b>", "chosen": [{"role": "user", "content": "x"}], "gaps": [0.1, 0.2]},
    {"row": 1, "prompt": "b", "chosen": [], "gaps": [1e-9], "id": "only here"},
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new" / f"a{ending}"
    write_table(path, ROWS)
    first = path.read_bytes()
    read = read_table(path)
    assert [{k: v for k, v in row.items() if v is not None} for row in read] == ROWS
    time.sleep(1.1 if ending.endswith("gz") else 0)  # a gzip header holds seconds
    write_table(path, ROWS)
    assert path.read_bytes() == first


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    write_table(path, ROWS)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    monkeypatch.setattr("gapo.files.json.dumps", full)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, ROWS[:1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_mixed_columns_are_for_json_lines(tmp_path: Path) -> None:
    for mixed in ([{"a": 1}, {"a": "x"}], [{"a": "x"}, {"a": 1}], [{"a": [1]}, {"a": 1}]):
        with pytest.raises(ValueError, match=r"a column cannot be stored as Parquet .* write \.jsonl instead"):
            write_table(tmp_path / "a.parquet", mixed)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"output must end in \.jsonl, \.jsonl\.gz, \.parquet, got 'a\.csv'"):
        require_ending("output", "a.csv")
