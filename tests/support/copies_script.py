"""Run by test_copies.py: one `gapo study` alone, and two copies of it over one folder, at the same time.

`python copies_script.py FOLDER`: leaves FOLDER/alone.json, first.json and second.json: what each ended with, and the
cells that it ran itself.
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


def run(name: str, folder: Path, meeting: Any = None) -> None:
    """One copy. With a `meeting` it begins its first cell when the other copy has begun one too."""
    plain, own = grid.measure, []

    def measure(material: Any, config: Any, cell: Any) -> Any:
        own.append(asdict(cell))
        if meeting is not None and len(own) == 1:
            meeting.wait(300)
        return plain(material, config, cell)

    grid.measure = measure
    study.write_report = lambda *_: None  # drawing takes longest, and is not the matter here
    claims.POLL = grid.POLL = 0.05
    base = folder / ("alone" if meeting is None else "shared")
    done = study.run_study(StudyConfig(cache_dir=str(base / "cache"), output_dir=str(base / "out"), **SETTINGS))
    records = [[asdict(cell), record["evaluation"]] for cell, record in done.records.items()]
    (folder / f"{name}.json").write_text(
        json.dumps({"chosen": done.chosen, "tries": done.tries, "records": records, "own": own})
    )


def main(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(2)
    copies = [context.Process(target=run, args=arguments) for arguments in
              (("first", folder, meeting), ("second", folder, meeting), ("alone", folder))]  # fmt: skip
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    sys.exit(max(abs(copy.exitcode or 0) for copy in copies))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
