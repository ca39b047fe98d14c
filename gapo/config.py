"""`GAPOConfig`: the settings of one GAPO step, checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gapo._fields import choice, choices_of, described
from gapo.mask import Mask, as_mask
from gapo.objective import LOSS_TYPES, check_objective, require_number

OF_THE_UPDATE = ("sft_weight", "update")  # fields that change no gap and no weight


@dataclass(frozen=True, kw_only=True)
@described
class GAPOConfig:
    """Settings of the step; the defaults are the authors' recipe for Mistral-7B-Instruct.

    Attributes:
        beta: logistic temperature, > 0.
        gamma: target gap times beta, the papers' gamma. SimPO's code takes `gamma / beta`.
        rho: radius of the perturbation, >= 0. At 0 every gap is 0 and all weights are equal.
        target_gap: in place of rho, > 0: each batch's radius is the one at which its gaps spread by so many nats per
            token (RMS about their mean, over the pairs of all ranks). None for rho.
        adaptive: True for the ASAM geometry, `rho * theta^2 * g / ||abs(theta) * g||`; False for the L2 ball,
            `rho * g / ||g||`.
        probe: "loss" takes g from the SimPO loss (the authors' code), "margin" from the mean margin (paper v3).
        direction: "pessimistic" moves along g, "gaussian" along a standard normal draw, the paper's control.
        anchor: "exact" runs a forward at theta + delta; "first_order" takes `-<grad M_i, delta>`, which rounds
            nothing. "auto" takes first order where the weights that move, or the forward's compute, have 16 bits (or
            TF32), and exact elsewhere; GAPO logs the choice once. At rho 0 it takes neither: the gaps are 0.
        perturb: the parameters that move: "backbone" (all but the output head), "all", or a regular expression that is
            searched in parameter names. In Python also a mapping from names or such expressions to arrays of 0 and 1,
            broadcastable to the parameter, whose ones move (`gapo.mask.Mask`).
        last_layers: moves only the parameters of the last k layers, as far as `perturb` selects them.
        update: "policy" takes the gradient of the loss at theta. "anchor" takes it at theta + delta and applies it to
            theta, as SAM does: one forward with a gradient there. Each log-probability that the loss reads is then the
            anchor's; the gap stays the policy's margin minus the anchor's. It needs an exact anchor.
        loss_type: shape of the loss, "sigmoid" or "hinge".
        label_smoothing: chance that a label is wrong, in [0, 0.5).
        sft_weight: >= 0; adds `sft_weight * mean_i(-logp(chosen_i))`, nats per token. It needs a `margin_fn` that
            returns (chosen_logps, rejected_logps).

    Raises:
        ValueError: a value is out of its range. The message names the argument, the value and what is accepted.

    >>> GAPOConfig(rho=0.05).anchor
    'auto'
    >>> GAPOConfig(probe="gap")
    Traceback (most recent call last):
    ValueError: probe must be 'loss' or 'margin', got 'gap'
    """

    beta: float = 2.5
    gamma: float = 0.25
    rho: float = 0.025
    target_gap: float | None = None
    adaptive: bool = True
    probe: str = choice("loss", "margin")
    direction: str = choice("pessimistic", "gaussian")
    anchor: str = choice("auto", "exact", "first_order")
    perturb: str | Mapping[str, Any] = "backbone"
    last_layers: int | None = None
    update: str = choice("policy", "anchor")
    loss_type: str = choice(*LOSS_TYPES)
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma, "", lambda v: True)
        check_objective(self.beta, self.gamma, self.loss_type, self.label_smoothing)
        require_number("rho", self.rho, ">= 0", lambda v: v >= 0)
        if self.target_gap is not None:
            require_number("target_gap", self.target_gap, "> 0", lambda v: v > 0)
            if self.rho != GAPOConfig.rho:
                raise ValueError(
                    f"target_gap={self.target_gap!r} sets the radius itself, and rho={self.rho!r} was given too: "
                    "give one of them"
                )
        require_number("sft_weight", self.sft_weight, ">= 0", lambda v: v >= 0)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {self.adaptive!r}")
        for name, choices in choices_of(GAPOConfig).items():
            value: Any = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        if self.update == "anchor" and self.anchor == "first_order":
            raise ValueError(
                "update='anchor' takes a gradient at theta + delta, which anchor='first_order' never forms: set "
                "anchor='exact' or 'auto', or update='policy'"
            )
        if self.last_layers is not None and (
            isinstance(self.last_layers, bool) or not isinstance(self.last_layers, int) or self.last_layers < 1
        ):
            raise ValueError(f"last_layers must be a whole number >= 1, or None, got {self.last_layers!r}")
        object.__setattr__(self, "perturb", as_mask(self.perturb))
        if not isinstance(self.perturb, Mask):
            _check_pattern(self.perturb)

    @property
    def moves(self) -> bool:
        """Whether there is a radius other than 0, set or to be found."""
        return self.target_gap is not None or self.rho > 0

    @property
    def updates_at_anchor(self) -> bool:
        """Whether the update's gradient is taken at moved weights. With a radius of 0 it is that of the policy."""
        return self.update == "anchor" and self.moves


def plain(config: GAPOConfig) -> dict[str, Any]:
    """Every field by name, as JSON can hold it: a mask as its description."""
    return {name: repr(x) if isinstance(x, Mask) else x for name, x in asdict(config).items()}


def _check_pattern(perturb: Any) -> None:
    accepted = "perturb must be 'backbone', 'all', a regular expression, or masks by name"
    if not isinstance(perturb, str) or not perturb:
        raise ValueError(f"{accepted}, got {perturb!r}")
    try:
        re.compile(perturb)
    except re.error as error:
        raise ValueError(f"{accepted}, got {perturb!r}: {error}") from None


def step_settings(config: Any, objective: Any = "gapo", objective_settings: Any = None, **options: Any) -> GAPOConfig:
    """The settings of the step in what a caller handed over as `config`: one place for all that take one.

    Args:
        config: a `GAPOConfig`; None for the defaults; or an adapter's configuration, by its `step_config()`.
        objective, objective_settings: what the caller was given beside it. An adapter's configuration that has others
            is refused, since they would be ignored.
        options: likewise `ld_alpha` and `use_weighting`, where the caller has them.

    Raises:
        TypeError: it is none of these.
        ValueError: it names another objective, or has other settings or options for it.
    """
    if config is None:
        return GAPOConfig()
    if isinstance(config, GAPOConfig):
        return config
    if isinstance(config, type) or not callable(getattr(config, "step_config", None)):
        raise TypeError(f"config must be a gapo.GAPOConfig, got {named(config)}")
    beside_it = {"objective": objective, "objective_settings": objective_settings}
    for name, beside in {**beside_it, "ld_alpha": None, "use_weighting": False, **options}.items():
        own = getattr(config, name, beside)
        if own is not None and own != beside:
            raise ValueError(
                f"config has {name}={own!r}, and {name} here is {beside!r}. Only the settings of the step are taken "
                f"from config: give {name} beside it where that is accepted, or set it to {beside!r} in config"
            )
    settings: GAPOConfig = config.step_config()
    return settings


def named(x: object) -> str:
    """What `x` is, for a message: its type, with the module where that is not Python's own."""
    if isinstance(x, type):
        return f"the class {x.__module__}.{x.__qualname__} itself"
    kind = type(x)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
