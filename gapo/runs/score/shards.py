"""Parts of one scoring, measured by as many processes, on one machine or on many, and their merge.

Every shard plans the batches of the whole, and measures each n-th of them with the whole's draws. So a pair shares its
anchor with the same pairs as in one run, and has the same gap. The merge puts the lines together in the order of one
run, from whose log nothing then tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gapo.files import read_lines
from gapo.runs.errors import ConfigError
from gapo.runs.output.tables import Row


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0.

    Raises:
        ValueError: there is no such part.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard must be I/N with 0 <= I < N, such as 0/4 to 3/4; got {self.index}/{self.count}")

    @classmethod
    def of(cls, text: str) -> Shard:
        """The shard of `I/N`. Raises ValueError for another text."""
        if (match := re.fullmatch(r"(\d+)/(\d+)", text)) is None:
            raise ValueError(f"shard must be I/N with 0 <= I < N, such as 0/4 to 3/4; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def log(self, output: Path) -> Path:
        """The log of this shard, beside the output."""
        return output.with_name(f"{output.name}.shard-{self.index}-of-{self.count}")

    def holds(self, batch: int) -> bool:
        """Whether the `batch`-th batch of a model is of this shard."""
        return batch % self.count == self.index

    def steps(self, batches: int, models: int) -> list[int]:
        """Numbers of this shard's lines, from 1, among those of the whole: `models` times `batches`."""
        return [m * batches + i + 1 for m in range(models) for i in range(batches) if self.holds(i)]


def shard_of_environment(environment: Mapping[str, str]) -> tuple[Shard, str] | None:
    """The shard of a process that SLURM's job array or torchrun has started, and the variables that say so; or None.

    In an array of torchrun's, each element is divided by its ranks.

    Raises:
        ConfigError: the array's numbers are no sequence of equal steps.
    """
    shard, names = Shard(), []
    if int(environment.get("SLURM_ARRAY_TASK_COUNT") or 1) > 1:
        shard = _of_array(*(int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT")))
        names += ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"]
    if "LOCAL_RANK" in environment and int(environment.get("WORLD_SIZE") or 1) > 1:
        ranks = int(environment["WORLD_SIZE"])
        shard = Shard(shard.index * ranks + int(environment.get("RANK") or 0), shard.count * ranks)
        names += ["RANK", "WORLD_SIZE"]
    return (shard, ", ".join(names)) if names else None


def _of_array(own: int, first: int, last: int, count: int) -> Shard:
    step, rest = divmod(last - first, count - 1)
    if rest or step == 0 or (own - first) % step:
        raise ConfigError(
            f"the elements of the SLURM array, {count} from {first} to {last}, are not evenly spaced: give --shard I/N"
        )
    return Shard((own - first) // step, count)


def shards_beside(output: Path) -> dict[Shard, Path]:
    """The logs of shards that lie beside the output."""
    pattern = re.compile(re.escape(output.name) + r"\.shard-(\d+)-of-(\d+)")
    paths = sorted(output.parent.glob("*.shard-*"))
    return {Shard(int(m[1]), int(m[2])): path for path in paths if (m := pattern.fullmatch(path.name))}


def merge_heads(output: Path) -> list[Row]:
    """The first lines of all shards beside the output, in their order: settings and versions.

    Raises:
        ConfigError: there is none, one is missing or empty, or they are not of one division, one setting, one version.
    """
    logs = shards_beside(output)
    if not logs:
        raise ConfigError(f"no shards to merge beside {output}: run gapo score ... --output {output} --shard I/N first")
    counts = sorted({shard.count for shard in logs})
    if len(counts) > 1:
        raise ConfigError(
            f"beside {output} are shards of {' and of '.join(map(str, counts))}: remove those of the other division"
        )
    heads = {shard: next(iter(read_lines(path)), {}) for shard, path in logs.items()}
    every = [Shard(i, counts[0]) for i in range(counts[0])]
    if missing := [shard for shard in every if not heads.get(shard)]:
        raise ConfigError(f"shards {', '.join(map(str, missing))} of {output} are missing: run them, then merge")
    for shard in every[1:]:
        for part in ("settings", "versions"):
            first, own = heads[every[0]][part], heads[shard][part]
            if changed := [name for name in first | own if first.get(name) != own.get(name) and name != "pairs"]:
                changes = ", ".join(f"{name}: {first.get(name)!r} and {own.get(name)!r}" for name in changed)
                raise ConfigError(f"shards 0/{shard.count} and {shard} of {output} have other {part} ({changes}): "
                                  "run one of them anew, --overwrite")  # fmt: skip
    return [heads[shard] for shard in every]


def merged_lines(output: Path, batches: int, models: int) -> list[Row]:
    """The measurements of all shards, in the order of one run. Raises ConfigError for a shard that is not finished."""
    lines: list[Row] = []
    for shard, path in shards_beside(output).items():
        own = read_lines(path)[1:]
        wanted = shard.steps(batches, models)
        if [line["step"] for line in own] != wanted:
            raise ConfigError(
                f"shard {shard} of {output} has {len(own)} of {len(wanted)} batches: run it again, and it goes on"
            )
        lines += own
    return sorted(lines, key=lambda line: line["step"])


def require_batches(shard: Shard, batches: Sequence[object]) -> None:
    """Raise ConfigError where shards would be empty."""
    if shard.count > len(batches):
        raise ConfigError(f"shard {shard} of {len(batches)} batches would be empty: divide by {len(batches)} at most")
