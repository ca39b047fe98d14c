"""The starting policy of a run, to measure drift from: without a second model in memory.

Where adapters are trained over a base that they did not change at first, the base is the starting policy: the adapters
are switched off for a forward. Otherwise its log-probabilities on a fixed sample of answers are kept in files of the
output folder, one for each pair, and read pair by pair. Either way a resumed run measures from step 0.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gapo.adapters.hf.margins import row_logits
from gapo.backends.torch.token_kl import token_kl
from gapo.data.tokenize import IGNORE_INDEX
from gapo.files import whole

logger = logging.getLogger(__name__)

Rows = dict[str, Tensor]  # of one pair, chosen and rejected: "input_ids", "attention_mask", "labels", each (2, seq)

_ADAPTERS = "adapters_off"  # an empty file: the base without its adapters is the starting policy
_NO_DRIFT = 1e-6  # nats a token


class StartingPolicy:
    """What the policy was at step 0, for the answers of a fixed sample of pairs.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def clear(self) -> None:
        """Forget an earlier run's."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def use_adapters_off(self) -> None:
        """Let the model without its adapters be the starting policy, from now on and after a resumption."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / _ADAPTERS).touch()

    def require_room(self, model: nn.Module, rows: Rows, tokens: int, warn_above_gib: float) -> None:
        """Raise ValueError where the disk has no room for the log-probabilities of so many tokens (the vocabulary is
        that of `model`'s logits on `rows`), and log a warning where they take more than `warn_above_gib`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        size, free = (b / 2**30 for b in (2 * tokens * _answers(model, rows)[0].shape[-1], _free(self._folder)))
        text = f"the starting policy takes {size:.2f} GiB in {self._folder}"
        if size > free:
            raise ValueError(f"{text}, where {free:.2f} GiB are free: give DriftCallback fewer pairs")
        if size > warn_above_gib:
            logger.warning("%s: fewer pairs take less", text)

    def keep(self, model: nn.Module, index: int, rows: Rows) -> None:
        """Keep what `model` gives now for the pair of this number: log-probabilities in float16, (tokens, vocab) of
        each answer. They are rounded: the KL of a policy to itself comes out just under 1e-6 nats instead of 0.
        """
        answers = {
            f"logps_{r}": answer.float().log_softmax(-1).half() for r, answer in enumerate(_answers(model, rows))
        }
        with whole(self._path(index)) as partial:
            save_file({name: x.cpu().contiguous() for name, x in {**answers, "tokens": _tokens(rows)}.items()}, partial)

    def has(self, index: int) -> bool:
        """Whether `kl` can be asked of this pair."""
        return (self._folder / _ADAPTERS).exists() or self._path(index).exists()

    def kl(self, model: nn.Module, index: int, rows: Rows, policy: list[Tensor]) -> Tensor:
        """(tokens,) KL of `policy`, the logits (tokens, vocab) of both answers, to the starting policy, in nats.

        Raises:
            ValueError: what was kept is of another pair.
        """
        if (self._folder / _ADAPTERS).exists():
            with adapters_off(model):
                start = _answers(model, rows)
        else:
            kept = load_file(self._path(index))
            if not torch.equal(kept["tokens"], _tokens(rows).cpu()):
                raise ValueError(
                    f"pair {index} of the held-out sample is not the one that {self._path(index)} was made of: resume "
                    "with the same pairs, seed and tokenizer as at the start, or begin in another output_dir"
                )
            start = [kept["logps_0"], kept["logps_1"]]
        return torch.cat([token_kl(p, q) for p, q in zip(policy, start, strict=True)])

    def _path(self, index: int) -> Path:
        return self._folder / f"pair-{index:05d}.safetensors"


def answer_logits(model: nn.Module, rows: Rows) -> tuple[list[Tensor], Tensor, Tensor]:
    """The logits (tokens, vocab) of each answer of a pair, and the logits and labels that they were taken from."""
    logits, labels = row_logits(model, rows)
    counted = labels[:, 1:] != IGNORE_INDEX
    return [logits[r, :-1][counted[r]] for r in range(len(labels))], logits, labels


def _answers(model: nn.Module, rows: Rows) -> list[Tensor]:
    with torch.no_grad():
        return answer_logits(model, rows)[0]


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _tokens(rows: Rows) -> Tensor:
    labels = rows["labels"][:, 1:]
    return labels[labels != IGNORE_INDEX]


def adapters_change_nothing(model: Any, rows: Rows) -> bool:
    """Whether all that is trained are adapters of peft, and `model` gives the same with them as without."""
    if not hasattr(model, "disable_adapter"):
        return False
    policy = _answers(model, rows)
    with adapters_off(model):
        if any(p.requires_grad for p in model.parameters()):
            return False
        start = _answers(model, rows)
    return float(torch.cat([token_kl(p, q) for p, q in zip(policy, start, strict=True)]).mean()) < _NO_DRIFT


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base of a peft model; afterwards each parameter wants its gradient, or does not, as before."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)
