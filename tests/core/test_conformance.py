"""Every objective on every backend: loss, weights and gradients of the step against derivations that do not use it.

The weights are the closed forms of -N dL/dM at a fixed chosen log-probability. The gradient is PyTorch's autograd
through the mean of the objective's public function of arrays, with an anchor computed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
import torch
from frameworks import LIBRARIES, Library

import gapo
from gapo.objectives import OBJECTIVES, LogProbs, Objective

# Reference margins of both signs, for "hypo"; one pair beyond the slope of "ramp"; no reward reaches its bound.
FEATURES = 0.7 * np.random.default_rng(3).normal(size=(2, 4, 3))  # (side, pair, feature)
LENGTHS = np.array([[3, 2, 6, 4], [5, 4, 2, 3]])
REFERENCE = np.array([[-4.0, -2.0, -9.0, -3.0], [-6.0, -1.5, -2.5, -4.5]])
WEIGHTS = {"up": np.array([0.4, -0.7, 0.2]), "down": np.array([-0.3, 0.1, 0.6])}
SIDES = ("chosen", "rejected")
RHO = 0.3
NAMES = [name for name in OBJECTIVES if "+" not in name]  # without sums of two


def batch_of(library: Library) -> dict[str, Any]:
    columns = {}
    for i, side in enumerate(SIDES):
        columns[f"{side}_features"] = library.asarray(FEATURES[i], "float64")
        columns[f"{side}_lengths"] = library.asarray(LENGTHS[i])
        columns[f"ref_{side}_logps"] = library.asarray(REFERENCE[i], "float64")
    return columns


def averages(params: Any, features: Any, exp: Any) -> Any:
    """Log-probability of each response (N,), nats per token."""
    return -exp(features @ params["up"] + (features * features) @ params["down"] / 2)


def margin_fn(library: Library, alone: bool = False) -> Callable[[Any, Any], Any]:
    def logps(params: Any, batch: Any) -> Any:
        by_name, exp = models.flat(library, params), models.namespace_of(library).exp
        chosen, rejected = (averages(by_name, batch[f"{side}_features"], exp) for side in SIDES)
        return chosen - rejected if alone else (chosen, rejected)

    return logps


def step_of(library: Library, objective: Any, alone: bool = False) -> Callable[..., Any]:
    config = gapo.GAPOConfig(rho=RHO, perturb="all")
    return gapo.value_and_grad(margin_fn(library, alone), config, objective, backend=library.name)


def anchor_logps(config: gapo.GAPOConfig) -> list[torch.Tensor]:
    """Both sides' averages at the anchor: the weights moved by rho * theta^2 * g / |theta * g|, g of SimPO's loss."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in WEIGHTS.items()}
    features = torch.tensor(FEATURES)
    chosen, rejected = (averages(params, x, torch.exp) for x in features)
    probe = torch.log(1 + torch.exp(config.gamma - config.beta * (chosen - rejected))).mean()
    slopes = torch.autograd.grad(probe, list(params.values()))
    scaled = torch.cat([p.detach() * g for p, g in zip(params.values(), slopes, strict=True)])
    moved = {
        name: p.detach() + config.rho * p.detach() ** 2 * g / scaled.norm()
        for (name, p), g in zip(params.items(), slopes, strict=True)
    }
    return [averages(moved, x, torch.exp) for x in features]


