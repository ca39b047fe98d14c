"""What `gapo train` asks of files and folders before anything is imported or read."""

from __future__ import annotations

from pathlib import Path

from gapo.files import require_writable
from gapo.runs.errors import ConfigError
from gapo.runs.paths import require_model, require_there
from gapo.runs.train.train_config import TrainConfig


def require_files(config: TrainConfig) -> None:
    """Raise for folders that cannot be written to, for a finished run, and for inputs that are not there.

    Raises:
        OSError: names the folder that cannot be written to.
        ConfigError: names what is there, or what is not.
    """
    folder = Path(config.output_dir)
    if folder.is_file():
        raise ConfigError(f"output_dir {config.output_dir!r} is a file; give a folder")
    require_writable(folder)
    if config.model == "tiny":
        require_writable(Path(config.cache_dir))
    if not config.overwrite and (folder / "summary.json").exists():
        raise ConfigError(f"{config.output_dir} holds a finished run: give another output_dir, or --overwrite true")
    for name in ("pairs", "eval_pairs", "tiny_text"):
        require_there(name, getattr(config, name))
    require_model("model", None if config.model == "tiny" else config.model, config.model_revision)
    require_model("tokenizer", config.tokenizer)
