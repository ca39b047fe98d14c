"""TRL's losses against TRL's own code, run on the same log-probabilities: value and gradient.

`DPOTrainer._compute_loss` is called on a trainer made without its `__init__`, and on a model that returns given
log-probabilities of tokens.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from frameworks import Library, require

from gapo import sequence_logps
from gapo.columns import PARTS
from gapo.objectives import OBJECTIVES, LogProbs
from gapo.pairs import pair_logps
from gapo.token_weights import ld_weights, wpo_weights

torch = require("torch")
pytest.importorskip("trl")

PAIRS, SEQ = 5, 9
# TRL's name and settings -> our name and settings
CASES = [
    ("sigmoid", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    ("ipo", {"beta": 0.3}, "ipo", {"tau": 0.3}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.2}, "rdpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.02}, "exo_pair", {"beta": 0.3, "epsilon": 0.02}),
    ("discopop", {"beta": 0.3, "discopop_tau": 0.4}, "discopop", {"beta": 0.3, "tau": 0.4}),
    *(
        (name, {"beta": 0.3}, name, {"beta": 0.3})
        for name in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")
    ),
    *(
        (name, {"beta": 0.3, "label_smoothing": e}, name, {"beta": 0.3, "label_smoothing": e})
        for name in ("aot", "aot_unpaired")
        for e in (0.0, 0.2)
    ),
]


def batch() -> dict[str, Any]:
    """Rows (2 PAIRS, SEQ) of which a first part is prompt and a last part padding, and the reference's sums."""
    rng = np.random.default_rng(5)
    starts, lengths = rng.integers(1, 3, 2 * PAIRS), rng.integers(2, SEQ - 3, 2 * PAIRS)
    mask = np.array([[int(s <= t < s + n) for t in range(SEQ)] for s, n in zip(starts, lengths, strict=True)])
    references = torch.tensor(-2.0 * lengths + rng.normal(size=2 * PAIRS))
    return {
        "input_ids": torch.ones(2 * PAIRS, SEQ, dtype=torch.long),
        "attention_mask": torch.ones(2 * PAIRS, SEQ, dtype=torch.long),
        "completion_mask": torch.tensor(mask),
        "ref_chosen_logps": references[:PAIRS],
        "ref_rejected_logps": references[PAIRS:],
    }


def token_logps(mask: Any) -> Any:
    rng = np.random.default_rng(6)
    return torch.tensor(rng.uniform(-4, -0.1, (2 * PAIRS, SEQ - 1))) * mask[:, 1:]


def trl_trainer(loss_type: str, settings: dict[str, Any], **others: Any) -> Any:
    """A `DPOTrainer` with what its loss reads."""
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    about = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "args": SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        "beta": settings["beta"],
        "label_smoothing": settings.get("label_smoothing", 0.0),
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**about, **others}.items():
        setattr(trainer, name, value)
    return trainer


def trl_loss(trainer: Any, inputs: dict[str, Any], log_probs: Any, **outputs: Any) -> Any:
    zeros = torch.zeros(log_probs.shape)
    known = {"log_probs": log_probs, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), **outputs}
    return trainer._compute_loss(lambda **inputs: SimpleNamespace(**known), inputs, False)


def log_probs_of(inputs: dict[str, Any], logps: Any) -> LogProbs:
    lengths = inputs["completion_mask"].sum(1)
    sums = logps.sum(1)
    return LogProbs(
        chosen=sums[:PAIRS],
        rejected=sums[PAIRS:],
        chosen_lengths=lengths[:PAIRS],
        rejected_lengths=lengths[PAIRS:],
        ref_chosen=inputs["ref_chosen_logps"],
        ref_rejected=inputs["ref_rejected_logps"],
    )


@pytest.mark.parametrize(("trl_name", "trl_settings", "name", "settings"), CASES)
def test_value_and_gradient_are_those_of_trl(trl_name: str, trl_settings: Any, name: str, settings: Any) -> None:
    inputs = batch()
    theirs = token_logps(inputs["completion_mask"]).requires_grad_()
    expected = trl_loss(trl_trainer(trl_name, trl_settings), inputs, theirs)
    expected.backward()
    ours = theirs.detach().clone().requires_grad_()
    loss = OBJECTIVES[name].losses(log_probs_of(inputs, ours), **settings).mean()
    loss.backward()
    # TRL's EXO takes log(epsilon) in float32
    rtol = 1e-6 if name == "exo_pair" else 1e-12
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=1e-7 if name == "exo_pair" else 1e-12)
    assert theirs.grad.abs().max() > 1e-3


def test_each_loss_of_trl_is_here() -> None:
    """The names in TRL's own message about an unknown one."""
    inputs = batch()
    with pytest.raises(ValueError, match="Unknown loss type: none") as error:
        trl_loss(trl_trainer("none", {"beta": 0.1}), inputs, token_logps(inputs["completion_mask"]))
    names = {part for part in str(error.value).partition("[")[2].split("'") if part.replace("_", "").isalpha()}
    assert names == {case[0] for case in CASES} | {"sft"}


def logits_and_labels(inputs: dict[str, Any]) -> tuple[Any, Any]:
    logits = torch.tensor(np.random.default_rng(7).normal(size=(2 * PAIRS, SEQ, 6)))
    labels = torch.tensor(np.random.default_rng(8).integers(0, 6, (2 * PAIRS, SEQ)))
    return logits, labels.masked_fill(inputs["completion_mask"] == 0, -100)


