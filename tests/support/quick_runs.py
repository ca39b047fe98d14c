"""`gapo train` in a second or two, its interruption, and what a page that it writes refers to."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from gapo import cli

QUICK = {
    "demo_size": 60,
    "flip_rate": 0.2,
    "tiny_hidden_size": 16,
    "tiny_layers": 1,
    "tiny_heads": 2,
    "tiny_vocab": 300,
    "tiny_answer_steps": 2,
    "tiny_batch_size": 2,
    "batch_size": 8,
    "max_steps": 4,
    "eval_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "rho": 0.2,
    "max_length": 64,
}


def train(folder: Path, *more: str, **options: Any) -> int:
    """`gapo train CONFIG.yaml` with quick settings, a run in `folder`/run."""
    settings = {**QUICK, "output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), **options}
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return cli.main(["train", str(path), *more])


def plain_svg(drawing: Any) -> str:
    """In place of `gapo.runs.output.plots._svg`, whose drawing takes half of the time of a quick run."""
    return '<svg viewBox="0 0 1 1"></svg>'


class Page(html.parser.HTMLParser):
    """What a page refers to, and how its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v and v[0] != "#"]


def interrupt_at_step_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `gapo train` on PyTorch be interrupted there, until the patch is undone."""
    from gapo.runs.train.recorder import Recorder

    plain = Recorder.on_step

    def interrupted(self: Any, result: Any, batch: Any) -> None:
        plain(self, result, batch)
        if self._step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_step", interrupted)
