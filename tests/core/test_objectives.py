"""Every objective against arithmetic on probabilities in Python floats, on every array library."""

from __future__ import annotations

import inspect
import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
from frameworks import LIBRARIES, Library, require

import gapo
from gapo import objectives
from gapo.anchor import probe_pull
from gapo.backends import get_backend
from gapo.objectives import OBJECTIVES, LogProbs, Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*float64.*:UserWarning")

FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "anchor_chosen", "anchor_rejected")
# Rows of (chosen, rejected, ref_chosen, ref_rejected, anchor_chosen, anchor_rejected, chosen and rejected length):
# one pair the reference favours, one it does not, one that the policy has wrong, one of a small margin.
ROWS = [
    (-6.0, -9.0, -7.0, -8.0, -6.5, -8.5, 3, 4),
    (-5.0, -7.5, -8.0, -6.0, -5.5, -7.0, 2, 5),
    (-12.0, -4.0, -9.0, -9.5, -11.0, -4.5, 6, 2),
    (-3.0, -3.2, -3.1, -3.3, -3.4, -3.1, 1, 1),
]
BY_NAME = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
WITH_REFERENCE = [objective for objective in OBJECTIVES.values() if objective.needs_reference]


def log_probs(library: Library, rows: Any, dtype: str | None = "float64") -> LogProbs:
    columns = [np.array(column, dtype=float) for column in zip(*rows, strict=True)]
    arrays = {name: library.asarray(column, dtype) for name, column in zip(FIELDS, columns, strict=False)}
    lengths = [library.asarray(column.astype(np.int32)) for column in columns[len(FIELDS) :]]
    return LogProbs(**arrays, chosen_lengths=lengths[0], rejected_lengths=lengths[1])


def odds(row: Any) -> float:
    """exp(z): how many times more the policy than the reference prefers the chosen response."""
    policy, reference = math.exp(row[0]) / math.exp(row[1]), math.exp(row[2]) / math.exp(row[3])
    return policy / reference


def agreement(row: Any, beta: float) -> float:
    """Probability that the chosen response wins, in Bradley and Terry's model of DPO's rewards."""
    return odds(row) ** beta / (1 + odds(row) ** beta)


def token_margin(row: Any, first: int = 0) -> float:
    return row[first] / row[6] - row[first + 1] / row[7]


def smoothed(row: Any, s: Any) -> float:
    """Cross-entropy of the label's distribution (1 - e, e) and the model's."""
    p, e = agreement(row, s["beta"]), s["label_smoothing"]
    return -sum(weight * math.log(q) for weight, q in ((1 - e, p), (e, 1 - p)))


def unbiased(row: Any, s: Any) -> float:
    """x of the linear system (1 - e) x + e y = l(+), e x + (1 - e) y = l(-)."""
    p, e = agreement(row, s["beta"]), s["label_smoothing"]
    return float(np.linalg.solve([[1 - e, e], [e, 1 - e]], [-math.log(p), -math.log(1 - p)])[0])


def adaptive(rows: Any, s: Any, frozen: Any) -> list[float]:
    m = [token_margin(row) for row in frozen]
    mean, spread = statistics.mean(m), statistics.stdev(m) if len(m) > 1 else 0.0
    losses = []
    for row, value in zip(rows, m, strict=True):
        target = s["beta"] * math.e ** (((mean - value) / spread) * mean) if value < mean and spread else 0.0
        losses.append(math.log(1 + math.exp(target) / math.exp(token_margin(row)) ** s["beta"]))
    return losses


def rewards(row: Any, s: Any) -> float:
    chosen, rejected = (s["beta"] * math.log(math.exp(row[i]) / math.exp(row[i + 2])) for i in (0, 1))
    return min(s["clip"], max(-s["clip"], chosen)) - min(s["clip"], max(-s["clip"], rejected))


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def gap(row: Any) -> float:
    return token_margin(row) - token_margin(row, 4)


def own_targets(rows: Any, s: Any, scores: list[float]) -> list[float]:
    """SimPO's losses whose targets fall with the scores' distance from their mean, in sample deviations."""
    mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else math.inf
    targets = [s["gamma"] - s["gamma"] * s["strength"] * (x - mean) / spread for x in scores]
    return [softplus(t - s["beta"] * token_margin(row)) for t, row in zip(targets, rows, strict=True)]