def in_each(library: Library, logits: Any, labels: Any) -> tuple[Any, Any]:
    return library.asarray(logits.numpy(), "float64"), library.asarray(labels.numpy())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_ld_alpha_is_trls(library: Library, loss_type: str, alpha: float) -> None:
    """TRL divides by the whole length where a loss is per token. The reference's sums are given."""
    inputs = batch()
    logits, labels = logits_and_labels(inputs)
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    picked = picked * inputs["completion_mask"][:, 1:]
    expected = trl_loss(trl_trainer(loss_type, {"beta": 0.3}, ld_alpha=alpha), inputs, picked)
    ours, theirs = in_each(library, logits, labels)
    logps = sequence_logps(ours, theirs, token_weights=ld_weights(theirs, alpha))
    lengths = library.asarray(inputs["completion_mask"].sum(1).numpy())
    reference = [library.asarray(inputs[f"ref_{side}_logps"].numpy()) for side in ("chosen", "rejected")]
    of_pairs = LogProbs.from_averages(logps[:PAIRS], logps[PAIRS:], lengths, *reference)
    losses = OBJECTIVES["dpo" if loss_type == "sigmoid" else loss_type].losses(of_pairs, beta=0.3)
    np.testing.assert_allclose(library.numpy(losses).mean(), expected.item(), rtol=2e-6)
    plain = sequence_logps(ours, theirs)
    assert np.allclose(library.numpy(plain), library.numpy(logps), rtol=1e-5) == (alpha == 1)


def test_wpo_weights_are_trls(library: Library) -> None:
    inputs = batch()
    logits, labels = logits_and_labels(inputs)
    logs = logits.log_softmax(-1)[:, :-1]
    picked = logs.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0] * inputs["completion_mask"][:, 1:]
    outputs = {"log_sum_sq_probs": logs.exp().square().sum(-1).log()}
    trainer = trl_trainer("sigmoid", {"beta": 0.3}, use_weighting=True)
    expected = trl_loss(trainer, inputs, picked, **outputs)
    losses = OBJECTIVES["dpo"].losses(log_probs_of(inputs, picked), beta=0.3).numpy()
    ours, theirs = in_each(library, logits, labels)
    weights = library.numpy(wpo_weights(ours, theirs, cap=None))
    np.testing.assert_allclose((weights * losses).mean(), expected.item(), rtol=2e-6)
    capped = library.numpy(wpo_weights(ours, theirs, cap=float(np.median(weights))))
    np.testing.assert_allclose(capped, np.minimum(weights, np.median(weights)), rtol=1e-6)


def test_weights_by_token_and_by_pair_are_checked() -> None:
    labels, logits = np.array([[-100, 1, 2], [-100, 1, -100], [-100, 1, 2]]), np.zeros((2, 3, 4))
    with pytest.raises(ValueError, match=r"alpha must be a finite number in \[0, 1\], got 1.5"):
        ld_weights(labels[:2], 1.5)
    with pytest.raises(ValueError, match=r"labels must be \(2N, seq\), chosen rows first; got \(3, 3\)"):
        ld_weights(labels, 0.5)
    with pytest.raises(ValueError, match=r"labels must be \(2N, seq\), chosen rows first; got \(3, 3\)"):
        wpo_weights(np.zeros((3, 3, 4)), labels)
    with pytest.raises(ValueError, match="cap must be a finite number > 0, got 0"):
        wpo_weights(logits, labels[:2], cap=0)
    with pytest.raises(ValueError, match=r"token_weights must be \(batch, seq\) as labels, \(2, 3\); got \(2, 2\)"):
        sequence_logps(logits, labels[:2], token_weights=np.ones((2, 2)))


def test_pair_logps_takes_ld_alpha() -> None:
    columns = {f"{side}_{part}": np.array([[1, 2, 3]]) for side in ("chosen", "rejected") for part in PARTS}
    columns["chosen_labels"], columns["rejected_labels"] = np.array([[-100, 2, 3]]), np.array([[-100, 2, -100]])
    chosen, rejected = pair_logps(lambda ids, mask: np.zeros((2, 3, 4)), columns, ld_alpha=0.5)
    np.testing.assert_allclose([chosen[0], rejected[0]], [-0.75 * np.log(4), -np.log(4)])


def test_no_gradient_flows_through_wpos_weights(autodiff: Library) -> None:
    logits, labels = in_each(autodiff, *logits_and_labels(batch()))
    (gradient,) = autodiff.grad(lambda x: wpo_weights(x, labels).sum() + 0 * x.sum(), logits)
    assert not gradient.any()


def test_discopop_is_finite_where_trl_is_not() -> None:
    """Far wrong pairs: TRL's product is 0 * infinity in float32."""
    far = torch.full((1,), -2e3, requires_grad=True)
    zero = torch.zeros(1)
    loss = OBJECTIVES["discopop"].losses(
        LogProbs(
            chosen=far,
            rejected=zero,
            chosen_lengths=zero + 1,
            rejected_lengths=zero + 1,
            ref_chosen=zero,
            ref_rejected=zero,
        )
    )
    loss.sum().backward()
    np.testing.assert_allclose([loss.item(), far.grad.item()], [200.0, -0.1], rtol=1e-6)