def expected(loss_of: Callable[..., torch.Tensor], needs_anchor: bool) -> dict[str, Any]:
    """Loss, gradients and weights, of `loss_of(chosen, rejected, anchor)`: averages and their anchors'."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in WEIGHTS.items()}
    chosen, rejected = (averages(params, x, torch.exp) for x in torch.tensor(FEATURES))
    anchor = anchor_logps(gapo.GAPOConfig(rho=RHO)) if needs_anchor else []
    loss = loss_of(chosen, rejected, anchor)
    *grads, slopes = torch.autograd.grad(loss, [*params.values(), rejected])
    return {
        "loss": loss.item(),
        "grads": {name: g.numpy() for name, g in zip(params, grads, strict=True)},
        "weights": len(slopes) * slopes.numpy(),
        "logps": [x.detach().numpy() for x in (chosen, rejected, *anchor)],
    }


def public_loss(objective: Objective) -> Callable[..., torch.Tensor]:
    """The mean of the objective's public function of arrays."""
    lengths, reference = torch.tensor(LENGTHS), torch.tensor(REFERENCE)

    def loss_of(chosen: torch.Tensor, rejected: torch.Tensor, anchor: list[torch.Tensor]) -> torch.Tensor:
        sums = [chosen * lengths[0], rejected * lengths[1], *(reference if objective.needs_reference else [])]
        sides = [x / n for x, n in zip(sums, [*lengths, *lengths], strict=False)] if objective.average else sums
        function = gapo.loss if objective.name == "gapo" else getattr(gapo.objectives, objective.name)
        counts = {f"{side}_lengths": n for side, n in zip(SIDES, lengths, strict=True)}
        options = {name: counts[name] for name in inspect.signature(function).parameters if name in counts}
        at_anchor = anchor if objective.average else [x * n for x, n in zip(anchor, lengths, strict=False)]
        return function(*sides, *at_anchor, **options)

    return loss_of


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def closed_form(name: str, logps: list[np.ndarray], s: dict[str, Any]) -> np.ndarray:
    """-N dL/dM (N,) at a fixed chosen log-probability, by hand; M is per token, z and d are of sums."""
    chosen, rejected, *anchor = logps
    margins, tokens = chosen - rejected, LENGTHS[1]
    references = REFERENCE[0] - REFERENCE[1]
    policy = chosen * LENGTHS[0] - rejected * LENGTHS[1]
    z, beta = policy - references, s.get("beta", np.nan)
    losing, winning = beta * sigmoid(-beta * z), beta * sigmoid(beta * z)  # slopes of log sigmoid at z and at -z
    e = s.get("label_smoothing", 0.0)
    anchor_margins = anchor[0] - anchor[1] if anchor else 0.0
    if name in ("gapo", "simpo"):
        gaps = margins - anchor_margins
        return beta * sigmoid(s["gamma"] - beta * gaps)
    if name == "gapo_simpo":
        return beta * (sigmoid(s["gamma"] - beta * margins) + sigmoid(s["gamma"] - beta * (margins - anchor_margins)))
    if name == "gapo_capped":
        return (beta * margins < s["gamma"]) * beta * sigmoid(s["gamma"] - beta * (margins - anchor_margins))
    if name in ("gapo_target", "margin_target"):
        witness = margins - anchor_margins if anchor else -margins
        scores = (witness - witness.mean()) / witness.std(ddof=1)
        return beta * sigmoid(s["gamma"] * (1 - s["strength"] * scores) - beta * margins)
    if name == "amapo":
        mean, spread = margins.mean(), margins.std(ddof=1)
        targets = np.where(margins < mean, beta * np.exp((mean - margins) / spread * mean), 0)
        return beta * sigmoid(targets - beta * margins)
    if name == "dr_dpo":
        odds = sigmoid(beta * z) ** (1 / s["beta_prime"])
        return tokens * losing * len(z) * odds / odds.sum()
    if name == "ropo":
        share = 1 + s["alpha"] * sigmoid(beta * z)
        return tokens * losing * 4 * s["alpha"] / (1 + s["alpha"]) ** 2 * share
    chosen_ratios, ratios = chosen * LENGTHS[0] - REFERENCE[0], rejected * tokens - REFERENCE[1]
    if name == "discopop":
        x, share = beta * z, sigmoid(beta * z / s["tau"])
        by_share = (np.exp(-x) + np.log(sigmoid(x))) * share * (1 - share) / s["tau"]
        return tokens * beta * ((1 - share) * sigmoid(-x) + share * np.exp(-x) - by_share)
    if name == "exo_pair":
        log_odds = beta * z - np.log((1 - s["epsilon"]) / s["epsilon"])
        return -tokens * beta * sigmoid(beta * z) * sigmoid(-beta * z) * log_odds
    if name in ("aot", "aot_unpaired"):
        x, y = (policy, references) if name == "aot" else (ratios, chosen_ratios)
        distances = x - np.sort(y)[[int((x < value).sum()) for value in x]]
        return tokens * beta * sigmoid(-beta * distances * (1 if name == "aot" else -1))
    per_token = margins - (REFERENCE[0] / LENGTHS[0] - REFERENCE[1] / LENGTHS[1])
    if name == "alpha_dpo":
        scores = (per_token - per_token.mean()) / per_token.std(ddof=1)
        return beta * sigmoid(s["gamma"] + beta * (s["alpha"] * scores - margins))
    if name == "gapo_re_po":
        gaps = margins - anchor_margins
        scores = (gaps - gaps.mean()) / gaps.std(ddof=1)
        return tokens * beta * (sigmoid(np.log(9) + beta * z - s["kappa"] * scores) - sigmoid(beta * z))
    if name == "beta_dpo":
        nearest = np.argsort(np.abs(z - z.mean()))[:3]  # 80 % of 4 pairs
        scaled = beta * (1 + s["alpha"] * (z[nearest].mean() - z.mean()))
        return tokens * scaled * sigmoid(-scaled * z) * np.isin(np.arange(4), nearest) * 4 / 3
    return {
        "re_po": tokens * beta * (sigmoid(beta * z + np.log(9)) - sigmoid(beta * z)),
        "simper": np.exp(rejected),
        "sigmoid_norm": beta * sigmoid(-beta * per_token),
        "r_dpo": tokens * beta * sigmoid(-beta * z - s.get("alpha", np.nan) * (LENGTHS[0] - LENGTHS[1])),
        "cal_dpo": tokens * (sigmoid(-z) + ratios + 0.5 / beta),
        "sppo_hard": tokens * 2 * (ratios + 0.5 / beta),
        "hinge": tokens * beta * (beta * z < 1),
        "nca_pair": tokens * beta * sigmoid(beta * ratios) / 2,
        "bco_pair": tokens * beta * sigmoid(beta * ratios),
        "apo_zero": tokens * beta * sigmoid(beta * ratios) * sigmoid(-beta * ratios),
        "apo_down": tokens * beta * sigmoid(beta * z) * sigmoid(-beta * z),
        "dpo": tokens * losing,
        "rpo": tokens * losing,  # its other term is the chosen response's alone
        "cdpo": tokens * ((1 - e) * losing - e * winning),
        "rdpo": tokens * ((1 - e) * losing + e * winning) / (1 - 2 * e),
        "hypo": tokens * beta * sigmoid(-beta * (policy - np.maximum(references, 0))),
        "ipo": 1 / s.get("tau", np.nan) - 2 * per_token,
        "sigmoid_loss": tokens * winning * sigmoid(-beta * z),
        "ramp": tokens * beta / 2 * (np.abs(beta * z) < 1),
        "unhinged": tokens * beta,
    }[name]


