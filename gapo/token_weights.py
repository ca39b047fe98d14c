"""Weights by token and by pair that need more than a response's log-probability: LD-DPO's and WPO's."""

from __future__ import annotations

from gapo._namespace import Array, Library, namespace, stop_gradient
from gapo.logps import sequence_logps
from gapo.objective import require_number


def ld_weights(labels: Array, alpha: float, *, ignore_index: int = -100) -> Array:
    """LD-DPO's `token_weights` (2N, seq) of `gapo.sequence_logps`: the tail of a pair's longer response counts less.

    The first tokens of a response weigh 1, as many as the shorter one of its pair has. The others weigh `alpha`.
    Measure the reference with the same weights, or its log-probabilities are of another sum.

    Args:
        labels: (2N, seq) integer token ids, or `ignore_index`; the rows of the chosen responses first.
        alpha: in [0, 1]; 1 changes nothing, 0 leaves the tail out.
        ignore_index: the label that does not count.

    Raises:
        ValueError: `alpha` is out of its range, or `labels` have another shape.

    Source: Liu et al., arXiv 2409.06411; TRL calls alpha `ld_alpha`.

    >>> import numpy as np
    >>> labels = np.array([[-100, 5, 6, 7], [-100, 8, 9, -100]])
    >>> ld_weights(labels, 0.5)[0].tolist()
    [1.0, 1.0, 1.0, 0.5]
    """
    require_number("alpha", alpha, "in [0, 1]", lambda v: 0 <= v <= 1)
    if len(labels.shape) != 2 or labels.shape[0] % 2:
        raise ValueError(f"labels must be (2N, seq), chosen rows first; got {tuple(labels.shape)}")
    xp = namespace(labels=labels)
    concat, running_sum = getattr(xp, "concat", None) or xp.concatenate, getattr(xp, "cumulative_sum", None)
    counted = xp.astype(labels[:, 1:] != ignore_index, labels.dtype)  # nothing predicts the label at position 0
    lengths, pairs = xp.sum(counted, axis=-1), labels.shape[0] // 2
    shared = xp.where(lengths[:pairs] < lengths[pairs:], lengths[:pairs], lengths[pairs:])
    order = (running_sum or xp.cumsum)(counted, axis=-1)
    in_tail = order > concat([shared, shared])[:, None]
    ones = xp.astype(xp.ones_like(labels), xp.float32)
    return concat([ones[:, :1], xp.where(in_tail, alpha * ones[:, 1:], ones[:, 1:])], axis=-1)


def wpo_weights(
    logits: Array, labels: Array, *, cap: float | None = 1.0, ignore_index: int = -100, backend: Library | None = None
) -> Array:
    """WPO's weight of each pair (N,), without gradient: how likely the policy is to have written its two responses.

    `exp(a(chosen) + a(rejected))`, at most `cap`, where a(y) is the mean over the response's tokens of
    `log p(token) - log sum_v p(v)^2`: a token counts as likely beside what the policy itself would draw.

    Args:
        logits: (2N, seq, vocab) of the policy, the rows of the chosen responses first. A scaled copy is held.
        labels: (2N, seq) integer token ids, or `ignore_index`.
        cap: the largest weight, > 0; None for none, as in TRL's `use_weighting`.
        ignore_index: the label that does not count.
        backend: as in `gapo.sequence_logps`.

    Raises:
        TypeError, ValueError: as `gapo.sequence_logps`; the number of rows is odd, or `cap` is out of its range.

    Source: Zhou et al., arXiv 2406.11827, equation 2, and its authors' cap of 1.

    >>> import numpy as np
    >>> labels = np.array([[-100, 1], [-100, 2]])
    >>> wpo_weights(np.zeros((2, 2, 4)), labels).tolist()  # all tokens are equally likely
    [1.0]
    """
    if cap is not None:
        require_number("cap", cap, "> 0", lambda v: v > 0)
    if labels.shape[0] % 2:
        raise ValueError(f"labels must be (2N, seq), chosen rows first; got {tuple(labels.shape)}")
    fixed = stop_gradient(logits)
    squared, plain = (sequence_logps(x, labels, ignore_index=ignore_index, backend=backend) for x in (2 * fixed, fixed))
    # log softmax(2 x) - log softmax(x) = x + log sum exp(x) - log sum exp(2 x) = log p - log sum p^2
    aligned = squared - plain
    pairs, xp = labels.shape[0] // 2, namespace(aligned=aligned)
    weights = xp.exp(aligned[:pairs] + aligned[pairs:])
    return weights if cap is None else xp.where(weights < cap, weights, cap * xp.ones_like(weights))
