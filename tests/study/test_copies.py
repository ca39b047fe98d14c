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


@pytest.mark.slow
def test_two_copies_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "write_report", lambda *_: None)
    config = copies_script.config_of(tmp_path, "alone")
    alone = json.loads(json.dumps(copies_script.numbers(study_module.run_study(config))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, copies_script.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    copies = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second")]
    assert copies[0]["numbers"] == copies[1]["numbers"] == alone
    own = [json.dumps(cell, sort_keys=True) for copy in copies for cell in copy["own"]]
    runs = len(list((tmp_path / "alone" / "cells").iterdir()))
    assert all(copy["own"] for copy in copies)
    assert len(own) == len(set(own)) == runs == len(list((tmp_path / "shared" / "cells").iterdir()))  # none made twice


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