def assert_step(library: Library, objective: Any, reference: dict[str, Any]) -> None:
    result, grads = step_of(library, objective)(models.to_backend(library, WEIGHTS, "float64"), batch_of(library))
    rtol = 2e-6 if library.name == "mlx" else 1e-8  # MLX: exp in float32; NumPy: central differences
    for name in ("loss", "weights"):
        actual = library.numpy(getattr(result, name))
        np.testing.assert_allclose(actual, reference[name], rtol=rtol, atol=rtol, err_msg=name)
    for name, gradient in models.flat_grads(library, grads).items():
        np.testing.assert_allclose(gradient, reference["grads"][name], rtol=10 * rtol, atol=rtol, err_msg=name)


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # the radius is large, so that an anchor counts
@pytest.mark.parametrize("name", NAMES)
def test_the_step_of_each_objective(backend: Library, name: str) -> None:
    objective = OBJECTIVES[name]
    reference = expected(public_loss(objective), objective.needs_anchor)
    by_hand = closed_form(name, reference["logps"], dict(objective.defaults))
    np.testing.assert_allclose(by_hand, reference["weights"], rtol=1e-9)
    assert_step(backend, name, {**reference, "weights": by_hand})


def squared_ratio(logps: LogProbs) -> Any:
    """A user's own: z near 5, and the chosen response likely."""
    return (0.1 * logps.z - 0.5) ** 2 - 0.3 * logps.chosen_per_token


