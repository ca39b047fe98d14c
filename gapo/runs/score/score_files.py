"""What `gapo score` asks of files and folders before anything is imported or read."""

from __future__ import annotations

from pathlib import Path

from gapo.files import require_writable
from gapo.runs.paths import require_model, require_there
from gapo.runs.ranks import require_one
from gapo.runs.score.score_config import ScoreConfig


def require_files(config: ScoreConfig) -> None:
    """Raise for outputs that cannot be written, and for inputs that are not there.

    Raises:
        OSError: names the folder that cannot be written to.
        ConfigError: names what does not exist; or several processes would do the same work.
    """
    if config.shard is None:
        require_one("gapo score")
    for path in (config.output, config.select_output):
        if path is not None:
            require_writable(Path(path).parent)
    for name in ("pairs", "checkpoints"):
        require_there(name, getattr(config, name))
    for name in ("adapter", "tokenizer"):
        require_model(name, getattr(config, name))
    for model in config.model:
        require_model("model", model)