def ramp(d: float) -> float:
    return 0.0 if d > 1 else 1.0 if d < -1 else (1 - d) / 2


def ratio(row: Any, side: int, beta: float = 1.0) -> float:
    """A response's probability under the policy over that under the reference, to the power beta."""
    return (math.exp(row[side]) / math.exp(row[side + 2])) ** beta


def targets(row: Any, s: Any) -> float:
    """Squared distances of both log-ratios from 1 / (2 beta) above and below 0."""
    aim = 1 / (2 * s["beta"])
    return sum((math.log(ratio(row, side)) - sign * aim) ** 2 for side, sign in ((0, 1), (1, -1)))


def smoothed_odds(odds: float, s: Any) -> float:
    p, e = odds ** s["beta"] / (1 + odds ** s["beta"]), s["label_smoothing"]
    return -(1 - e) * math.log(p) - e * math.log(1 - p)


def of_sorted(first: Any, second: Any) -> Any:
    """AOT: the k-th smallest of `first` meets that of `second`, and the loss stays with the pair of `first`."""

    def losses(rows: Any, s: Any, frozen: Any) -> list[float]:
        mine, others = [first(row) for row in rows], sorted(second(row) for row in rows)
        return [smoothed_odds(x / others[sorted(mine).index(x)], s) for x in mine]

    return losses


def discovered(row: Any, s: Any) -> float:
    p = agreement(row, s["beta"])
    x = math.log(p / (1 - p))
    share = 1 / (1 + math.exp(-x / s["tau"]))
    return share * math.exp(-x) - (1 - share) * math.log(p)


def reverse_divergence(row: Any, s: Any) -> float:
    p, e = agreement(row, s["beta"]), s["epsilon"]
    return sum(q * math.log(q / label) for q, label in ((p, 1 - e), (1 - p, e)))


def by_posterior(rows: Any, s: Any, frozen: Any) -> list[float]:
    """RE-PO: Bayes' rule for "the label is true", on the frozen rows."""
    losses, gaps = [], [gap(row) for row in frozen]
    mean, spread = statistics.mean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else math.inf
    for row, fixed, own in zip(rows, frozen, gaps, strict=True):
        true, false = s["reliability"] * agreement(fixed, s["beta"]), 1 - s["reliability"]
        false *= math.exp(s.get("kappa", 0.0) * (own - mean) / spread)  # gapo_re_po: the gap's odds against the label
        w = true / (true + false * (1 - agreement(fixed, s["beta"])))
        p = agreement(row, s["beta"])
        losses.append(-w * math.log(p) - (1 - w) * math.log(1 - p))
    return losses


def by_log_ratio(rows: Any, s: Any, frozen: Any) -> list[float]:
    """alpha-DPO, whose first batch is its own average."""
    z = [token_margin(row) - token_margin(row, 2) for row in frozen]
    spread = statistics.stdev(z) if len(z) > 1 else 0.0
    scores = [(value - statistics.mean(z)) / spread if spread else 0.0 for value in z]
    return [
        math.log(1 + math.exp(s["gamma"] + s["beta"] * (s["alpha"] * score - token_margin(row))))
        for row, score in zip(rows, scores, strict=True)
    ]


def of_ordinary(rows: Any, s: Any, frozen: Any) -> list[float]:
    """beta-DPO, whose first batch is its own average: only the pairs nearest to the mean count."""
    z = [math.log(odds(row)) for row in frozen]
    mean = statistics.mean(z)
    kept = sorted(range(len(z)), key=lambda i: abs(z[i] - mean))[: max(1, math.floor(len(z) * s["keep"]))]
    beta = s["beta"] * (1 + s["alpha"] * (statistics.mean(z[i] for i in kept) - mean))
    beta = max(beta, 0.001)
    return [-math.log(agreement(row, beta)) * len(z) / len(kept) if i in kept else 0.0 for i, row in enumerate(rows)]


def win(odds: float) -> float:
    return odds / (1 + odds)


def of_each(function: Any) -> Any:
    return lambda rows, s, frozen: [function(row, s) for row in rows]