squared_ratio.needs_reference = True  # type: ignore[attr-defined]


def near_anchor(logps: LogProbs, *, scale: float = 2.0) -> Any:
    """A user's own: a gap of 1, and a chosen log-probability that stays the anchor's."""
    return scale * (logps.anchor_gaps - 1) ** 2 + 0.05 * (logps.chosen - logps.anchor_chosen) ** 2


def squared_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor, _: Any) -> torch.Tensor:
    lengths, reference = torch.tensor(LENGTHS), torch.tensor(REFERENCE)
    z = chosen * lengths[0] - rejected * lengths[1] - reference[0] + reference[1]
    return ((0.1 * z - 0.5) ** 2 - 0.3 * chosen).mean()


def near_anchor_loss(chosen: torch.Tensor, rejected: torch.Tensor, anchor: list[torch.Tensor]) -> torch.Tensor:
    gaps = chosen - rejected - (anchor[0] - anchor[1])
    drift = torch.tensor(LENGTHS[0]) * (chosen - anchor[0])
    return (2 * (gaps - 1) ** 2 + 0.05 * drift**2).mean()


@pytest.mark.filterwarnings("ignore:first_order_ratio")
def test_the_step_of_a_users_own(backend: Library) -> None:
    assert_step(backend, squared_ratio, expected(squared_ratio_loss, needs_anchor=False))
    own = Objective(name="near_anchor", function=near_anchor, needs_anchor=True)
    assert_step(backend, own, expected(near_anchor_loss, needs_anchor=True))


# What each objective needs besides margins: log-probabilities by side, lengths, a reference.
NEEDS = {
    **dict.fromkeys((name for name in NAMES if OBJECTIVES[name].of_margins), ()),
    **dict.fromkeys((name for name in NAMES if OBJECTIVES[name].needs_reference), ("logps", "lengths", "reference")),
    "simper": ("logps",),
    **dict.fromkeys(("sigmoid_norm", "alpha_dpo"), ("lengths", "reference")),
    "ipo": ("lengths", "reference"),  # margins per token, and the reference's sums over lengths
}
REFUSED = {
    "logps": "the objective needs log-probabilities of each response, and margin_fn returned margins alone",
    "lengths": r"the objective needs the number of tokens of each \w+ response: let the batch hold \w+_labels",
    "reference": r"objective '\w+' needs ref_chosen_logps and ref_rejected_logps in each batch",
}


def step_without(library: Library, objective: Any, missing: str) -> None:
    batch = batch_of(library)
    part = {"logps": "nothing", "lengths": "lengths", "reference": "ref_"}[missing]
    batch = {name: column for name, column in batch.items() if part not in name}
    step_of(library, objective, alone=missing == "logps")(models.to_backend(library, WEIGHTS, "float64"), batch)


def assert_refused(library: Library, objective: Any, missing: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[missing]) as error:
        step_without(library, objective, missing)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:first_order_ratio")
@pytest.mark.parametrize("name", NAMES)
def test_each_objective_refuses_a_batch_that_lacks_what_it_needs(name: str) -> None:
    for missing in REFUSED:
        if missing in NEEDS[name]:
            assert_refused(LIBRARIES["numpy"], name, missing)
        else:
            step_without(LIBRARIES["numpy"], name, missing)


@pytest.mark.parametrize("missing", REFUSED)
def test_each_backend_refuses_it(backend: Library, missing: str) -> None:
    assert_refused(backend, "dpo", missing)
    assert_refused(backend, squared_ratio, missing)
