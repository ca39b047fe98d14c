"""What figures and tables call an arm."""

from __future__ import annotations

from gapo.study.arms import parts_of

_OBJECTIVES = {
    "gapo": "GAPO", "gapo_simpo": "SimPO + GAPO", "gapo_capped": "GAPO, capped", "gapo_target": "SimPO, target by gap",
    "margin_target": "SimPO, target by margin", "simpo": "SimPO", "amapo": "AMaPO", "dpo": "DPO", "cdpo": "cDPO",
    "rdpo": "rDPO", "dr_dpo": "Dr.DPO", "ipo": "IPO", "ropo": "ROPO", "hypo": "HyPO", "rpo": "RPO",
    "sigmoid_loss": "sigmoid", "simper": "SimPER", "alpha_dpo": "alpha-DPO", "sigmoid_norm": "DPO per token",
    "r_dpo": "R-DPO", "cal_dpo": "Cal-DPO", "re_po": "RE-PO", "gapo_re_po": "RE-PO with gap", "beta_dpo": "beta-DPO",
    "discopop": "DiscoPOP", "exo_pair": "EXO", "nca_pair": "NCA", "bco_pair": "BCO", "sppo_hard": "SPPO",
    "apo_zero": "APO-zero", "apo_down": "APO-down", "aot": "AOT", "aot_unpaired": "AOT, unpaired",
}  # fmt: skip
_WEIGHTED = {
    "gapo": "{}, weighted by gap", "gapo-drop": "{}, largest gaps dropped", "margin": "{}, weighted by margin",
    "margin-drop": "{}, lowest margins dropped",
}  # fmt: skip
_VARIANTS = {
    "rho0": "rho 0", "margin": "margin probe", "l2": "L2", "first-order": "first order",
    "sam": "updated at the anchor", "sam-gaussian": "updated at a gaussian anchor",
}  # fmt: skip


def shown(name: str) -> str:
    """What figures and tables call the arm `name`; another name than an arm's stands for itself.

    >>> shown("gapo+dpo-gaussian"), shown("dpo-sam"), shown("ramp")
    ('DPO, weighted by gap, gaussian', 'DPO, updated at the anchor', 'ramp')
    """
    weighting, base, variant = parts_of(name)
    text = _OBJECTIVES.get(base, base)
    if weighting:
        text = _WEIGHTED.get(weighting, f"{weighting}+{{}}").format(text)
    return f"{text}, {_VARIANTS.get(variant, variant)}" if variant else text