# name -> losses(rows, settings, rows that constants are computed from)
ORACLES = {
    "gapo": of_each(
        lambda row, s: math.log(1 + math.exp(s["gamma"] - s["beta"] * (token_margin(row) - token_margin(row, 4))))
    ),
    "simpo": of_each(lambda row, s: math.log(1 + math.exp(s["gamma"]) / math.exp(token_margin(row)) ** s["beta"])),
    "amapo": adaptive,
    "gapo_simpo": of_each(
        lambda row, s: sum(softplus(s["gamma"] - s["beta"] * x) for x in (token_margin(row), gap(row)))
    ),
    "gapo_capped": lambda rows, s, frozen: [
        softplus(s["gamma"] - s["beta"] * gap(row)) if s["beta"] * token_margin(x) - s["gamma"] < s["cap"] else 0.0
        for row, x in zip(rows, frozen, strict=True)
    ],
    "gapo_target": lambda rows, s, frozen: own_targets(rows, s, [gap(row) for row in frozen]),
    "margin_target": lambda rows, s, frozen: own_targets(rows, s, [-token_margin(row) for row in frozen]),
    "dpo": of_each(lambda row, s: -math.log(agreement(row, s["beta"]))),
    "cdpo": of_each(smoothed),
    "rdpo": of_each(unbiased),
    "dr_dpo": lambda rows, s, frozen: (
        [-s["beta_prime"] * math.log(statistics.mean(agreement(r, s["beta"]) ** (1 / s["beta_prime"]) for r in rows))]
        * len(rows)
    ),
    "ipo": of_each(
        lambda row, s: (
            (token_margin(row) - token_margin(row, 2)) ** 2
            - (token_margin(row) - token_margin(row, 2)) / s["tau"]
            + 0.25 / s["tau"] ** 2
        )
    ),
    "ropo": of_each(
        lambda row, s: (
            4
            * s["alpha"]
            * (s["alpha"] * (1 - agreement(row, s["beta"])) - math.log(agreement(row, s["beta"])))
            / (1 + s["alpha"]) ** 2
        )
    ),
    "hypo": of_each(
        lambda row, s: (
            -math.log(
                agreement(row if row[2] > row[3] else (row[0], row[1], 0.0, 0.0), s["beta"])  # a neutral reference
            )
        )
    ),
    "rpo": of_each(lambda row, s: s["eta"] * -row[0] / row[6] - math.log(agreement(row, s["beta"]))),
    "sigmoid_loss": of_each(lambda row, s: (1 - math.tanh(rewards(row, s) / 2)) / 2),
    "ramp": of_each(lambda row, s: ramp(rewards(row, s))),
    "unhinged": of_each(lambda row, s: 1 - rewards(row, s)),
    "re_po": by_posterior,
    "gapo_re_po": by_posterior,
    "alpha_dpo": by_log_ratio,
    "beta_dpo": of_ordinary,
    "simper": of_each(lambda row, s: math.exp(row[1]) ** (1 / row[7]) - math.exp(row[0]) ** (1 / row[6])),
    "sigmoid_norm": of_each(
        lambda row, s: math.log(1 + math.exp(token_margin(row, 2) - token_margin(row)) ** s["beta"])
    ),
    "r_dpo": of_each(lambda row, s: math.log(1 + math.exp(s["alpha"]) ** (row[7] - row[6]) / odds(row) ** s["beta"])),
    "cal_dpo": of_each(lambda row, s: targets(row, s) / 2 - math.log(agreement(row, 1.0))),
    "sppo_hard": of_each(targets),
    "hinge": of_each(lambda row, s: max(0.0, 1 - s["beta"] * math.log(odds(row)))),
    "discopop": of_each(discovered),
    "exo_pair": of_each(reverse_divergence),
    "nca_pair": of_each(
        lambda row, s: (
            -math.log(win(ratio(row, 0, s["beta"])))
            - math.log(1 - win(ratio(row, 0, s["beta"]))) / 2
            - math.log(1 - win(ratio(row, 1, s["beta"]))) / 2
        )
    ),
    "bco_pair": of_each(lambda row, s: -math.log(win(ratio(row, 0, s["beta"])) * (1 - win(ratio(row, 1, s["beta"]))))),
    "apo_zero": of_each(lambda row, s: 1 - win(ratio(row, 0, s["beta"])) + win(ratio(row, 1, s["beta"]))),
    "apo_down": of_each(lambda row, s: win(ratio(row, 0, s["beta"])) + 1 - agreement(row, s["beta"])),
    "aot": of_sorted(lambda row: math.exp(row[0] - row[1]), lambda row: math.exp(row[2] - row[3])),
    "aot_unpaired": of_sorted(lambda row: ratio(row, 0), lambda row: ratio(row, 1)),
}


