"""`GAPOConfig` is checked when it is made, and says what is accepted."""

import dataclasses
import inspect
import types
from typing import Any

import numpy as np
import pytest

import gapo
from gapo.config import step_settings
from gapo.objectives.registry import find


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
        ({"perturb": "("}, r"perturb must be 'backbone', 'all', a regular expression, or masks by name, got '\('"),
        ({"perturb": ""}, r"perturb must be 'backbone', 'all', a regular expression, or masks by name, got ''"),
    ],
)
def test_what_is_not_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gapo.GAPOConfig(**options)


@pytest.mark.parametrize("value", [["sigmoid"], None, {"exact": 1}, 1, np.array(["loss", "margin"]), b"exact"], ids=str)
@pytest.mark.parametrize("name", ["loss_type", "probe", "direction", "anchor"])
def test_what_is_no_text_is_no_choice(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*'\w+'.*, got "):
        gapo.GAPOConfig(**{name: value})
    if name == "loss_type":
        gap = np.array([0.1])
        with pytest.raises(ValueError, match="loss_type must be one of"):
            gapo.weights(gap, loss_type=value)
        with pytest.raises(ValueError, match="reduction must be one of"):
            gapo.loss(gap, gap, gap, gap, reduction=value)
        with pytest.raises(ValueError, match="objective must be one of"):
            find(value)
        if value is not None:
            with pytest.raises(ValueError, match="backend must be one of"):
                gapo.weights(gap, backend=value)


@dataclasses.dataclass
class OfAnAdapter:
    """As `gapo.adapters.hf.GAPOConfig` is to the core."""

    rho: float = 0.5
    objective: str = "gapo"
    objective_settings: Any = None

    def step_config(self) -> gapo.GAPOConfig:
        return gapo.GAPOConfig(rho=self.rho)


def test_the_settings_of_an_adapter_are_taken_by_their_step_config() -> None:
    assert step_settings(None) == gapo.GAPOConfig()
    assert step_settings(gapo.GAPOConfig(rho=0.1)).rho == 0.1
    assert step_settings(OfAnAdapter()) == gapo.GAPOConfig(rho=0.5)
    result, _ = gapo.value_and_grad(lambda p, x: x @ p["w"], OfAnAdapter(), backend="numpy")(  # type: ignore[arg-type]
        {"w": np.array([1.0, 2.0])}, np.eye(2)
    )
    assert float(result.radius) == pytest.approx(0.5)
    other = OfAnAdapter(objective="dpo", objective_settings={"beta": 0.2})
    assert step_settings(other, "dpo", {"beta": 0.2}).rho == 0.5
    with pytest.raises(ValueError, match=r"config has objective='dpo', .* objective here is 'gapo'"):
        step_settings(other)
    with pytest.raises(ValueError, match=r"config has objective_settings=\{'beta': 0.2\}"):
        step_settings(other, "dpo")
    for wrong, name in (
        ({}, "dict"),
        (0.1, "float"),
        (OfAnAdapter, rf"the class {OfAnAdapter.__module__}.OfAnAdapter itself"),
        (types.SimpleNamespace(rho=1), "types.SimpleNamespace"),
    ):
        with pytest.raises(TypeError, match=f"config must be a gapo.GAPOConfig, got {name}"):
            step_settings(wrong)


def test_the_defaults_are_the_documents() -> None:
    assert dataclasses.asdict(gapo.GAPOConfig()) == {
        "beta": 2.5,
        "gamma": 0.25,
        "rho": 0.025,
        "target_gap": None,
        "adaptive": True,
        "probe": "loss",
        "direction": "pessimistic",
        "anchor": "auto",
        "perturb": "backbone",
        "last_layers": None,
        "update": "policy",
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


def test_every_setting_carries_its_help_and_its_choices() -> None:
    fields = {field.name: field for field in dataclasses.fields(gapo.GAPOConfig)}
    for name, field in fields.items():
        assert len(field.metadata["help"].split()) >= 3, name
        for choice in field.metadata.get("choices", []):
            assert getattr(gapo.GAPOConfig(**{name: choice}), name) == choice
    assert fields["rho"].metadata["help"].startswith("radius of the perturbation")
    assert fields["anchor"].metadata["help"].endswith("the gaps are 0.")  # of four lines
    assert fields["probe"].metadata["choices"] == ["loss", "margin"]
