"""The noise model against a search by hand, on draws whose truth is known, and its calibration."""

import numpy as np
import pytest

from gapo.runs.audit import noise_model
from gapo.runs.audit.noise_model import LAPSES, MOST_LAPSES, fit, unit_size


def draw(
    n: int, share: float, slopes: list[float], seed: int, lapses: float = 0.0, copies: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of stated labels (n, features), which of them are wrong, and groups of `copies` equal pairs.

    `lapses` of the predictions are turned over, however sure they are.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n // copies, len(slopes)))
    first_is_better = rng.random(len(x)) < 1 / (1 + np.exp(-x @ slopes))
    first_is_better ^= rng.random(len(x)) < lapses
    x = np.where(first_is_better[:, None], x, -x)  # of the better answer minus the other
    wrong = rng.random(len(x)) < share
    x = np.where(wrong[:, None], -x, x)
    return np.repeat(x, copies, 0), np.repeat(wrong, copies), np.repeat(np.arange(len(x)), copies)


def test_weights_and_probabilities_are_those_of_a_search_by_hand() -> None:
    x = draw(300, 0.2, [2.0], seed=0)[0]
    model = fit(x)
    grid = np.linspace(-1, 8, 901)
    log_weights, best = [], []
    for lapse in LAPSES:
        right = 1 / (1 + np.exp(-x * grid))  # (pairs, grid)
        q = (1 - lapse) * right + lapse * (1 - right)
        likelihood = np.log(q).sum(0) - 0.125 * grid**2
        top = likelihood.argmax()
        slope = ((1 - 2 * lapse) * right * (1 - right) * x)[:, top]
        information = np.mean(slope**2 / (q * (1 - q))[:, top]) + 0.25 / len(x)
        log_weights.append(likelihood[top] - np.log(information) / 4)
        best.append(grid[top])
    weights = np.exp(np.array(log_weights) - max(log_weights))
    weights /= weights.sum()
    np.testing.assert_allclose(model.weights, weights, atol=3e-4)
    heavy = weights > 1e-4
    np.testing.assert_allclose(model.coefficients[heavy, 0], np.array(best)[heavy], rtol=0.02, atol=0.01)
    # The policies' own lapses u: a triangle over what L allows. Bayes for each L and u, by loops.
    wrong, share = np.zeros(len(x)), 0.0
    for lapse, b, weight in zip(LAPSES, best, weights, strict=True):
        possible = {u: MOST_LAPSES - u for u in np.linspace(0, MOST_LAPSES, 21) if u <= lapse}
        for u, likely in possible.items():
            e = (lapse - u) / (1 - 2 * u)
            right = u + (1 - 2 * u) / (1 + np.exp(-b * x[:, 0]))
            wrong += weight * likely / sum(possible.values()) * e * (1 - right) / (e * (1 - right) + (1 - e) * right)
            share += weight * likely / sum(possible.values()) * e
    np.testing.assert_allclose(model.p_wrong(x), wrong, atol=2e-3)
    assert model.share == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("share", "lapses", "slopes"), [(0.05, 0.1, [2.5, 0.5]), (0.2, 0.0, [2.5, 0.5]), (0.3, 0.15, [4.0, 0.0])]
)
def test_the_interval_of_the_share_covers_with_and_without_lapses(
    share: float, lapses: float, slopes: list[float]
) -> None:
    models = [fit(unit_size(draw(1000, share, slopes, seed, lapses)[0])) for seed in range(5)]
    intervals = [model.share_interval() for model in models]
    assert sum(low <= share <= high for low, high in intervals) >= 4
    assert max(high - low for low, high in intervals) < 0.45
    together = share + lapses - 2 * share * lapses
    assert np.mean([model.lapses for model in models]) == pytest.approx(together, abs=0.05)


def test_probabilities_are_calibrated_where_the_policies_lapse_as_often_as_is_supposed() -> None:
    x, wrong, _ = draw(5_000, 0.2, [2.0, 1.0], seed=5, lapses=MOST_LAPSES / 3)
    p = fit(unit_size(x)).p_wrong(unit_size(x))
    assert p.mean() == pytest.approx(wrong.mean(), abs=0.05)
    for part in np.array_split(np.argsort(p), 5):
        assert p[part].mean() == pytest.approx(wrong[part].mean(), abs=0.1)
    assert p.max() > 0.55


def test_where_nothing_predicts_the_labels_no_share_is_told() -> None:
    low, high = fit(draw(1000, 0.3, [0.0], seed=1)[0]).share_interval()
    assert low < 0.05
    assert high > 0.4


def test_copies_of_pairs_say_no_more_than_the_pairs() -> None:
    once, _, _ = draw(400, 0.2, [2.5], seed=2)
    many, _, groups = draw(1600, 0.2, [2.5], seed=2, copies=4)
    np.testing.assert_allclose(fit(many, groups).weights, fit(once).weights, atol=0.02)
    assert fit(many).weights.max() > 1.5 * fit(once).weights.max()


def test_a_feature_turned_over_changes_nothing() -> None:
    x = draw(800, 0.2, [2.0, 1.0], seed=3)[0]
    turned = fit(x * [1, -1])
    np.testing.assert_allclose(turned.p_wrong(x * [1, -1]), fit(x).p_wrong(x), atol=1e-6)
    np.testing.assert_allclose(turned.log_odds(x * [1, -1]), fit(x).log_odds(x), atol=1e-5)


def test_pairs_that_all_agree_have_a_finite_model() -> None:
    model = fit(np.abs(draw(300, 0.0, [1.0], seed=4)[0]) + 0.5)
    assert np.isfinite(model.coefficients).all()
    assert model.lapses < 0.03


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs of finite scores, got 2 pairs"):
        fit(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="got 0 pairs"):
        fit(np.zeros((0, 2)))


def test_unit_size_keeps_signs_and_zeros() -> None:
    x = np.array([[3.0, 0.0], [-4.0, 0.0]])
    np.testing.assert_allclose(noise_model.unit_size(x), x / np.array([np.sqrt(12.5), 1.0]))