def oracle(objective: Objective, rows: Any, given: Any = None, frozen: Any = None) -> list[float]:
    found = {**objective.defaults, **(given or {})}
    return ORACLES[objective.name](rows, found, rows if frozen is None else frozen)


def tolerance(library: Library) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 2e-5} if library.name == "mlx" else {"rtol": 1e-9, "atol": 1e-9}


HAND_COMPUTED = {
    # z = 3 - 1 = 2 on sums; per token the margins are 1/4, 1/3 under the reference and -1/24 under the anchor
    "gapo": math.log(1 + math.exp(0.25 - 2.5 * (0.25 + 1 / 24))),
    "simpo": math.log(1 + math.exp(0.25 - 0.625)),
    "amapo": math.log(1 + math.exp(-0.5)),
    "gapo_simpo": math.log(1 + math.exp(0.25 - 0.625)) + math.log(1 + math.exp(0.25 - 2.5 * (0.25 + 1 / 24))),
    "gapo_capped": 0.0,  # beta * M = 0.625 is beyond 0.25
    "gapo_target": math.log(1 + math.exp(0.25 - 0.625)),  # one pair alone has the score 0
    "margin_target": math.log(1 + math.exp(0.25 - 0.625)),
    "dpo": 0.5981388693815918,
    "cdpo": 0.5981388693815918 + 0.1 * 0.2,
    "rdpo": 0.5981388693815918 - 0.1 * 0.2 / 0.8,
    "dr_dpo": 0.5981388693815918,
    "ipo": (0.25 + 1 / 3 - 5) ** 2,
    "ropo": 56 / 225 * 0.5981388693815918 + 784 / 225 * 0.45016600268752216,
    "hypo": 0.5981388693815918,
    "rpo": 0.31326168751822286 + 0.2 * 2,
    "sigmoid_loss": 0.45016600268752216,
    "ramp": 0.4,
    "unhinged": 0.8,
    # w = 0.9 * 0.54983 / (0.9 * 0.54983 + 0.1 * 0.45017) = 0.91661
    "re_po": 0.5981388693815918 + 0.2 * 0.045016600268752216 / (0.045016600268752216 + 0.9 * 0.549833997312478),
    "gapo_re_po": 0.5981388693815918
    + 0.2 * 0.045016600268752216 / (0.045016600268752216 + 0.9 * 0.549833997312478),  # one pair alone has the score 0
    "alpha_dpo": math.log(1 + math.exp(0.375 - 0.625)),
    "beta_dpo": 0.5981388693815918,
    "simper": math.exp(-2.25) - math.exp(-2),
    "sigmoid_norm": math.log(1 + math.exp(-5 * (0.25 + 1 / 3))),
    "r_dpo": math.log(1 + math.exp(-0.2 + 0.05)),
    "cal_dpo": 0.12692801104297263 + 499**2,
    "sppo_hard": 32.0,
    "hinge": 0.8,
    "discopop": 0.598138869381592 * 0.01798620996209156 + 0.8187307530779818 * 0.9820137900379085,
    "exo_pair": (
        0.549833997312478 * (-0.5981388693815918 - math.log(0.999))
        + 0.45016600268752216 * (-0.7981388693815918 - math.log(0.001))
    ),
    "nca_pair": 0.6443966600735709 + 0.7443966600735709 / 2 + 0.6443966600735709 / 2,
    "bco_pair": 2 * 0.6443966600735709,
    "apo_zero": 2 * 0.47502081252106,
    "apo_down": 0.52497918747894 + 0.45016600268752216,
    "aot": 0.5981388693815918,
    "aot_unpaired": 0.5981388693815918,
}


@BY_NAME
def test_value_computed_by_hand(library: Library, objective: Objective) -> None:
    """log(1 + exp(-0.2)) = 0.59814, 1 / (1 + exp(0.2)) = 0.45017, log(1 + exp(-1)) = 0.31326.

    The log-ratios are 1 and -1: log(1 + exp(-0.1)) = 0.64440, 1 / (1 + exp(-0.1)) = 0.52498.
    """
    losses = objective.losses(log_probs(library, ROWS[:1]))
    np.testing.assert_allclose(library.numpy(losses), [HAND_COMPUTED[objective.name]], **tolerance(library))


