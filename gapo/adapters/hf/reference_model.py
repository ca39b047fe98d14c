"""Reference log-probabilities of pairs under a PyTorch model, as columns of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gapo import data
from gapo.adapters.hf.margins import log_probs, stack_pairs
from gapo.adapters.hf.models import require_causal, require_decoder
from gapo.logp_options import LogpOptions


def with_reference_logps(
    model: nn.Module,
    tokenized: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    ld_alpha: float | None = None,
    progress: str | None = "reference log-probabilities",
) -> Sequence[dict[str, Any]]:
    """The rows with "ref_chosen_logps" and "ref_rejected_logps": summed log-probabilities under `model`, nats.

    Call it on the model that training starts from, before it starts. Dropout is off during the call.

    Args:
        model: a causal language model, the reference.
        tokenized: rows of `gapo.data.tokenize_pair`.
        batch_size: pairs in a batch; no gradient is kept.
        ld_alpha: LD-DPO's alpha, that of the training; None for 1. The rows then also have the column "ref_ld_alpha".
        progress: text of the progress bar; None for no bar.

    Returns:
        New rows, in the order of `tokenized`, for `PreferenceCollator`.

    Raises:
        ValueError: a row is not tokenised, the model is not causal, or `ld_alpha` is not in [0, 1].
        FloatingPointError: a log-probability is not finite, naming the row.
    """
    require_decoder(model)
    is_causal, options = False, LogpOptions(ld_alpha)

    def measure(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal is_causal
        logps = summed_logps(model, batch, options)
        if not is_causal:
            require_causal(model, stack_pairs(_tensors(model, batch)))
            is_causal = True
        return logps

    return data.with_reference_logps(
        tokenized,
        measure,
        pad_token_id=0,  # padding never counts
        batch_size=batch_size,
        ld_alpha=ld_alpha,
        progress=progress,
    )


def summed_logps(
    model: nn.Module, batch: Mapping[str, np.ndarray], options: LogpOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probabilities (chosen, rejected), each (N,), of a batch of NumPy arrays; no gradient, no dropout."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logps = log_probs(model, _tensors(model, batch), options)
    finally:
        model.train(training)
    return _array(logps.chosen), _array(logps.rejected)


def _tensors(model: nn.Module, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: torch.from_numpy(x).to(device) for name, x in batch.items()}


def _array(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()
