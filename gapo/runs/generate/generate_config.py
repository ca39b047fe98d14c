"""The settings of `gapo generate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from gapo.runs.config_bases import require_not_negative, require_positive
from gapo.runs.errors import require_limit, require_seed

# Where benchmarks take a model's name from its file of answers: FastChat's and Arena-Hard-Auto's `load_model_answers`.
NAMED_BY_FILE = ("arena_hard", "mt_bench")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which prompts a model answers, how it writes, and where the answers go.

    Args:
        prompts: a file (.json, .jsonl, each also .gz, .csv, .parquet) or the name of a data set. Each row has "prompt"
            (text, or messages), "instruction" (AlpacaEval) or "turns" (MT-Bench).
        model: folder or Hub name of a causal language model, or of an adapter (peft), with the base that it names.
        output: file of answers to write: .json for alpaca_eval, else .jsonl.
        format: jsonl keeps each row and adds "output"; the others are what AlpacaEval 2, Arena-Hard-Auto 2 and
            FastChat's MT-Bench read.
        adapter: folder or Hub name of an adapter (peft) to put on the model.
        tokenizer: another tokenizer than the model's: a Hub name or folder.
        generator: name of the model in the answers; by default that of its folder. Arena-Hard and MT-Bench take it
            from the name of the output.
        chat: whether texts are put to the model as a user's message, in its chat template; by default for benchmarks,
            where the tokenizer has a template. Else the model continues the text itself.
        system: text of a system message before each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 takes the likeliest token. By default 0, and for mt_bench that of the question's
            category (0.7 for writing and roleplay, 0.1 for stem and humanities, else 0).
        top_p: share of the probability that sampling draws from.
        batch_size: prompts answered at a time.
        seed: of sampling.
        split: split of a data set.
        limit: answer only so many prompts.
        dtype: of the weights.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        overwrite: generate anew over answers that are there already, finished or not.

    Raises:
        ValueError: a value is out of its range, or options contradict each other.
    """

    prompts: str
    model: str
    output: str
    format: Literal["jsonl", "alpaca_eval", "arena_hard", "mt_bench"] = "jsonl"
    adapter: str | None = None
    tokenizer: str | None = None
    generator: str | None = None
    chat: bool | None = None
    system: str | None = None
    max_new_tokens: int = 1024
    temperature: float | None = None
    top_p: float = 1.0
    batch_size: int = 8
    seed: int = 0
    split: str = "train"
    limit: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_positive(self, ("max_new_tokens", "batch_size"))
        require_seed("seed", self.seed)
        require_limit(self.limit)
        if self.temperature is not None:
            require_not_negative(self, ("temperature",))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        ending = ".json" if self.format == "alpaca_eval" else ".jsonl"
        if Path(self.output).suffix != ending:
            raise ValueError(f"output of the format {self.format} must end in {ending}, got {self.output!r}")
        if Path(self.output).resolve() == Path(self.prompts).resolve():
            raise ValueError(f"output must be another file than the prompts, got {self.output!r} for both")
        if self.format in NAMED_BY_FILE and self.generator not in (None, Path(self.output).stem):
            raise ValueError(
                f"{self.format} names a model by its file of answers: give the output {self.generator}.jsonl, or no "
                f"generator; got generator {self.generator!r} and output {self.output!r}"
            )
        if self.system is not None and self.chat is False:
            raise ValueError("system is a message of a chat, and chat is false: leave out one of them")

    @property
    def name(self) -> str:
        """The model's name in the answers."""
        named_by_file = self.format in NAMED_BY_FILE
        return self.generator or (Path(self.output).stem if named_by_file else Path(self.model).name)


# What changes no answer: where it is written, and by which device.
FREE = ("prompts", "output", "model", "adapter", "tokenizer", "generator", "device", "overwrite")


def settings_of(config: GenerateConfig) -> dict[str, object]:
    """Every option that the answers depend on."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
