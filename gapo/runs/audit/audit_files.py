"""The files of an audit: the table, and beside it, named after it, page, settings and measurements."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapo.files import require_writable, whole, write_text
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.judging import Member
from gapo.runs.claims import Claims
from gapo.runs.errors import ConfigError, changes
from gapo.runs.output.tables import Row, write_table
from gapo.runs.paths import require_model, require_there
from gapo.runs.ranks import require_one


class AuditFiles:
    """The files of the audit with this output."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.page, self.sidecar, self.parts = (
            self.output.with_name(self.output.name + ending) for ending in (".html", ".json", ".parts")
        )
        self.start = self.parts / "start.safetensors"

    def part(self, member: Member) -> Path:
        """The measurements of one policy."""
        return self.parts / f"{member.name}.safetensors"

    def begin(self, settings: Row, overwrite: bool, claims: Claims) -> None:
        """Begin, or go on with what was begun.

        Raises:
            ConfigError: measurements of other settings or pairs are there, or a file that is none of an audit's; or
                they are to be overwritten, and another copy is at work on them.
        """
        path = self.parts / "settings.json"
        if overwrite and self.parts.is_dir():
            if claims.others(self.parts):
                raise ConfigError(f"{self.parts} is in the hands of another copy: let it end, or give another output")
            shutil.rmtree(self.parts)
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if changed := changes(earlier | settings, earlier, settings):
                raise ConfigError(
                    f"{self.parts} holds measurements of other settings ({changed}): give another output, or overwrite"
                )
            return
        if self.output.exists() and not overwrite:
            raise ConfigError(
                f"{self.output} is there already, without the measurements ({self.parts.name}) of a gapo audit: give "
                "another output, or overwrite"
            )
        write_text(path, json.dumps(settings, indent=2) + "\n")


def require_files(config: AuditConfig) -> None:
    """Raise for outputs that cannot be written, and for inputs that can only be local and are not there.

    Raises:
        OSError: names the folder that cannot be written to.
        ConfigError: names what does not exist; or several processes would do the same work.
    """
    require_one("gapo audit")
    for path in (config.output, config.clean_output):
        if path is not None:
            require_writable(Path(path).parent)
    for name in ("pairs", "apply"):
        require_there(name, getattr(config, name))
    if config.model != "tiny":
        require_model("model", config.model)
    require_model("tokenizer", config.tokenizer)
    if config.apply is not None and not Path(config.apply).is_file():
        raise ConfigError(f"apply: there is no file {config.apply!r}; give the marks.json that the page has saved")


def write_ranking(path: Path, rows: Sequence[Row]) -> None:
    """Write the table by the ending of `path`, atomically. In CSV, messages are written as JSON."""
    if path.suffix != ".csv":
        write_table(path, rows)
        return
    with whole(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
