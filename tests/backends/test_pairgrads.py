"""The tape by itself: every group's gradient against a backward of its own, and what it refuses.

Expected gradients come from autograd, one backward for each group or row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gapo.backends.torch.pairgrads as package
from gapo.backends.torch.pairgrads import Explicit, Refused, Tape, Verdicts, register_rule
from gapo.backends.torch.pairgrads import tape as tape_module
from gapo.backends.torch.pairgrads.agreement import compared

WIDTH, TOKENS = 6, 5


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def losses(module: nn.Module, x: Tensor, groups: int) -> Tensor:
    """A number for each group: of all its rows."""
    y = module(x)
    return y.reshape(-1, groups, *y.shape[1:]).pow(2).flatten(2).sum((0, 2))


def by_group(module: nn.Module, outputs: Tensor) -> list[dict[str, Tensor]]:
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(y, list(named.values()), retain_graph=True, materialize_grads=True) for y in outputs]
    return [dict(zip(named, row, strict=True)) for row in rows]


def assert_right(module: nn.Module, x: Tensor, groups: int, **options: Any) -> None:
    module, x = module.double(), x.double() if x.is_floating_point() else x
    expected = by_group(module, losses(module, x, groups))
    with Tape(module, groups, **options) as tape:
        outputs = losses(module, x, groups)
    grads = tape.backward(outputs)
    weights = torch.linspace(-1, 2, groups).double()
    delta = {name: torch.randn_like(p) for name, p in module.named_parameters() if p.requires_grad}
    for name, total in grads.weighted(weights).items():
        torch.testing.assert_close(total, sum(w * row[name] for w, row in zip(weights, expected, strict=True)))
    along = torch.stack([sum((row[name] * delta[name]).sum() for name in delta) for row in expected])
    torch.testing.assert_close(grads.along(delta), along)
    assert not any(m._forward_hooks for m in module.modules())


def refusal(module: nn.Module, x: Tensor, groups: int, **options: Any) -> str:
    with pytest.raises(Refused) as caught:  # noqa: PT012  (`with` may refuse, and so may the backward)
        with Tape(module, groups, **options) as tape:
            outputs = losses(module, x, groups)
        tape.backward(outputs)
    return str(caught.value)


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), *middle, nn.Linear(WIDTH, 3))


def rows(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (TOKENS, WIDTH)))


def test_rows_without_tokens_and_groups_of_many_rows() -> None:
    assert_right(net(nn.LayerNorm(WIDTH)), rows(4, WIDTH), 4)
    assert_right(net(nn.LayerNorm(WIDTH)), rows(12, WIDTH), 4, blocks=3)
    assert_right(net(nn.LayerNorm(WIDTH)), rows(12), 4, blocks=3)
    assert "its first axis is not the rows of 5 groups" in refusal(net(), rows(10), 5)  # two rows each, and not said


class Scale(nn.Module):
    """A layer of a type that no rule knows."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Gate(Scale):
    def forward(self, x: Tensor, *, by: Tensor, times: float) -> Tensor:
        return x * torch.sigmoid(by * self.scale) * times


class Gated(nn.Module):
    """Calls a layer with two tensors of rows, one by keyword, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gate(x, by=x.cumsum(-1), times=2.0)
        return y


class Router(nn.Module):
    """Several outputs, one without gradient; takes tokens of all rows in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = torch.softmax(x @ self.table.T, -1)
        return scores, {"best": scores.argmax(-1), "sum": (x @ self.table.T).exp()}


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()

    def forward(self, x: Tensor) -> Tensor:
        scores, others = self.router(x.flatten(0, 1))
        factor = scores[:, :1] + others["sum"].sum(-1, keepdim=True) + others["best"][:, None]
        return x * factor.unflatten(0, x.shape[:2])


class Wide(nn.Module):
    """Its gradients for all groups would be more numbers than its inputs and outputs: they are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(90, WIDTH)), nn.Parameter(torch.randn(WIDTH, 90))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up.T) @ self.down.T


class Attention(nn.Module):
    """`nn.MultiheadAttention` uses the weight of its output's layer itself, not through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


