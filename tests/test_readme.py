"""Every Python example of the README runs as it stands, after the names that it takes for given."""

import re
from pathlib import Path
from typing import Any

import hf_models
import pytest
from transformers import Trainer, TrainingArguments

from gapo.adapters.hf.margins import pair_logps

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^## (.+?)$|```python\n(.*?)```", README, re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """The Python blocks by the heading that they stand under."""
    found, heading = {}, ""
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found[heading] = code
    return found


def given(heading: str, folder: Path) -> dict[str, Any]:
    """What the example under `heading` takes for given."""
    if "Trainer" in heading:
        arguments = TrainingArguments(str(folder), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
        names = {"Trainer": Trainer, "args": arguments, "pairs": hf_models.pairs(8)}
        return {**names, "model": hf_models.make("llama"), "tokenizer": hf_models.tokenizer()}
    if "own loop" in heading:
        return {"model": hf_models.make("llama"), "batch": hf_models.batch(), "margin_fn": pair_logps}
    return {}


@pytest.mark.parametrize("heading", examples())
def test_example(heading: str, tmp_path: Path) -> None:
    names = given(heading, tmp_path)
    exec(compile(examples()[heading], f"README.md: {heading}", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1


def test_the_readme_says_which_gapo_it_is() -> None:
    assert len(examples()) >= 3
    for number in ("2602.04909", "2503.20194", "2510.21830"):
        assert number in README
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}:" in (ROOT / "Makefile").read_text()
