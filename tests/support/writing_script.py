"""Kills commands with SIGKILL while they write: `python writing_script.py JOBS.json`, one fork for each job.

A job is {"arguments": of gapo, "file": its name or a pattern, "when": "half" | "written" | "renamed" | a number}: the
process is killed when half of the file is there, before it takes its name, after, or in the middle of the line after so
many. The libraries are loaded once, before the first fork.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import quick_runs

from gapo import cli, files


def kill_at(name: str, when: str | int) -> None:
    """Let this process be killed there."""
    to_disk, replace, write = files._to_disk, os.replace, files.JsonLines.write
    lines = 0

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def to_disk_or_end(partial: Path) -> None:
        if fnmatch(partial.name, f"{name}.part*") and when in ("half", "written"):
            if when == "half":
                os.truncate(partial, partial.stat().st_size // 2)
            end()
        to_disk(partial)

    def replace_or_end(old: Any, new: Any) -> None:
        replace(old, new)
        if Path(new).name == name and when == "renamed":
            end()

    def write_or_end(log: files.JsonLines, row: dict[str, Any]) -> None:
        nonlocal lines
        if log._path.name == name:
            if lines == when:
                log._file.write(json.dumps(row)[:9])
                log._file.flush()
                end()
            lines += 1
        write(log, row)

    files._to_disk, os.replace, files.JsonLines.write = to_disk_or_end, replace_or_end, write_or_end  # type: ignore


def main() -> None:
    """Run every job; the ends of all of them, as JSON, are the last line printed."""
    from gapo import study  # noqa: F401  # before the forks
    from gapo.runs import score  # noqa: F401  # before the forks
    from gapo.runs.output import plots
    from gapo.runs.train import train_torch  # noqa: F401  # before the forks

    plots._svg = quick_runs.plain_svg  # type: ignore[assignment]
    gc.freeze()  # what is loaded is not searched for garbage each time that a Trainer trains
    ends = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            kill_at(job["file"], job["when"])
            os._exit(cli.main(job["arguments"]))
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