@BY_NAME
@pytest.mark.parametrize("tried", ["defaults", "other"])
def test_losses_are_the_oracles(library: Library, objective: Objective, tried: str) -> None:
    other = {"beta": 0.8, "tau": 0.4, "gamma": 0.5, "label_smoothing": 0.2, "beta_prime": 0.7, "alpha": 3.0}
    other |= {
        "eta": 0.6,
        "clip": 1.5,
        "epsilon": 0.2,
        "keep": 0.55,
        "rate": 0.4,
        "reliability": 0.6,
        "cap": 1.0,
        "strength": 1.2,
    }
    # smoothing of GAPO itself has its tests in test_objective.py
    changed = {key: other[key] for key in objective.defaults if key in other and objective.name != "gapo"}
    given = changed if tried == "other" else {}
    rng = np.random.default_rng(0)
    rows = [(*rng.uniform(-9, -1, 6), *(int(n) for n in rng.integers(1, 9, 2))) for _ in range(20)]
    losses = objective.losses(log_probs(library, rows), **given)
    assert losses.shape == (len(rows),)
    np.testing.assert_allclose(library.numpy(losses), oracle(objective, rows, given), **tolerance(library))


@BY_NAME
def test_gradient_is_the_finite_difference(autodiff: Library, objective: Objective) -> None:
    logps = log_probs(autodiff, ROWS)

    def loss(chosen: Any, rejected: Any, *constants: Any) -> Any:
        named = dict(zip(FIELDS, (chosen, rejected, *constants), strict=True))
        moved = LogProbs(**named, chosen_lengths=logps.chosen_lengths, rejected_lengths=logps.rejected_lengths)
        return objective.losses(moved).mean()

    grads = autodiff.grad(loss, *(getattr(logps, name) for name in FIELDS))
    step = 1e-5
    for side in (0, 1):
        for i in range(len(ROWS)):
            values = []
            for sign in (1, -1):
                rows = [list(row) for row in ROWS]
                rows[i][side] += sign * step
                values.append(statistics.mean(oracle(objective, rows, frozen=ROWS)))
            expected = (values[0] - values[1]) / (2 * step)
            np.testing.assert_allclose(grads[side][i], expected, rtol=1e-4, atol=1e-6)
    assert not any(grad.any() for grad in grads[2:])  # reference and anchor are constants


def test_cdpo_without_smoothing_is_dpo(library: Library) -> None:
    logps = log_probs(library, ROWS)
    dpo = OBJECTIVES["dpo"].losses(logps, beta=0.3)
    for name in ("cdpo", "rdpo"):
        found = OBJECTIVES[name].losses(logps, beta=0.3, label_smoothing=0.0)
        np.testing.assert_allclose(library.numpy(found), library.numpy(dpo), **tolerance(library))


def test_rdpo_is_unbiased_under_flips(library: Library) -> None:
    flipped = [(r[1], r[0], r[3], r[2], r[5], r[4], r[7], r[6]) for r in ROWS]
    e = 0.3
    kept, wrong = (
        library.numpy(OBJECTIVES["rdpo"].losses(log_probs(library, rows), label_smoothing=e))
        for rows in (ROWS, flipped)
    )
    clean = library.numpy(OBJECTIVES["dpo"].losses(log_probs(library, ROWS)))
    np.testing.assert_allclose((1 - e) * kept + e * wrong, clean, **tolerance(library))


def test_dr_dpo_lies_below_the_mean_of_dpo_and_nears_it(library: Library) -> None:
    logps = log_probs(library, ROWS)
    mean = float(library.numpy(OBJECTIVES["dpo"].losses(logps)).mean())
    near, far = (float(library.numpy(OBJECTIVES["dr_dpo"].losses(logps, beta_prime=b)).mean()) for b in (1e4, 0.5))
    assert far < mean - 1e-2
    assert near == pytest.approx(mean, abs=1e-2 if library.name == "mlx" else 1e-4)


def test_dr_dpo_weighs_pairs_by_the_softmax_of_their_losses(autodiff: Library) -> None:
    logps = log_probs(autodiff, ROWS)
    rest = logps.rejected, logps.ref_chosen, logps.ref_rejected
    beta_prime = 0.5
    dr, plain = (
        autodiff.grad(lambda c, f=f: f(c, *rest, beta=0.5), logps.chosen)[0]
        for f in (lambda *a, **k: objectives.dr_dpo(*a, **k, beta_prime=beta_prime), objectives.dpo)
    )
    losses = autodiff.numpy(objectives.dpo(logps.chosen, *rest, beta=0.5, reduction="none"))
    weights = np.exp(-losses / beta_prime) / np.exp(-losses / beta_prime).sum()
    np.testing.assert_allclose(dr, plain * len(ROWS) * weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "constant"), [("sigmoid_loss", 1.0), ("ramp", 1.0), ("unhinged", 2.0)])