class Told(nn.Module):
    """Its layer reads an attribute that the model sets before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Told.Layer()

    class Layer(Scale):
        shift: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.scale + self.shift)

    def forward(self, x: Tensor) -> Tensor:
        for shift in (1.0, 2.0):
            self.layer.shift = shift
            x = self.layer(x)
        return x


@pytest.mark.parametrize("layer", [Scale, Gated, Routed, Wide, Attention, Told], ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_layer_without_a_rule_runs_again(layer: Callable[[], nn.Module], blocks: int) -> None:
    assert_right(net(layer()), rows(3 * blocks), 3, blocks=blocks)


def test_gradients_of_a_large_layer_are_not_kept() -> None:
    module = net(Wide())
    with Tape(module, 3) as tape:
        outputs = losses(module, rows(3), 3)
    parts = tape.backward(outputs).parts
    assert isinstance(parts["0.bias"][0][1], Explicit)
    assert not isinstance(parts["2.up"][0][1], Explicit)


class Neighbours(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + 0.5 * x.roll(1, 0)


class Centred(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * x.detach().mean()


class Random(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * self.scale, 0.5, training=True)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Neighbours(), "gives something else when it runs again"),
        (Centred(), "gives something else when it runs again"),
        (Random(), "gives something else when it runs again"),
    ],
    ids=["rows mixed", "a mean over rows", "random"],
)
def test_what_cannot_run_again_is_refused(layer: nn.Module, reason: str) -> None:
    assert reason in refusal(net(layer), rows(3), 3)


def test_a_layer_that_mixes_rows_later_is_refused_then() -> None:
    class Late(Scale):
        mixes = False

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + (x.roll(1, 0) if self.mixes else 0)

    module, verdicts = net(Late()).double(), Verdicts()
    x = rows(3).double()
    assert_right(module, x, 3, verdicts=verdicts)
    module[2].mixes = True
    assert "gives something else when it runs again" in refusal(module, x, 3, verdicts=verdicts)


def test_a_rerun_leaves_random_numbers_and_buffers_alone() -> None:
    class Counts(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.scale

    module, x = net(Counts()), rows(3)
    with Tape(module, 3) as tape:
        outputs = losses(module, x, 3)
    before = torch.get_rng_state()
    tape.backward(outputs)
    assert float(module[2].calls) == 1
    assert torch.equal(torch.get_rng_state(), before)


# Rules of one's own.


def square(layer: Any, a: Tensor, g: Tensor) -> Any:
    yield "scale", Explicit((2 * layer.scale * a * g).sum((0, 2)))


class Square(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale**2


def test_a_registered_rule_is_used_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    register_rule(Square, lambda *args: called.append(1) or square(*args))
    assert_right(net(Square()), rows(6), 3, blocks=2)
    assert called
    register_rule(Square, lambda layer, a, g: [("scale", Explicit((layer.scale * a * g).sum((0, 2))))])
    assert re.search("its gradient.* differs? from autograd's", refusal(net(Square()), rows(6), 3, blocks=2))


def test_a_rule_of_several_inputs_that_is_asked_first() -> None:
    class Shift(nn.Module):
        def __init__(self, sign: float = 1.0) -> None:
            super().__init__()
            self.table, self.sign = nn.Parameter(torch.randn(4, WIDTH)), sign

        def forward(self, x: Tensor, *, places: Tensor) -> Tensor:
            return x + self.sign * self.table[places]

    class Shifted(nn.Module):
        def __init__(self, sign: float = 1.0) -> None:
            super().__init__()
            self.shift = Shift(sign)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.shift(x, places=torch.arange(TOKENS).expand(len(x), -1) % 4)
            return y

    asked, used = [], []

    def confirms(layer: Any, places: Tensor, output: Tensor) -> bool:
        asked.append(layer.sign)
        return layer.sign > 0

    def shift(layer: Any, places: Tensor, g: Tensor) -> Any:
        used.append(tuple(places.shape))
        ids = places.unflatten(0, g.shape[:2])
        yield "table", package.Lookup(ids, g, layer.table.shape)

    register_rule(Shift, shift, reads=lambda layer, args, kwargs: kwargs["places"], confirms=confirms)
    verdicts = Verdicts()
    module = net(Shifted())
    for _ in range(2):
        assert_right(module, rows(6), 3, blocks=2, verdicts=verdicts)
    assert asked == [1.0]
    assert set(used) == {(6, TOKENS)}
    used.clear()
    assert_right(net(Shifted(-1.0)), rows(6), 3, blocks=2)  # not what the rule is for: it runs again
    assert used == []


def test_a_patched_class_has_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kind(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    register_rule(Kind, lambda *_: pytest.fail("the rule is for another forward"))
    monkeypatch.setattr(Kind, "forward", lambda self, x: torch.tanh(x * self.scale))
    assert_right(net(Kind()), rows(3), 3)


# Weights by row.


@pytest.mark.parametrize("forwards", ["all rows", "a block each", "two layers of one block each"])
def test_weights_for_each_row(forwards: str) -> None:
    module, x = net(Scale(), Wide(), nn.LayerNorm(WIDTH)).double(), rows(6).double()

    def outputs_of(module: nn.Module) -> tuple[Tensor, Tensor]:
        if forwards == "all rows":
            y = module(x).chunk(2)
        else:
            y = tuple(module(part) for part in x.chunk(2))
            if forwards.startswith("two"):
                y = tuple(z + module(part.flip(1)) for z, part in zip(y, x.chunk(2), strict=True))
        return tuple(z.pow(2).sum((1, 2)) for z in y)  # type: ignore[return-value]

    if forwards.startswith("two"):  # calls in the order first, second, first, second: not block by block
        with Tape(module, 3, blocks=2, by_row=True) as tape:
            outputs = outputs_of(module)
        with pytest.raises(Refused, match=r"differ|order"):
            tape.backward(outputs)
        return
    seeds = [torch.ones(3).double(), -torch.ones(3).double()]
    weights = torch.randn(2, 3).double()
    expected = by_group(module, torch.cat(outputs_of(module)))
    signed = torch.cat([weights[0], -weights[1]])
    with Tape(module, 3, blocks=2, by_row=True) as tape:
        outputs = outputs_of(module)
    grads = tape.backward(outputs, seeds)
    for name, total in grads.weighted(weights).items():
        torch.testing.assert_close(total, sum(w * row[name] for w, row in zip(signed, expected, strict=True)))
    delta = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    along = torch.stack([sum((row[name] * delta[name]).sum() for name in delta) for row in expected])
    torch.testing.assert_close(grads.along(delta), along[:3] - along[3:])
    alike = grads.weighted(weights[0])
    for name, total in grads.weighted(weights[:1].expand(2, -1)).items():
        torch.testing.assert_close(alike[name], total)


def test_weights_for_each_row_must_be_asked_for() -> None:
    module = net()
    with Tape(module, 3, blocks=2) as tape:
        outputs = losses(module, rows(6), 3)
    grads = tape.backward(outputs)
    with pytest.raises(ValueError, match=r"weights must have the shape \(3,\), got \(2, 3\).*by_row=True"):
        grads.weighted(torch.ones(2, 3))


# What is proved lives with who proved it.


def test_verdicts_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = []
    monkeypatch.setattr(tape_module, "compared", lambda *a, **k: comparisons.append(1) or compared(*a, **k))
    module, x, verdicts = net().double(), rows(3).double(), Verdicts()
    for _ in range(2):
        assert_right(module, x, 3, verdicts=verdicts)
    assert len(comparisons) == 1
    for _ in range(2):
        assert_right(module, x, 3)
    assert len(comparisons) == 3


def test_the_package_stands_alone() -> None:
    """It names nothing of what it was written for, and imports nothing but itself and what all engines share."""
    folder = Path(package.__file__).parent
    shared = folder.parents[1] / "pairgrads"
    for path in [*folder.rglob("*.py"), *folder.rglob("*.md"), *shared.rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        words = re.sub(r"\bgapo\.backends\.(torch\.)?pairgrads", "", text)
        assert not re.search(r"\b(anchor|chosen|rejected|margin|GAPO)", words, re.IGNORECASE), path
        imports = re.findall(r"^from (gapo[\w.]*)", text, re.MULTILINE)
        assert all(re.match(r"gapo\.backends\.(torch\.)?pairgrads\b", name) for name in imports), path
