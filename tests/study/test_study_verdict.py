"""The first sentence of a study: who is ahead beyond chance, or that nobody is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gapo.study.study_verdict import lead, verdict


def runs(
    means: dict[str, float], seeds: int = 8, spread: float = 0.0, rates: tuple[float, ...] = (0.0, 0.2)
) -> pd.DataFrame:
    """Accuracies of each arm around its mean, which eight seeds have exactly; at rate 0 all have 0.9."""
    return pd.DataFrame(
        {"arm": arm, "mode": "random", "rate": rate, "seed": seed}
        | {"accuracy": mean + spread * np.cos(np.pi * seed / 4 + 0.7 * place) if rate else 0.9}
        for place, (arm, mean) in enumerate(means.items())
        for rate in rates
        for seed in range(seeds)
    )


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (runs({"gapo": 0.70, "simpo": 0.72, "dpo": 0.69}),
         "SimPO beats every other objective when labels are flipped. It ranks 72.0 % of the test pairs correctly, "
         "averaged over all flip rates above 0. Its lead over the runner-up, GAPO, is 2.0 points "
         "(2.0 to 2.0, 8 seeds)."),
        (runs({"gapo": 0.72, "simpo": 0.718, "dpo": 0.60}, spread=0.02), "GAPO comes first when labels are flipped, "),
        (runs({"gapo": 0.72, "simpo": 0.718, "dpo": 0.719}, spread=0.05),
         "No objective is ahead beyond chance when labels are flipped. GAPO comes first. It ranks 72.0 % "),
        (runs({"gapo": 0.72, "simpo": 0.60}, seeds=1),
         "One seed cannot tell which objective is ahead. GAPO comes first: it ranks 72.0 %"),
        (runs({"gapo": 0.72}), "Only GAPO was trained on flipped labels. It ranks 72.0 %"),
        (runs({"gapo": 0.72}, rates=(0.0,)), "No labels were flipped, so this study cannot tell"),
        # Controls do not compete.
        (runs({"gapo": 0.70, "gapo-rho0": 0.80, "simpo": 0.6}), "GAPO beats every other objective"),
    ],
)  # fmt: skip
def test_who_is_ahead(table: pd.DataFrame, said: str) -> None:
    assert verdict(table).startswith(said)


def test_those_who_are_not_beaten_are_named() -> None:
    text = verdict(runs({"gapo": 0.72, "simpo": 0.718, "dpo": 0.60}, spread=0.02))
    assert "and beats 1 of the 2 other objectives beyond chance, but not SimPO. It ranks" in text
    many = {"simpo": 0.5, "gapo": 0.503, "dpo": 0.502, "ipo": 0.501, "cdpo": 0.5, "ropo": 0.499}
    names = verdict(runs(many | {"rdpo": 0.3}, spread=0.01))
    assert "and beats 1 of the 6 other objectives beyond chance, but not " in names
    assert " and 2 more. It ranks" in names


def test_controls_that_the_leader_does_not_beat_are_named() -> None:
    means = {"dpo": 0.72, "gapo": 0.60, "gapo-rho0": 0.72, "gapo-gaussian": 0.5}
    text = verdict(runs(means, spread=0.01))
    assert text.startswith("DPO beats every other objective")
    assert text.endswith(" 8 seeds). Controls that DPO does not beat: GAPO, rho 0.")
    both = verdict(runs({**means, "gapo-gaussian": 0.73}, spread=0.01))
    assert both.endswith(" Controls that DPO does not beat: GAPO, rho 0; GAPO, gaussian.")
    assert verdict(runs({**means, "gapo-rho0": 0.5})).endswith(" 8 seeds).")
    elsewhere = pd.concat([runs({"dpo": 0.7, "gapo": 0.6}, rates=(0.2, 0.4)), runs({"gapo-rho0": 0.9}, rates=(0.2,))])
    assert verdict(elsewhere).endswith(" 8 seeds).")


def test_an_arm_that_was_not_run_everywhere_does_not_compete() -> None:
    table = pd.concat([runs({"gapo": 0.6, "simpo": 0.5}, rates=(0.2, 0.4)), runs({"dpo": 0.9}, rates=(0.2,))])
    assert verdict(table).startswith("GAPO beats every other objective")


def test_a_lead_is_held_to_all_comparisons() -> None:
    """Of draws without any lead, one in 20 at most has an interval above or below 0 in any of ten comparisons."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 10, 5))
    false = [any(abs(x.mean) > x.high - x.mean for x in (lead(row, 10) for row in study)) for study in values]
    assert 0.01 < np.mean(false) < 0.09
    five = np.array([0.01, 0.02, 0.03, 0.02, 0.04])
    assert lead(five, 1)[:3] == pytest.approx((five.mean(), *stats.t.interval(0.95, 4, five.mean(), stats.sem(five))))
    assert np.isnan(lead(five[:1], 1).low)
