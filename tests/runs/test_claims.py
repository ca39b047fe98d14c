"""Claims on the parts of a shared folder: one owner each, and those of the dead are taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gapo import files
from gapo.runs import claims as module
from gapo.runs.claims import Claims


def left_by(path: Path, host: str, process: int, seconds_ago: float = 0.0) -> Path:
    """A claim on `path` that another process has left."""
    claim = path.with_name(f"{path.name}.claim")
    claim.write_text(json.dumps({"host": host, "process": process}))
    touched = time.time() - seconds_ago
    os.utime(claim, (touched, touched))
    return claim


def test_one_process_alone_claims(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cell.json"
    code = "import sys; from pathlib import Path; from gapo.runs.claims import Claims\n"
    code += "with Claims() as claims: print(claims.take(Path(sys.argv[1])))"

    def another() -> str:
        return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True).stdout.strip()

    with Claims() as claims:
        assert claims.take(path)
        assert another() == "False"
        claims.release(path)
        assert another() == "True"
        assert claims.take(path)
    assert not list(tmp_path.rglob("*.claim"))


def test_the_claims_of_the_dead_are_taken_over(tmp_path: Path) -> None:
    here, path = socket.gethostname(), tmp_path / "cell.json"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    late = module.PATIENCE + 60
    cases = {
        (here, ended.pid, 0.0): True,
        (here, os.getpid(), 0.0): True,  # of an earlier process of this number
        (here, os.getppid(), 0.0): False,
        (here, os.getppid(), late): True,  # another process has that number now
        ("elsewhere", ended.pid, 0.0): False,
        ("elsewhere", 1, late): True,
    }
    for (host, process, seconds_ago), free in cases.items():
        left_by(path, host, process, seconds_ago)
        with Claims() as claims:
            assert claims.others(tmp_path) == ([] if free else [tmp_path / "cell.json.claim"])
            assert claims.take(path) == free, (host, process, seconds_ago)
    (tmp_path / "cell.json.claim").write_text("")  # being written
    assert not Claims().take(path)


def test_a_claim_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    with Claims() as claims:
        assert claims.take(tmp_path / "cell.json")
        claim = tmp_path / "cell.json.claim"
        os.utime(claim, (0, 0))
        end = time.monotonic() + 30
        while claim.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert claim.stat().st_mtime > 0


def test_a_copy_waits_for_the_one_before_it_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "POLL", 0.01)
    claim = left_by(tmp_path / "policy", "elsewhere", 7)
    threading.Timer(0.1, claim.unlink).start()
    with Claims() as claims, claims.alone(tmp_path / "policy", "the policy"):
        assert json.loads(claim.read_text())["process"] == os.getpid()
    assert capsys.readouterr().out == "waiting for the policy, which process 7 on elsewhere has in hand\n"


def test_partial_files_of_other_machines_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "a.json"
    here, there = (tmp_path / f"a.json.part{ended.pid}@{host}" for host in (socket.gethostname(), "elsewhere"))
    for partial in (here, there):
        partial.write_text("")
    files.write_text(path, "{}")
    assert (here.exists(), there.exists()) == (False, True)
