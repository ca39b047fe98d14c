"""`marks.json`: what is read of it, and that anything else is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from gapo.runs.audit.marks import read_marks

DIGEST = "0f" * 32
SOUND: dict[str, Any] = {
    "format": "gapo-marks",
    "version": 1,
    "pairs_digest": DIGEST,
    "marks": [
        {"row": 12, "line": 13, "id": "a", "mark": "wrong"},
        {"row": 0, "line": None, "id": None, "mark": "right"},
        {"row": 99, "mark": "unsure"},
    ],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "marks.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_marks_by_row(tmp_path: Path) -> None:
    marks = {12: "wrong", 0: "right", 99: "unsure"}
    for content in (SOUND, b"\xef\xbb\xbf" + json.dumps(SOUND, indent=1).encode()):  # as some editors save it
        assert read_marks(written(tmp_path, content), DIGEST) == marks
        assert read_marks(str(tmp_path / "marks.json"), DIGEST, pairs=100) == marks
    assert read_marks(written(tmp_path, SOUND | {"marks": []}), DIGEST) == {}
    twice = SOUND["marks"] + SOUND["marks"][:1]
    assert read_marks(written(tmp_path, SOUND | {"marks": twice}), DIGEST) == marks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no marks.json, as an audit's page saves it: Expecting value in line 1"),
        (b'{"format":\n', "is no marks.json, as an audit's page saves it: Expecting value in line 2"),
        (b"\xff{}", "saves it: it is not UTF-8"),
        (b"[" * 100_000, "saves it: it is nested too deeply"),
        (b'{"marks": ' + b"9" * 5000 + b"}", "saves it: Exceeds the limit"),
        ([], "it has no \"format\": 'gapo-marks'"),
        ({"format": "gapo-scores"}, "it has no \"format\": 'gapo-marks'"),
        (SOUND | {"version": 2}, "holds marks of version 2, and this gapo reads 1: save them anew"),
        (SOUND | {"version": None}, "holds marks of version null"),
        (SOUND | {"version": True}, "holds marks of version true"),
        (
            SOUND | {"pairs_digest": "12" * 32},
            "marks other pairs .* begins with '121212121212', that of these with '0f0f",
        ),
        (SOUND | {"pairs_digest": None}, "marks other pairs"),
        (SOUND | {"marks": {}}, 'its "marks" are no list'),
        (SOUND | {"marks": [3]}, r'marks\[0\]: must be an object with "row" and "mark", got 3'),
        (SOUND | {"marks": [{"row": 1}]}, r"marks\[0\]: mark must be 'wrong', 'right', 'unsure', got null"),
        (SOUND | {"marks": [{"row": 1, "mark": ["wrong"]}]}, r'got \["wrong"\]'),
        (SOUND | {"marks": [{"row": -1, "mark": "wrong"}]}, "row must be a whole number from 0 to 99, got -1"),
        (SOUND | {"marks": [{"row": 100, "mark": "wrong"}]}, "row must be a whole number from 0 to 99, got 100"),
        (SOUND | {"marks": [{"row": 1.0, "mark": "wrong"}]}, "row must be a whole number from 0 to 99, got 1.0"),
        (SOUND | {"marks": [{"row": True, "mark": "wrong"}]}, "row must be a whole number from 0 to 99, got true"),
        (SOUND | {"marks": [{"row": "1\n", "mark": "wrong"}]}, r'got "1\\n"'),
        (
            SOUND | {"marks": [{"row": 1, "mark": "wrong"}, {"row": 1, "mark": "right"}]},
            r"marks\[1\]: row 1 is marked 'wrong' before, and 'right' here; leave one of them",
        ),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_marks(written(tmp_path, content), DIGEST, pairs=100)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "marks.json"))


def test_rows_have_no_end_where_their_number_is_not_known(tmp_path: Path) -> None:
    path = written(tmp_path, SOUND | {"marks": [{"row": -1, "mark": "wrong"}]})
    with pytest.raises(ValueError, match="row must be a whole number from 0 up, got -1"):
        read_marks(path, DIGEST)
    with pytest.raises(FileNotFoundError, match="does not exist: save the marks on the audit's page"):
        read_marks(tmp_path / "gone.json", DIGEST)
