"""Which of a Trainer's checkpoints can be resumed from."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in `folder` that was written to its end; None without one.

    A Trainer writes `trainer_state.json` after weights, optimizer and random states: where it can be read, the other
    files are whole. A warning names each later checkpoint that is passed over.
    """
    checkpoints = [
        (int(match[1]), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    ]
    for _, path in sorted(checkpoints, reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning("%s was not written to its end (its %s is not whole): passed over", path, TRAINER_STATE_NAME)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
