"""Draw the pictures of the start page, idea-gap.svg and idea-weight.svg: pairs of a toy model, their gaps and weights.

python docs/images/idea.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

import gapo
from gapo import geometry
from gapo.runs.output import plots

CONFIG = gapo.GAPOConfig(rho=0.9, adaptive=False, probe="margin", perturb="all")
THETA = np.array([0.5, 0.4])
PAIRS = np.array([[1.9, 1.1], [1.1, 0.3], [0.8, 0.6], [0.9, -0.5], [0.1, 0.4]])
NAMES = {0: ("brittle pair", plots.ORANGE), 4: ("robust pair", plots.BLUE)}


def margins(params: dict[str, np.ndarray], pairs: np.ndarray) -> np.ndarray:
    """Margins (N,) of a saturating toy model with two weights."""
    x = pairs @ params["theta"]
    return np.tanh(x) + 0.25 * x


def save(name: str, title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None]) -> None:
    """Write one picture, in a grey that reads on light and on dark."""
    svg = plots.figure(title, xlabel, ylabel, draw).replace("currentColor", "#777777")
    Path(__file__).with_name(name).write_text(svg, encoding="utf-8")


def main() -> None:
    """Take one step, draw what it measured."""
    result, _ = gapo.value_and_grad(margins, CONFIG, backend="numpy")({"theta": THETA}, PAIRS)
    slopes = (1 - np.tanh(PAIRS @ THETA) ** 2 + 0.25)[:, None] * PAIRS
    probe = -slopes.mean(0)
    delta = geometry.delta(THETA, probe, geometry.step_size(CONFIG.rho, np.linalg.norm(probe), xp), adaptive=False)
    np.testing.assert_allclose(margins({"theta": THETA + delta}, PAIRS), result.anchor_margins, atol=1e-6)

    def gaps(axes: Any) -> None:
        along = np.linspace(0, 1.1, 60)
        lines = np.array([margins({"theta": THETA + t * delta}, PAIRS) for t in along]).T
        for i, (line, end) in enumerate(zip(lines, result.anchor_margins, strict=True)):
            name, colour = NAMES.get(i, (None, "#888888"))
            axes.plot(along, line, color=colour, linewidth=2 if name else 1, label=name)
            axes.plot([0, 1], [line[0], end], "o", color=colour, markersize=5)
            if name:
                arrow = {"arrowstyle": "<->", "color": colour}
                axes.annotate("", (1, end), (1, line[0]), arrowprops=arrow)
                axes.text(0.98, (line[0] + end) / 2, "gap", color=colour, ha="right", va="center")
                axes.plot([0, 1], [line[0], line[0]], ":", color=colour, linewidth=1)
        axes.set_xticks([0, 1], ["policy", "anchor"])

    def weights(axes: Any) -> None:
        grid = np.linspace(-0.1, 1.1 * float(result.anchor_gaps.max()), 100)
        axes.plot(grid, gapo.weights(grid), color="#888888", linewidth=1)
        for i, (gap, weight) in enumerate(zip(result.anchor_gaps, result.weights, strict=True)):
            name, colour = NAMES.get(i, (None, "#888888"))
            axes.plot([gap], [weight], "o", color=colour, markersize=8 if name else 5, label=name)
        axes.set_ylim(0)

    save("idea-gap.svg", "Margins on the way to the anchor", "", "margin, nats per token", gaps)
    save("idea-weight.svg", "What the gap makes of the update", "anchor gap", "weight of the pair", weights)


if __name__ == "__main__":
    main()
