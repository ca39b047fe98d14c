"""`GAPOConfig` is checked when it is made, and says what is accepted."""

import dataclasses
import inspect
from typing import Any

import pytest

import gapo


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"rho must be a finite number >= 0, got -0.1"),
        ({"rho": float("nan")}, r"rho must be a finite number >= 0, got nan"),
        ({"rho": float("inf")}, r"rho must be a finite number >= 0, got inf"),
        ({"rho": "0.1"}, r"rho must be a finite number >= 0, got '0.1'"),
        ({"rho": True}, r"rho must be a finite number >= 0, got True"),
        ({"beta": 0.0}, r"beta must be a finite number > 0, got 0.0"),
        ({"beta": float("inf")}, r"beta must be a finite number > 0, got inf"),
        ({"gamma": None}, r"gamma must be a finite number, got None"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be a finite number in \[0, 0.5\), got 0.5"),
        ({"sft_weight": -1}, r"sft_weight must be a finite number >= 0, got -1"),
        ({"adaptive": "yes"}, r"adaptive must be True or False, got 'yes'"),
        ({"probe": "kl"}, r"probe must be 'loss' or 'margin', got 'kl'"),
        ({"direction": "up"}, r"direction must be 'pessimistic' or 'gaussian', got 'up'"),
        ({"anchor": "both"}, r"anchor must be 'auto' or 'exact' or 'first_order', got 'both'"),
        ({"loss_type": "ipo"}, r"loss_type must be one of 'sigmoid', 'hinge', got 'ipo'"),
        ({"last_layers": 0}, r"last_layers must be a whole number >= 1, or None, got 0"),
        ({"last_layers": True}, r"last_layers must be a whole number >= 1, or None, got True"),
        ({"perturb": "("}, r"perturb must be 'backbone', 'all' or a regular expression, got '\('"),
        ({"perturb": ""}, r"perturb must be 'backbone', 'all' or a regular expression, got ''"),
    ],
)
def test_what_is_not_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gapo.GAPOConfig(**options)


def test_the_defaults_are_the_documents() -> None:
    assert dataclasses.asdict(gapo.GAPOConfig()) == {
        "beta": 2.5,
        "gamma": 0.25,
        "rho": 0.025,
        "adaptive": True,
        "probe": "loss",
        "direction": "pessimistic",
        "anchor": "exact",
        "perturb": "backbone",
        "last_layers": None,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "sft_weight": 0.0,
    }


def test_it_cannot_change_and_every_field_is_documented() -> None:
    config = gapo.GAPOConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rho = 1.0  # type: ignore[misc]
    documented = inspect.getdoc(gapo.GAPOConfig) or ""  # Python 3.13 takes the indentation off by itself
    for field in dataclasses.fields(config):
        assert f"\n    {field.name}: " in documented
