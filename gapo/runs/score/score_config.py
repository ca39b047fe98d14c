"""The settings of `gapo score`, besides those of the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gapo.runs.config_bases import PairSource
from gapo.runs.output.tables import require_ending
from gapo.runs.score.shards import Shard

WHICH = ("lowest", "highest")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PairSource):
    """Which pairs are scored, under which models, and where the scores go.

    Args:
        output: file of scores to write: .jsonl, .jsonl.gz or .parquet.
        model: folders or Hub names of causal language models; of adapters (peft), with the base that they name.
        adapter: folder or Hub name of an adapter (peft) to put on each model; its weights alone are then perturbed.
        checkpoints: folder of a training: each checkpoint-* in it is scored. The model, where given, is their base.
        tokenizer: another tokenizer than the model's: a Hub name or folder.
        batch_size: most pairs in a batch, which share an anchor; batches of a repeat differ by one pair at most.
        repeats: how often each pair is measured, each time in a batch of others.
        seed: of the batches.
        limit: score only so many pairs.
        strict: stop at the first bad row instead of leaving it out.
        dtype: of the weights. 16-bit ones round an exact anchor away; anchor auto takes first order for them.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        shard: measure one part of n alone, "I/N" with I from 0 to N - 1; its log lies beside the output until all are
            merged.
        merge: put the parts together, as one run would have written them.
        overwrite: score anew over scores that are there already, finished or not.
        select: ("lowest" or "highest", share of the pairs in (0, 1]): which pairs to write as `select_output`, by gap.
        select_output: file of the selected pairs: .jsonl, .jsonl.gz or .parquet.

    Raises:
        ValueError: a value is out of its range, or options contradict each other.
    """

    output: str
    model: tuple[str, ...] = ()
    adapter: str | None = None
    checkpoints: str | None = None
    tokenizer: str | None = None
    batch_size: int = 16
    repeats: int = 1
    seed: int = 0
    strict: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    device: str = "auto"
    shard: str | None = None
    merge: bool = False
    overwrite: bool = False
    select: tuple[str, float] | None = None
    select_output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"batch_size": 1, "repeats": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)!r}")
        require_ending("output", self.output)
        if self.shard is not None:
            Shard.of(self.shard)
            if self.merge:
                raise ValueError(f"shard and merge exclude each other: measure shard {self.shard}, or merge them all")
            if self.select is not None:
                raise ValueError("select needs the scores of every pair: give it with merge, not with a shard")
        if (self.select is None) != (self.select_output is None):
            raise ValueError("select and select_output belong together: which pairs, and the file to write them to")
        if self.select is not None:
            _check_select(self.select)
            require_ending("select_output", str(self.select_output))
        self._check_files()

    def _check_files(self) -> None:
        written = {"output": self.output, "select_output": self.select_output}
        named = {"pairs": self.pairs, **{name: value for name, value in written.items() if value is not None}}
        paths = [Path(value).resolve() for value in named.values()]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{', '.join(named)} must be different files, got {', '.join(named.values())}")
        if self.adapter is not None and self.checkpoints is not None:
            raise ValueError("adapter and checkpoints exclude each other: checkpoints bring their own adapters")
        if self.checkpoints is not None and len(self.model) > 1:
            raise ValueError(f"checkpoints have one base at most, got {len(self.model)} models")


def _check_select(select: tuple[str, float]) -> None:
    which, share = select
    if which not in WHICH or not 0 < share <= 1:
        raise ValueError(f"select must be lowest or highest and a share in (0, 1], got {which!r} {share!r}")
