"""The noise model against a search by hand, on draws whose truth is known, and its calibration."""

import numpy as np
import pytest

from gapo.runs.audit import noise_model
from gapo.runs.audit.noise_model import SHARES, fit, unit_size


def draw(
    n: int, share: float, slopes: list[float], seed: int, copies: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of stated labels (n, features), which of them are wrong, and groups of `copies` equal pairs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n // copies, len(slopes)))
    first_is_better = rng.random(len(x)) < 1 / (1 + np.exp(-x @ slopes))
    x = np.where(first_is_better[:, None], x, -x)  # of the better answer minus the other
    wrong = rng.random(len(x)) < share
    x = np.where(wrong[:, None], -x, x)
    return np.repeat(x, copies, 0), np.repeat(wrong, copies), np.repeat(np.arange(len(x)), copies)


def test_weights_and_probabilities_are_those_of_a_search_by_hand() -> None:
    x = draw(400, 0.2, [2.0], seed=0)[0]
    model = fit(x)
    grid = np.linspace(-1, 8, 3601)
    profile, best = [], []
    for share in SHARES:
        right = 1 / (1 + np.exp(-x * grid))  # (pairs, grid)
        likelihood = np.log((1 - share) * right + share * (1 - right)).sum(0) - 0.02 * grid**2
        profile.append(likelihood.max())
        best.append(grid[likelihood.argmax()])
    weights = np.exp(np.array(profile) - max(profile))
    weights /= weights.sum()
    np.testing.assert_allclose(model.weights, weights, atol=2e-4)
    heavy = weights > 1e-4
    np.testing.assert_allclose(model.coefficients[heavy, 0], np.array(best)[heavy], atol=3e-3)
    right = 1 / (1 + np.exp(-x * np.array(best)))
    wrong = SHARES * (1 - right) / ((1 - SHARES) * right + SHARES * (1 - right))
    np.testing.assert_allclose(model.p_wrong(x), wrong @ weights, atol=2e-3)
    assert model.share == pytest.approx(weights @ SHARES, abs=1e-4)


@pytest.mark.parametrize(("share", "slopes"), [(0.05, [2.5, 0.5]), (0.2, [2.5, 0.5]), (0.4, [4.0, 0.0])])
def test_the_share_is_recovered_and_its_interval_covers(share: float, slopes: list[float]) -> None:
    models = [fit(unit_size(draw(1500, share, slopes, seed)[0])) for seed in range(12)]
    intervals = [model.share_interval() for model in models]
    assert np.mean([model.share for model in models]) == pytest.approx(share, abs=0.03)
    assert sum(low <= share <= high for low, high in intervals) >= 10
    assert max(high - low for low, high in intervals) < 0.25


def test_probabilities_are_calibrated() -> None:
    x, wrong, _ = draw(20_000, 0.2, [1.5, 1.0], seed=5)
    p = fit(unit_size(x)).p_wrong(unit_size(x))
    assert p.mean() == pytest.approx(wrong.mean(), abs=0.02)
    for part in np.array_split(np.argsort(p), 10):
        assert p[part].mean() == pytest.approx(wrong[part].mean(), abs=0.045)
    assert p.max() > 0.7


def test_where_nothing_predicts_the_labels_no_share_is_told() -> None:
    low, high = fit(draw(1000, 0.3, [0.0], seed=1)[0]).share_interval()
    assert low < 0.05
    assert high > 0.45


def test_copies_of_pairs_say_no_more_than_the_pairs() -> None:
    once, _, _ = draw(500, 0.2, [2.5], seed=2)
    many, _, groups = draw(2000, 0.2, [2.5], seed=2, copies=4)
    assert fit(many, groups).share_interval() == pytest.approx(fit(once).share_interval(), abs=0.02)
    low, high = fit(many).share_interval()
    assert high - low < 0.6 * np.diff(fit(once).share_interval())[0]


def test_a_feature_turned_over_changes_nothing() -> None:
    x = draw(800, 0.2, [2.0, 1.0], seed=3)[0]
    turned = fit(x * [1, -1])
    np.testing.assert_allclose(turned.p_wrong(x * [1, -1]), fit(x).p_wrong(x), atol=1e-6)
    np.testing.assert_allclose(turned.log_odds(x * [1, -1]), fit(x).log_odds(x), atol=1e-5)


def test_pairs_that_all_agree_have_a_finite_model() -> None:
    model = fit(np.abs(draw(300, 0.0, [1.0], seed=4)[0]) + 0.5)
    assert np.isfinite(model.coefficients).all()
    assert model.share < 0.03


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs of finite scores, got 2 pairs"):
        fit(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="got 0 pairs"):
        fit(np.zeros((0, 2)))


def test_unit_size_keeps_signs_and_zeros() -> None:
    x = np.array([[3.0, 0.0], [-4.0, 0.0]])
    np.testing.assert_allclose(noise_model.unit_size(x), x / np.array([np.sqrt(12.5), 1.0]))
