"""The starting policy of a run, from which drift is measured, without a second model in memory.

Where adapters are trained that changed nothing at first, their base is the starting policy: a forward with the adapters
switched off gives its logits. Otherwise its log-probabilities on a fixed sample of answers are kept in the output
folder, in one file for each pair, and read pair by pair. Either way a resumed run measures from step 0.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gapo.adapters.hf.margins import row_logits
from gapo.adapters.hf.models import adapters_off
from gapo.backends.torch.token_kl import token_kl
from gapo.data.tokenize import IGNORE_INDEX
from gapo.files import whole

logger = logging.getLogger(__name__)

Rows = dict[str, Tensor]  # of one pair, chosen and rejected: "input_ids", "attention_mask", "labels", each (2, seq)

_ADAPTERS = "adapters_off"  # an empty file, which says that the model without its adapters is the starting policy
_NO_DRIFT = 1e-6  # nats a token


class StartingPolicy:
    """The policy at step 0, on the answers of a fixed sample of pairs.

    Args:
        folder: the folder that keeps it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def clear(self) -> None:
        """Remove an earlier run's starting policy."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def use_adapters_off(self) -> None:
        """Take the model without its adapters as the starting policy, from now on and after a resumption."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / _ADAPTERS).touch()

    def require_room(self, model: nn.Module, rows: Rows, tokens: int, warn_above_gib: float) -> None:
        """Raise ValueError where the disk has no room; log a warning where more than `warn_above_gib` is needed.

        The need is 2 bytes for each of the `tokens` and each entry of the vocabulary, that of the logits on `rows`.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        size, free = (b / 2**30 for b in (2 * tokens * _answers(model, rows)[0].shape[-1], _free(self._folder)))
        text = f"the starting policy takes {size:.2f} GiB in {self._folder}"
        if size > free:
            raise ValueError(f"{text}, where {free:.2f} GiB are free: give DriftCallback fewer pairs")
        if size > warn_above_gib:
            logger.warning("%s: fewer pairs take less", text)

    def keep(self, model: nn.Module, index: int, rows: Rows) -> None:
        """Keep the log-probabilities of `model` for pair `index`: float16, (tokens, vocab) of each answer.

        They are rounded: the KL of a policy to itself is just under 1e-6 nats instead of 0.
        """
        answers = {
            f"logps_{r}": answer.float().log_softmax(-1).half() for r, answer in enumerate(_answers(model, rows))
        }
        with whole(self._path(index)) as partial:
            save_file({name: x.cpu().contiguous() for name, x in {**answers, "tokens": _tokens(rows)}.items()}, partial)

    def has(self, index: int) -> bool:
        """Whether pair `index` has a starting policy, so that `kl` can be asked."""
        return (self._folder / _ADAPTERS).exists() or self._path(index).exists()

    def kl(self, model: nn.Module, index: int, rows: Rows, policy: list[Tensor]) -> Tensor:
        """(tokens,) KL of `policy`, the logits (tokens, vocab) of both answers, to the starting policy, in nats.

        Raises:
            ValueError: the file of this index is that of another pair.
        """
        if (self._folder / _ADAPTERS).exists():
            with adapters_off(model):
                start = _answers(model, rows)
        else:
            saved = load_file(self._path(index))
            if not torch.equal(saved["tokens"], _tokens(rows).cpu()):
                raise ValueError(
                    f"pair {index} of the held-out sample is not the one that {self._path(index)} was made of: resume "
                    "with the same pairs, seed and tokenizer as at the start, or begin in another output_dir"
                )
            start = [saved["logps_0"], saved["logps_1"]]
        return torch.cat([token_kl(p, q) for p, q in zip(policy, start, strict=True)])

    def _path(self, index: int) -> Path:
        return self._folder / f"pair-{index:05d}.safetensors"


def answer_logits(model: nn.Module, rows: Rows) -> tuple[list[Tensor], Tensor, Tensor]:
    """The logits (tokens, vocab) of each answer of a pair; then the logits and labels of its whole rows."""
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
    """Whether nothing but adapters of PEFT is trained, and `model` gives the same logits without them."""
    if not hasattr(model, "disable_adapter"):
        return False
    policy = _answers(model, rows)
    with adapters_off(model):
        if any(p.requires_grad for p in model.parameters()):
            return False
        start = _answers(model, rows)
    return float(torch.cat([token_kl(p, q) for p, q in zip(policy, start, strict=True)]).mean()) < _NO_DRIFT
