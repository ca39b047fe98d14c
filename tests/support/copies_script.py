"""Run by test_copies.py: two copies of `gapo study` over one folder, at the same time.

`python copies_script.py FOLDER`: leaves FOLDER/first.json and second.json: what each ended with, and the cells that it
ran itself.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gapo.runs import claims
from gapo.study import grid, study
from gapo.study.outcome import Study
from gapo.study.study_config import StudyConfig

SETTINGS: dict[str, Any] = {
    "demo_size": 100,
    "train_pairs": 16,
    "validation_pairs": 8,
    "test_pairs": 8,
    "batch_size": 8,
    "seeds": 1,
    "flip_modes": "random",
    "flip_rates": (0.25,),
    "learning_rates": (1e-3,),
    "arms": "simpo,dpo",
    "tiny_hidden_size": 16,
    "tiny_layers": 1,
    "tiny_heads": 2,
    "tiny_vocab": 300,
    "tiny_text_steps": 0,
    "tiny_answer_steps": 1,
    "workers": 1,
}


def config_of(folder: Path, name: str) -> StudyConfig:
    return StudyConfig(cache_dir=str(folder / "cache"), output_dir=str(folder / name), **SETTINGS)


def numbers(done: Study) -> dict[str, Any]:
    """All that a study ends with, but for what tells of time and place."""
    records = [[asdict(cell), record["evaluation"], record["over_time"]] for cell, record in done.records.items()]
    return {"chosen": done.chosen, "tries": done.tries, "records": records}


def run(name: str, folder: Path, meeting: Any) -> None:
    """One copy, which begins its first cell when the other one has begun one too."""
    plain, own = grid.measure, []

    def measure(material: Any, config: Any, cell: Any) -> Any:
        own.append(asdict(cell))
        if len(own) == 1:
            meeting.wait(300)
        return plain(material, config, cell)

    grid.measure = measure
    study.write_report = lambda *_: None  # drawing takes longest, and is not the matter here
    claims.POLL = grid.POLL = 0.05
    done = study.run_study(config_of(folder, "shared"))
    (folder / f"{name}.json").write_text(json.dumps({"numbers": numbers(done), "own": own}))


def main(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(2)
    copies = [context.Process(target=run, args=(name, folder, meeting)) for name in ("first", "second")]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    sys.exit(max(abs(copy.exitcode or 0) for copy in copies))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