def test_symmetric_losses_add_up_to_a_constant(library: Library, name: str, constant: float) -> None:
    flipped = [(r[1], r[0], r[3], r[2], r[5], r[4], r[7], r[6]) for r in ROWS]
    both = [library.numpy(OBJECTIVES[name].losses(log_probs(library, rows), beta=0.7)) for rows in (ROWS, flipped)]
    np.testing.assert_allclose(sum(both), constant, **tolerance(library))


def test_rewards_are_clipped_each(library: Library) -> None:
    far = [(-1.0, -80.0, -60.0, -2.0, -1.0, -1.0, 1, 1)]  # rewards of 59 and -78, times beta
    losses = OBJECTIVES["unhinged"].losses(log_probs(library, far), beta=1.0, clip=10.0)
    np.testing.assert_allclose(library.numpy(losses), [1 - 20.0])


@pytest.mark.parametrize(("ref", "counted"), [((-8.0, -9.0), (-8.0, -9.0)), ((-9.0, -8.0), (0.0, 0.0))])
def test_hypo_is_dpo_with_a_neutral_reference_where_that_is_pessimistic(ref: Any, counted: Any) -> None:
    policy = np.array([-6.0]), np.array([-7.0])
    hypo = objectives.hypo(*policy, *(np.array([x]) for x in ref))
    assert hypo == objectives.dpo(*policy, *(np.array([x]) for x in counted))


def test_rpo_without_its_sft_term_is_dpo(library: Library) -> None:
    logps = log_probs(library, ROWS)
    found, dpo = OBJECTIVES["rpo"].losses(logps, beta=0.1, eta=0.0), OBJECTIVES["dpo"].losses(logps)
    np.testing.assert_array_equal(library.numpy(found), library.numpy(dpo))


def test_simpo_is_the_probe_loss() -> None:
    logps = log_probs(LIBRARIES["numpy"], ROWS)
    margins = np.array([token_margin(row) for row in ROWS])
    found = OBJECTIVES["simpo"].losses(logps, beta=3.0, gamma=0.7)
    np.testing.assert_allclose(found, np.log1p(np.exp(0.7 - 3.0 * margins)), rtol=1e-12)
    config = gapo.GAPOConfig(beta=3.0, gamma=0.7)
    slopes, factor = probe_pull(margins, config.gamma, config, get_backend("numpy"))
    closer = OBJECTIVES["simpo"].losses(log_probs(LIBRARIES["numpy"], ROWS), beta=3.0, gamma=0.7 - 3e-6)
    np.testing.assert_allclose((found - closer) / 1e-6 / len(ROWS), factor * slopes, rtol=1e-5)


def test_amapo_gives_no_target_to_one_pair_nor_to_equal_ones(library: Library) -> None:
    for rows in (ROWS[:1], [ROWS[0]] * 3):
        amapo = OBJECTIVES["amapo"].losses(log_probs(library, rows))
        simpo = OBJECTIVES["simpo"].losses(log_probs(library, rows), beta=2.0, gamma=0.0)
        np.testing.assert_allclose(library.numpy(amapo), library.numpy(simpo), rtol=1e-6)


@BY_NAME
def test_a_better_chosen_response_never_costs_more(objective: Objective) -> None:
    """Each loss falls in the chosen log-probability, but those that aim at a finite margin or look at the batch."""
    if objective.name in ("cdpo", "ipo", "amapo", "cal_dpo", "sppo_hard", "exo_pair", "nca_pair", "apo_down"):
        pytest.skip("least at a finite margin")
    if objective.name in ("discopop", "re_po", "gapo_re_po"):
        pytest.skip("it goes from one loss to another as the margin grows")
    rows = [(c, -9.0, -7.0, -8.0, -8.0, -8.0, 3, 4) for c in np.linspace(-60, -0.5, 50)]
    losses = [float(objective.losses(log_probs(LIBRARIES["numpy"], [row]))[0]) for row in rows]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@BY_NAME
