"""Batches of pairs that other libraries' trainers stack with labels: LLaMA-Factory's and ms-swift's."""

from typing import Any

import hf_models
import pytest
import torch
from frameworks import require_trls_trainers
from transformers import Trainer

from gapo.adapters.hf.batches import stack_pairs
from gapo.adapters.hf.supported import as_trls

trl = require_trls_trainers()
IDS = torch.tensor([[5, 6, 7, 8], [5, 9, 2, 0], [5, 6, 3, 0], [5, 9, 4, 1]])  # two chosen, then their rejected ones
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
LABELS = torch.tensor([[-100, -100, 7, 8], [-100, -100, 2, -100], [-100, -100, 3, -100], [-100, -100, 4, 1]])
STACKED = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def trainer(kind: type, module: str) -> Any:
    """An instance of a trainer of `module`, which nobody has initialised."""
    cls = type("CustomTrainer", (kind,), {"__module__": module})
    return cls.__new__(cls)


@pytest.mark.parametrize("module", ["llamafactory.train.dpo.trainer", "swift.rlhf_trainers.dpo_trainer"])
def test_rows_and_labels_are_those_of_the_batch(module: str) -> None:
    rows = stack_pairs(as_trls(STACKED, trainer(trl.DPOTrainer, module)))
    assert all(torch.equal(rows[name], STACKED[name]) for name in STACKED)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (Trainer, "llamafactory.train.sft.trainer"),  # supervised tuning: its rows are no pairs
        (trl.KTOTrainer, "llamafactory.train.kto.trainer"),
        (trl.DPOTrainer, "somewhere.trainer"),
        (trl.DPOTrainer, "llamafactory_like"),
    ],
)
def test_rows_with_labels_of_other_trainers_are_no_pairs(kind: type, module: str) -> None:
    with pytest.raises(KeyError, match="a batch of pairs needs the keys"):
        stack_pairs(as_trls(STACKED, trainer(kind, module)))


def test_batches_of_pairs_stay_as_they_are() -> None:
    batch = hf_models.batch()
    assert as_trls(batch, trainer(trl.DPOTrainer, "llamafactory.train.dpo.trainer")) is batch
