"""The types of the public functions, as a strict checker shows them to a user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from frameworks import require

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
CODE = ROOT / "tests" / "support" / "users_code.py"


def test_a_users_code_under_a_strict_checker(tmp_path: Path) -> None:
    for module in ("basedpyright", "torch"):
        require(module)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": [str(CODE)]}
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(settings), "utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    refused = {message["range"]["start"]["line"] + 1: message["message"] for message in report["generalDiagnostics"]}
    lines = CODE.read_text("utf-8").splitlines()
    wanted = {number for number, line in enumerate(lines, start=1) if "# error:" in line}
    assert refused.keys() == wanted, refused
    assert len(wanted) == 6