def test_finite_where_log_ratios_are_huge(autodiff: Library, objective: Objective) -> None:
    rows = [(-3e4, -1.0, -1.0, -3e4, -1.0, -1.0, 1, 1), (-1.0, -3e4, -3e4, -1.0, -1.0, -1.0, 1, 1), *ROWS[:1]]
    if objective.name == "amapo":  # a mean margin whose exponential overflows
        rows += [(-1.0, -9e4, -1.0, -1.0, -1.0, -1.0, 1, 1)] * 2
    logps = log_probs(autodiff, rows, "float32")
    assert np.isfinite(autodiff.numpy(objective.losses(logps))).all()

    def loss(chosen: Any) -> Any:
        named = {**{name: getattr(logps, name) for name in FIELDS}, "chosen": chosen}
        return objective.losses(
            LogProbs(**named, chosen_lengths=logps.chosen_lengths, rejected_lengths=logps.rejected_lengths)
        ).mean()

    assert np.isfinite(autodiff.grad(loss, logps.chosen)[0]).all()


@BY_NAME
def test_half_precision_is_widened(objective: Objective) -> None:
    torch = require("torch")
    losses = objective.losses(log_probs(LIBRARIES["torch"], ROWS, "bfloat16"))
    assert losses.dtype == torch.float32
    # the sums are exact in bfloat16; a division by a length rounds to 8 bits
    np.testing.assert_allclose(losses.numpy(), oracle(objective, ROWS), rtol=0.05, atol=0.02)


@BY_NAME
def test_jax_traces_it(objective: Objective) -> None:
    jax = require("jax")
    logps = log_probs(LIBRARIES["jax"], ROWS)
    arrays = {name: getattr(logps, name) for name in (*FIELDS, "chosen_lengths", "rejected_lengths")}
    found = jax.jit(lambda a: objective.losses(LogProbs(**a)))(arrays)
    np.testing.assert_allclose(found, objective.losses(logps), rtol=1e-12)


def public(objective: Objective, logps: LogProbs) -> tuple[Any, list[Any]]:
    """The public function of an objective, and its arrays in the order of its signature."""
    function = gapo.loss if objective.name == "gapo" else getattr(objectives, objective.name)
    taken = logps.per_token() if objective.average else logps
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return function, [getattr(taken, name.removesuffix("_logps")) for name in names]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", WITH_REFERENCE, ids=lambda o: o.name)
def test_reductions(objective: Objective, reduction: str) -> None:
    logps = log_probs(LIBRARIES["numpy"], ROWS)
    function, arrays = public(objective, logps)
    losses = objective.losses(logps)
    expected = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    np.testing.assert_allclose(function(*arrays, reduction=reduction), expected)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'max'"):
        function(*arrays, reduction="max")


