"""Copies of `gapo study` over one folder: the numbers of one, each run made once, and nothing forgotten meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import copies_script
import pytest

from gapo.runs.claims import Claims
from gapo.runs.errors import ConfigError
from gapo.study import study as study_module
from gapo.study.study_config import StudyConfig


def test_two_copies_give_the_numbers_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, copies_script.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "first", "second"))
    for copy in (first, second):
        assert {part: copy[part] for part in ("chosen", "tries", "records")} == {
            part: alone[part] for part in ("chosen", "tries", "records")
        }
        assert copy["own"]
    own = [json.dumps(cell, sort_keys=True) for copy in (first, second) for cell in copy["own"]]
    assert len(own) == len(set(own)) == len(alone["own"])  # no run was made twice
    assert not list(tmp_path.rglob("*.claim"))


def test_overwrite_forgets_nothing_that_another_copy_is_making(tmp_path: Path) -> None:
    config = StudyConfig(output_dir=str(tmp_path), overwrite=True)
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "a.json").write_text("{}")
    (cells / "b.json.claim").write_text('{"host": "another", "process": 7}')
    with Claims() as claims, pytest.raises(ConfigError, match=r"in use by another copy \(process 7 on another\)"):
        study_module._forget(Path(config.output_dir) / "cells", claims)
    assert (cells / "a.json").exists()
    (cells / "b.json.claim").unlink()
    with Claims() as claims:
        study_module._forget(cells, claims)
    assert not cells.exists()
