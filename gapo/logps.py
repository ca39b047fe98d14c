"""Token logits to the length-normalised log-probability of a response (method document, symbols)."""

from __future__ import annotations

from collections.abc import Callable

from gapo._namespace import (
    Array,
    ArrayT,
    Library,
    Namespace,
    at_least_float32,
    is_concrete,
    library,
    namespace,
    require_floating,
    stop_gradient,
)

# A framework's own kernel for log-softmax at the targets, put here by its backend: less memory, the same numbers.
KERNELS: dict[str, Callable[[Array, Array], Array]] = {}


def sequence_logps(
    logits: ArrayT,
    labels: ArrayT,
    *,
    ignore_index: int = -100,
    average: bool = True,
    token_weights: ArrayT | None = None,
    backend: Library | None = None,
) -> ArrayT:
    """Log-probability of each labelled response: the mean (or sum) over its tokens of log p(token | what precedes it).

    Position t of `logits` predicts token t + 1: the shift by one is done here. Labels equal to `ignore_index` (prompt,
    padding) do not count, nor does the label at position 0, which nothing predicts.

    Args:
        logits: (batch, seq, vocab) unnormalised scores. float16 and bfloat16 are reduced in float32.
        labels: (batch, seq) integer token ids, or `ignore_index`.
        ignore_index: the label that does not count.
        average: True for the mean over counted tokens (nats per token), False for their sum (nats).
        token_weights: (batch, seq) factor of each label's log-probability in the sum; None for 1. The mean divides by
            the number of counted tokens all the same.
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        (batch,) float32 or wider, differentiable in `logits`.

    Raises:
        TypeError: not arrays of one library, `logits` not floating, `labels` not integer.
        ValueError: shapes do not fit; or a response has no counted token, or a label lies outside the vocabulary, named
            by row. Where values cannot be read (under `jax.jit`, `mx.compile`, `torch.compile`) an empty row is NaN.

    Source: method document, symbols; SimPO (arXiv 2405.14734) for the length normalisation.

    >>> import numpy as np
    >>> logits = np.zeros((1, 3, 4))
    >>> round(float(sequence_logps(logits, np.array([[-100, 1, 2]]))[0]), 4)
    -1.3863
    """
    others = {} if token_weights is None else {"token_weights": token_weights}
    xp = namespace(backend, logits=logits, labels=labels, **others)
    require_floating(logits, "logits", xp)
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"labels must be integers, got dtype {labels.dtype}")
    if len(logits.shape) != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(
            "logits must be (batch, seq, vocab) and labels (batch, seq); "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    targets = labels[:, 1:]
    counted = targets != ignore_index
    if is_concrete(counted):  # under jit even what is made of constants is traced
        _check_labels(targets, counted, int(logits.shape[2]), ignore_index, xp)
    token_logps = _token_logps(logits[:, :-1, :], xp.where(counted, targets, 0 * targets), xp)
    if token_weights is not None:
        if tuple(token_weights.shape) != tuple(labels.shape):
            raise ValueError(
                f"token_weights must be (batch, seq) as labels, {tuple(labels.shape)}; got {tuple(token_weights.shape)}"
            )
        token_logps = token_logps * xp.astype(token_weights, token_logps.dtype)[:, 1:]
    total = xp.sum(xp.where(counted, token_logps, xp.zeros_like(token_logps)), axis=-1)
    tokens = xp.sum(xp.astype(counted, total.dtype), axis=-1)
    # 0 / 0 under tracing: an empty response is NaN whether averaged or not, never a silent 0
    return total / tokens if average else total * (tokens / tokens)


def response_lengths(labels: Array, *, ignore_index: int = -100) -> Array:
    """Number of counted tokens of each response, (batch,) integers: those that `sequence_logps` averages over.

    Args:
        labels: (batch, seq) integer token ids, or `ignore_index`.
        ignore_index: the label that does not count.
    """
    xp = namespace(labels=labels)
    return xp.sum(xp.astype(labels[:, 1:] != ignore_index, labels.dtype), axis=-1)


def _token_logps(logits: Array, targets: Array, xp: Namespace) -> Array:
    """(batch, seq): log-softmax of `logits` (batch, seq, vocab) at `targets` (batch, seq), float32 or wider."""
    kernel = KERNELS.get(library(logits) or "")
    if kernel is not None and is_concrete(logits):
        return kernel(logits, targets)
    logits = at_least_float32(logits, xp)
    picked = xp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    if hasattr(xp, "logsumexp"):  # PyTorch and MLX have a fused one, which keeps no copy of the logits
        return picked - xp.logsumexp(logits, -1)
    peak = stop_gradient(xp.max(logits, axis=-1, keepdims=True))
    return picked - (peak[:, :, 0] + xp.log(xp.sum(xp.exp(logits - peak), axis=-1)))


def _check_labels(targets: Array, counted: Array, vocab: int, ignore_index: int, xp: Namespace) -> None:
    """Raise ValueError naming the first row that has no counted token, or a label outside the vocabulary."""
    empty = ~xp.any(counted, axis=-1)
    outside = xp.any(counted & ((targets < 0) | (targets >= vocab)), axis=-1)
    if not bool(xp.any(empty | outside)):  # one look at the device, where each waits for the work before it
        return
    if bool(xp.any(empty)):
        raise ValueError(
            f"row {_first(empty)} of labels has no token that counts: every label after position 0 is {ignore_index} "
            "(an empty response, or one cut off by truncation)"
        )
    raise ValueError(
        f"row {_first(outside)} of labels holds a token id outside 0..{vocab - 1}: the labels' tokenizer and the "
        "model's vocabulary differ"
    )


def _first(flags: Array) -> int:
    return next(i for i in range(flags.shape[0]) if bool(flags[i]))