def test_the_registry_is_what_is_public() -> None:
    functions = {
        name
        for name, objective in OBJECTIVES.items()
        if objective.function is getattr(getattr(objectives, name, 0), "__wrapped__", 0)
    }
    others = {"OBJECTIVES", "WEIGHTINGS", "LogProbs", "Loss", "Objective", "find", "resolve"}
    assert functions == set(objectives.__all__) - others
    assert set(OBJECTIVES) - functions == {"gapo"}
    assert set(ORACLES) == set(HAND_COMPUTED) == set(OBJECTIVES)
    assert objectives.find("dpo") is OBJECTIVES["dpo"]
    assert OBJECTIVES["rdpo"].defaults == {"beta": 0.1, "label_smoothing": 0.1}
    for objective in OBJECTIVES.values():
        assert "arXiv" in objective.paper or objective.name == "cdpo"
        assert objective.name in str(objective)
    with pytest.raises(
        ValueError, match=r"objective must be one of 'gapo', 'simpo', .*'unhinged', .*got 'orpo'.*'gapo\+'"
    ):
        objectives.find("orpo")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("sigmoid", "TRL's 'sigmoid' is 'dpo' here; the symmetric sigmoid loss is 'sigmoid_loss'"),
        ("robust", "TRL's 'robust' is 'rdpo' here"),
        ("sft", "TRL's 'sft' is no objective on pairs: sft_weight adds it to any objective"),
    ],
)
def test_names_that_mean_another_loss_elsewhere_are_refused(name: str, answer: str) -> None:
    with pytest.raises(ValueError, match=f"there is no objective '{name}': {answer}"):
        objectives.find(name)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dpo", {"gamma": 1}, r"objective 'dpo' has no setting 'gamma'; it takes beta \(0.1\)"),
        ("dpo", {"beta": 0}, "beta must be a finite number > 0, got 0"),
        ("dpo", {"beta": "0.1"}, "beta must be a finite number > 0, got '0.1'"),
        ("simpo", {"gamma": float("inf")}, "gamma must be a finite number, got inf"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing must be a finite number in \[0, 0.5\), got 0.5"),
        ("dr_dpo", {"beta_prime": -1}, "beta_prime must be a finite number > 0, got -1"),
        ("ipo", {"tau": 0}, "tau must be a finite number > 0, got 0"),
        ("ropo", {"alpha": 0}, "alpha must be a finite number > 0, got 0"),
        ("rpo", {"eta": -0.1}, "eta must be a finite number >= 0, got -0.1"),
        ("ramp", {"clip": 0}, "clip must be a finite number > 0, got 0"),
        ("re_po", {"reliability": 1}, r"reliability must be a finite number in \(0, 1\), got 1"),
        ("alpha_dpo", {"rate": 0}, r"rate must be a finite number in \(0, 1\], got 0"),
        ("beta_dpo", {"keep": 1.1}, r"keep must be a finite number in \(0, 1\], got 1.1"),
        ("exo_pair", {"epsilon": 0}, r"epsilon must be a finite number in \(0, 0.5\), got 0"),
        ("exo_pair", {"label_smoothing": 0.1}, r"has no setting 'label_smoothing'; it takes beta \(0.1\), epsilon"),
        ("gapo", {"loss_type": "ipo"}, "loss_type must be one of 'sigmoid', 'hinge', got 'ipo'"),
    ],
)
def test_settings_are_checked_before_anything_is_computed(name: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name].settings(given)
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name].losses(log_probs(LIBRARIES["numpy"], ROWS), **given)
    if "has no setting" not in message:
        function, arrays = public(OBJECTIVES[name], log_probs(LIBRARIES["numpy"], ROWS))
        with pytest.raises(ValueError, match=message):
            function(*arrays, **given)


def test_what_is_missing_or_does_not_fit_is_named(library: Library) -> None:
    ok, short = library.asarray(np.zeros(3)), library.asarray(np.zeros(2))
    lengths = library.asarray(np.ones(3, dtype=np.int32))
    bare = LogProbs(chosen=ok, rejected=ok, chosen_lengths=lengths, rejected_lengths=lengths)
    with pytest.raises(ValueError, match=r"objective 'dpo' needs LogProbs\(ref_chosen=..., ref_rejected=...\)"):
        OBJECTIVES["dpo"].losses(bare)
    with pytest.raises(ValueError, match=r"objective 'gapo' needs LogProbs\(anchor_chosen=..., anchor_rejected=...\)"):
        OBJECTIVES["gapo"].losses(bare)
    for function in (objectives.dpo, objectives.unhinged):
        with pytest.raises(ValueError, match=r"chosen_logps and ref_chosen_logps must have the same shape"):
            function(ok, ok, short, ok)
    with pytest.raises(ValueError, match=r"chosen_logps must have shape \(N,\) with N >= 1"):
        objectives.simpo(*[library.asarray(np.zeros(0))] * 2)
    with pytest.raises(TypeError, match="rejected_logps must be floating point"):
        objectives.amapo(ok, lengths)
    with pytest.raises(ValueError, match="chosen_logps and chosen_lengths must have the same shape"):
        objectives.rpo(ok, ok, ok, ok, short)
    with pytest.raises(TypeError, match="chosen_lengths must be an array"):
        objectives.rpo(ok, ok, ok, ok, [1, 1, 1])
    with pytest.raises(ValueError, match="gamma must be a number or one for each of the 3 pairs"):
        objectives.simpo(ok, ok, gamma=short)


def test_targets_may_differ_by_pair(library: Library) -> None:
    targets = np.array([0.1, 0.9, 0.0, 0.4])
    found = OBJECTIVES["simpo"].losses(log_probs(library, ROWS), gamma=library.asarray(targets))
    expected = [oracle(OBJECTIVES["simpo"], [r], {"gamma": t})[0] for r, t in zip(ROWS, targets, strict=True)]
    np.testing.assert_allclose(library.numpy(found), expected, **tolerance(library))
