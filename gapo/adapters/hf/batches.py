"""From a batch of pairs, ours or TRL's, to the rows of one forward: chosen ones, then rejected ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapo.data.tokenize import IGNORE_INDEX
from gapo.pairs import COLUMNS, PARTS, SIDES, halves

# Columns of a batch that TRL's DPO collator has stacked; those of `PreferenceCollator` are `COLUMNS`.
TRL_KEYS = ("input_ids", "attention_mask", "completion_mask")

# The forward's arguments that this adapter sets: a batch's entry of such a name is not passed on.
_SET_HERE = ("input_ids", "attention_mask", "labels", "use_cache", "logits_to_keep")
# Images and sound: a batch that holds them means them for the model, whatever the model calls its inputs.
_MEDIA = ("pixel_values", "pixel_values_videos", "images", "videos", "input_features", "input_values", "audio_values")


def stack_pairs(batch: Mapping[str, Any], accepted: Collection[str] = ()) -> dict[str, Tensor]:
    """The chosen rows, then the rejected ones: "input_ids", "attention_mask", "labels", each (2N, seq).

    Takes the batch of `PreferenceCollator`, or that of TRL's DPO collator ("completion_mask", already stacked). Of the
    batch's other entries, those named in `accepted` (the parameters of the model's forward) come along: TRL's as they
    are; "chosen_NAME" and "rejected_NAME" one after the other; a plain NAME twice, since both answers share it.

    Raises:
        KeyError: the batch is neither; names what it holds.
        ValueError: chosen and rejected are of unequal number or length, the rows are no pairs, or the model takes no
            such input as the batch's images.
    """
    if all(key in batch for key in COLUMNS):
        rows, further = _from_sides(batch), _further_of_sides
    elif all(key in batch for key in TRL_KEYS):
        _require_pairs(batch)
        labels = batch["input_ids"].masked_fill(~batch["completion_mask"].bool(), IGNORE_INDEX)
        rows = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        further = _further_of_rows
    else:
        raise KeyError(
            f"a batch of pairs needs the keys {', '.join(COLUMNS)} (from gapo.adapters.hf.PreferenceCollator) or "
            f"{', '.join(TRL_KEYS)} (from TRL's collator); got {', '.join(batch)}"
        )
    rows["labels"] = rows["labels"].masked_fill(rows["attention_mask"] == 0, IGNORE_INDEX)  # padding never counts
    if accepted:
        rows |= further(batch, [name for name in accepted if name not in _SET_HERE])
        _require_taken(batch, rows)
    return rows


def to_the_right(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows with all their padding on the right; entries of one number for each token move along."""
    mask = rows["attention_mask"]
    order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return {name: x.gather(-1, order.expand(x.shape)) if _is_of_tokens(x, mask) else x for name, x in rows.items()}


def further_inputs(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows' inputs of the model's forward besides tokens and labels, such as images."""
    return {name: x for name, x in rows.items() if name not in _SET_HERE}


def _from_sides(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    for part in PARTS:
        shapes = [tuple(batch[f"{side}_{part}"].shape) for side in SIDES]
        if shapes[0][0] != shapes[1][0]:
            raise ValueError(f"chosen and rejected must hold the same number of rows; {part} are {shapes}")
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {part: _stacked(batch, part, value) for part, value in fill.items()}


def _further_of_sides(batch: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    further = {}
    for name in names:
        if all(f"{side}_{name}" in batch for side in SIDES):
            further[name] = _stacked(batch, name, 0)
        elif name in batch:
            further[name] = torch.cat([_tensor(batch, name)] * 2)
    return further


def _further_of_rows(batch: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    return {name: _tensor(batch, name) for name in names if name in batch}


def _stacked(batch: Mapping[str, Any], part: str, fill: int) -> Tensor:
    """Both sides' `part`, (2N, ...). Rows with a number for each token are padded to the longer side's length."""
    sides = [_tensor(batch, f"{side}_{part}") for side in SIDES]
    ids = [batch[f"{side}_input_ids"] for side in SIDES]
    if all(x.shape == tokens.shape for x, tokens in zip(sides, ids, strict=True)):
        seq = max(x.shape[1] for x in ids)
        sides = [nn.functional.pad(x, (0, seq - x.shape[1]), value=fill) for x in sides]
    return torch.cat(sides)


def _tensor(batch: Mapping[str, Any], name: str) -> Tensor:
    x = batch[name]
    if not isinstance(x, Tensor):
        raise ValueError(
            f"the batch's {name!r}, which the model's forward takes, must be a tensor, got {type(x).__name__}"
        )
    return x


def _require_pairs(batch: Mapping[str, Any]) -> None:
    """Raise ValueError where columns, number of rows or prompts show that a stacked batch holds no pairs."""
    unpaired = [name for name in batch if name in ("label", "ref_logps") or name.startswith(("KL_", "reference_"))]
    if unpaired:
        raise ValueError(
            f"the batch holds {', '.join(unpaired)}: its rows are no pairs of chosen and rejected answers (TRL's KTO "
            "has such). GAPO trains on the batches of PreferenceCollator, or of TRL's DPO collator"
        )
    if len(batch["input_ids"]) % 2:
        raise ValueError(
            f"a batch of TRL's DPO collator holds as many chosen rows as rejected ones; got {len(batch['input_ids'])} "
            "rows: triplets, unpaired rows, or pairs packed into one row (set padding_free=False) are not accepted"
        )
    if row := _without_its_prompt(*(batch[key].bool() if key != "input_ids" else batch[key] for key in TRL_KEYS)):
        pairs = len(batch["input_ids"]) // 2
        raise ValueError(
            f"rows {row - 1} and {row - 1 + pairs} of a batch of {pairs} pairs have other prompts: chosen rows stand "
            "first, then the rejected ones in the same order; triplets, unpaired rows and rows that alternate are none"
        )


def _without_its_prompt(ids: Tensor, mask: Tensor, completion: Tensor) -> int:
    """The number, from 1, of the last chosen row whose prompt is not that of its rejected row; 0 where there is none.

    Prompts are compared from their ends, over the tokens that truncation has left in both.
    """
    before = mask & (completion.cumsum(1) == 0) & completion.any(1, keepdim=True)
    lengths = before.sum(1)
    back = torch.arange(ids.shape[1], device=ids.device)
    from_the_end = ids.gather(1, (completion.int().argmax(1, keepdim=True) - 1 - back).clamp(min=0))
    sides, shorter = halves(from_the_end), torch.minimum(*halves(lengths))
    differ = ((sides[0] != sides[1]) & (back < shorter[:, None])).any(1)
    return int((differ * torch.arange(1, len(differ) + 1, device=ids.device)).max()) if len(differ) else 0


def _require_taken(batch: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
    """Raise ValueError for images or sound that the model's forward does not name, and would not see."""
    for key in batch:
        name = key.removeprefix("chosen_").removeprefix("rejected_")
        if name in _MEDIA and name not in rows:
            raise ValueError(
                f"the batch holds {key!r}, but the model's forward takes no {name!r} (for both sides): use a model "
                "that does, or leave it out of the batch"
            )


def _is_of_tokens(x: Tensor, mask: Tensor) -> bool:
    """Whether `x` is (rows, seq), or (3, rows, seq) like the positions of models that count in three directions."""
    return x.shape == mask.shape or (x.ndim == 3 and x.shape[1:] == mask.shape and not x.is_floating_point())
