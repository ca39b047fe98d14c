"""What the one-pass step, the second pullback and the cut rest on is asked, and what was found does not outlive it.

Expected numbers come from `by_hand`: each pair alone, in float64, straight from the method document.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor, nn

import gapo
from gapo.backends.base import by_pairs
from gapo.backends.torch import TorchBackend
from gapo.backends.torch.pairgrads import tape
from gapo.backends.torch.pairgrads.agreement import compared
from gapo.backends.torch.pairgrads.verdicts import identity

VOCAB, WIDTH = 20, 8
Pairs = Sequence[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A causal model: an embedding, what the test puts in the middle, and a head."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(middle)
        self.lm_head = nn.Linear(WIDTH, VOCAB)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.middle:
            x = layer(x)
        return self.lm_head(torch.tanh(x).cumsum(1))


def ids_of(pairs: int, seed: int = 0, seq: int = 6) -> Tensor:
    return torch.randint(1, VOCAB, (2 * pairs, seq), generator=torch.Generator().manual_seed(seed))


def stacked(model: Any, ids: Tensor) -> Any:
    """Chosen rows, then rejected ones."""
    return gapo.sequence_logps(model(ids), ids).chunk(2)


def halves(ids: Tensor) -> Pairs:
    n = len(ids) // 2
    return [(ids[i : i + 1], ids[n + i : n + i + 1]) for i in range(n)]


def alternate(ids: Tensor) -> Pairs:
    return [(ids[i : i + 1], ids[i + 1 : i + 2]) for i in range(0, len(ids), 2)]


def by_hand(model: nn.Module, pairs: Pairs, rho: float = 0.3, anchor: str = "exact", sft: float = 0.0) -> Any:
    """(anchor gaps, gradients): beta 2.5, gamma 0.25, adaptive, over all parameters but the head's."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def logp(policy: Any, row: Tensor) -> Tensor:
        steps = policy(row)[0, :-1].log_softmax(-1)
        return torch.stack([steps[t, row[0, t + 1]] for t in range(len(steps))]).mean()

    def margins(policy: Any) -> list[Tensor]:
        return [logp(policy, chosen) - logp(policy, rejected) for chosen, rejected in pairs]

    clean = margins(model)
    chosen = torch.stack([logp(model, c) for c, _ in pairs]).mean() if sft else torch.zeros(())
    moved = {name: p for name, p in named.items() if not name.startswith("lm_head")}
    probe = -torch.stack([nn.functional.logsigmoid(2.5 * m - 0.25) for m in clean]).mean()
    g = torch.autograd.grad(probe, list(moved.values()), retain_graph=True)
    norm = torch.cat([(p * d).ravel() for p, d in zip(moved.values(), g, strict=True)]).norm()
    delta = {name: rho * p.detach() ** 2 * d / norm for (name, p), d in zip(moved.items(), g, strict=True)}
    per_pair = [torch.autograd.grad(m, list(named.values()), retain_graph=True, materialize_grads=True) for m in clean]
    if anchor == "exact":
        with torch.no_grad():
            there = {name: p + delta.get(name, 0) for name, p in named.items()}
            at = functools.partial(torch.func.functional_call, model, there)
            gaps = torch.stack(clean) - torch.stack(margins(at))
    else:
        gaps = torch.stack(
            [
                -sum((d * delta[name]).sum() for name, d in zip(named, grads, strict=True) if name in delta)
                for grads in per_pair
            ]
        )
    weights = 2.5 * torch.sigmoid(0.25 - 2.5 * gaps.detach()) / len(pairs)
    update = [-sum(w * grads[k] for w, grads in zip(weights, per_pair, strict=True)) for k in range(len(named))]
    if sft:
        likelihood = torch.autograd.grad(-sft * chosen, list(named.values()), materialize_grads=True)
        update = [u + d for u, d in zip(update, likelihood, strict=True)]
    return gaps.detach(), dict(zip(named, update, strict=True))


def assert_by_hand(found: Any, expected: Any, tol: float = 1e-9) -> None:
    (result, grads), (gaps, others) = found, expected
    torch.testing.assert_close(result.anchor_gaps, gaps, rtol=tol, atol=tol)
    for name, g in others.items():
        torch.testing.assert_close(grads[name], g, rtol=tol, atol=tol)


def take(fn: Any, model: nn.Module, batch: Any, **options: Any) -> Any:
    """A step of whoever takes all steps of the test: what earlier ones found out, this one knows."""
    config = gapo.GAPOConfig(**{"rho": 0.3, **options})
    forward = BACKENDS[-1].forward(fn, model, batch, config)
    result, cotangents = gapo.step.run(forward, config, BACKENDS[-1])
    return result, forward.pullback(cotangents)


BACKENDS: list[TorchBackend] = []


@pytest.fixture(autouse=True)
def _a_backend_for_each_test() -> None:
    BACKENDS[:] = [TorchBackend()]


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """What each comparison with autograd's gradients found."""
    found: list[bool | None] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = compared(*args, **kwargs)
        found.append(answer[0])
        return answer

    monkeypatch.setattr(tape, "compared", spy)
    return found


# Margin functions: a verdict on one is none on another.


def in_order(rows: str) -> Callable[..., Any]:
    """A closure: one code for both orders of rows."""

    def fn(model: Any, ids: Tensor) -> Any:
        if rows == "stacked":
            return stacked(model, ids)
        logps = gapo.sequence_logps(model(ids), ids)
        return logps[0::2], logps[1::2]

    return fn


class Margins:
    def __init__(self, rows: str) -> None:
        self.rows = rows

    def method(self, model: Any, ids: Tensor) -> Any:
        return in_order(self.rows)(model, ids)

    __call__ = method


def with_default(rows: str) -> Callable[..., Any]:
    def fn(model: Any, ids: Tensor, rows: str = rows) -> Any:
        return in_order(rows)(model, ids)

    return fn


def flagged(model: Any, ids: Tensor) -> Any:
    return in_order(FLAG)(model, ids)


FLAG = "stacked"


def global_flag(rows: str) -> Callable[..., Any]:
    global FLAG
    FLAG = rows
    return flagged


MAKERS = {
    "closure": in_order,
    "bound method": lambda rows: Margins(rows).method,
    "callable object": Margins,
    "partial": lambda rows: functools.partial(lambda model, ids, rows: in_order(rows)(model, ids), rows=rows),
    "default argument": with_default,
    "global variable": global_flag,
    "declared": lambda rows: by_pairs(in_order(rows)),
}


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_a_verdict_on_one_margin_function_is_none_on_another(make: Any, anchor: str) -> None:
    model, ids = Net(), ids_of(4)
    for rows, pairs in (("stacked", halves), ("interleaved", alternate), ("stacked", halves)):
        assert_by_hand(take(make(rows), model, ids, anchor=anchor), by_hand(model, pairs(ids), anchor=anchor))


@pytest.mark.parametrize("make", [maker for name, maker in MAKERS.items() if name != "global variable"])
def test_a_function_made_anew_each_step_is_compared_once(make: Any, comparisons: list[bool | None]) -> None:
    model = Net()
    for step in range(4):
        take(make("stacked"), model, ids_of(3, seed=step))
    assert comparisons == [True]


def test_what_is_never_the_same_is_compared_each_time_and_not_gathered(comparisons: list[bool | None]) -> None:
    model = Net()
    for _ in range(40):
        order = torch.arange(4)
        take(lambda model, ids, order=order: stacked(model, ids[order]), model, ids_of(2))
    assert comparisons == [True] * 40
    answers = BACKENDS[-1]._verdicts._answers[model]
    assert {"proved", "lasts"} & set(answers)
    assert all(len(kept) <= 16 for kept in answers.values())


def test_an_objects_place_is_not_the_object() -> None:
    class Thing:
        pass

    thing = Thing()
    before = identity(thing)
    assert before == identity(thing)
    del thing
    assert all(before != identity(Thing()) for _ in range(100))


def test_one_pair_proves_nothing_about_the_order_of_more() -> None:
    model, ids, fn = Net(), ids_of(4), in_order("interleaved")
    assert_by_hand(take(fn, model, ids[:2]), by_hand(model, alternate(ids[:2])))
    assert_by_hand(take(fn, model, ids), by_hand(model, alternate(ids)))


@pytest.mark.parametrize("own", [False, True], ids=["sequence_logps", "own log-softmax"])
def test_rows_that_happen_to_be_in_order_prove_nothing_of_the_next(own: bool) -> None:
    def by_length(model: Any, ids: Tensor) -> Tensor:
        """Rows sorted by their padding in front of the model, as packing does; put back wrongly would be a bug."""
        order = (ids != 0).sum(1).argsort(descending=True, stable=True)
        if own:
            steps = model(ids[order])[:, :-1].log_softmax(-1)
            logps = steps.gather(-1, ids[order][:, 1:, None])[..., 0].mean(1)
        else:
            logps = gapo.sequence_logps(model(ids[order]), ids[order])
        chosen, rejected = torch.empty_like(logps).index_copy(0, order, logps).chunk(2)
        return chosen - rejected

    model, equal = Net(), ids_of(3)
    unequal = equal.clone()
    for row, zeros in enumerate((3, 0, 1, 2, 4, 0)):
        unequal[row, 6 - zeros :] = 0
    for ids in (equal, unequal, equal):
        assert_by_hand(take(by_length, model, ids), by_hand(model, halves(ids)))


def test_margins_that_depend_on_each_other() -> None:
    """Normalised over the batch: no pair has a gradient of its own."""

    def centred(model: Any, ids: Tensor) -> Tensor:
        chosen, rejected = stacked(model, ids)
        margins: Tensor = chosen - rejected
        return margins - margins.mean() * scale

    model, ids = Net(), ids_of(3)
    for scale in (0.0, 0.9):  # noqa: B007  (`centred` reads it)
        one, two = (
            gapo.value_and_grad(centred, backend="torch", one_pass=one_pass)(model, ids) for one_pass in (True, False)
        )
        torch.testing.assert_close(one[1], two[1], rtol=1e-9, atol=1e-9)


# Gradients are compared parameter by parameter.


def test_a_small_parameter_that_is_wrong_is_named() -> None:
    expected = {"large": torch.ones(100), "small": torch.full((2,), 1e-2), "nothing": torch.zeros(2)}
    found = {**expected, "small": expected["small"] * 1.07}
    assert compared(expected.__getitem__, expected, than="the others", coarse=False) == (True, "")
    same, why = compared(found.__getitem__, expected, than="the others", coarse=False)
    assert (same, why) == (False, "its gradient of 'small' differs from the others by 7.0%")
    assert (
        compared({**found, "small": torch.full((2,), torch.nan)}.__getitem__, expected, than="", coarse=True)[0]
        is False
    )
    zeros = {name: torch.zeros_like(x) for name, x in expected.items()}
    assert compared(zeros.__getitem__, zeros, than="", coarse=False) == (None, "")


# Layers are asked, not believed by their name.


class RMS(nn.Module):
    """A norm whose weight enters as `use` says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], start: float = 0.0) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.linspace(start, start + 0.5, WIDTH)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    return x / (x.pow(2).mean(dim, keepdim=True) + 1e-6).sqrt()


USES = {
    "exp": lambda x, w: unit(x) * w.exp(),
    "sigmoid": lambda x, w: unit(x) * w.sigmoid(),
    "softplus": lambda x, w: unit(x) * nn.functional.softplus(w),
    "squared": lambda x, w: unit(x) * w * w,
    "its norm": lambda x, w: unit(x) * w / w.norm(),
    "mixed channels": lambda x, w: unit(x) * (w + w.roll(1)),
    "before the norm": lambda x, w: unit(x * w),
    "over time": lambda x, w: unit(x, 1) * w,
    "plain": lambda x, w: unit(x) * w,
    "one more": lambda x, w: unit(x) * (1 + w),
}


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_a_norm_is_asked_how_its_weight_enters(use: Any, anchor: str) -> None:
    model, ids = Net(type("MyRMSNorm", (RMS,), {})(use, start=0.3)), ids_of(3)
    for seed in (0, 1):
        ids = ids_of(3, seed)
        assert_by_hand(take(by_pairs(stacked), model, ids, anchor=anchor), by_hand(model, halves(ids), anchor=anchor))


def test_a_norm_of_sixteen_bits_is_asked_in_more() -> None:
    """In bfloat16 a derivative of 0.25 cannot be told from 0.231 by gradients that are compared to 5 %."""
    norm = type("MyRMSNorm", (RMS,), {})(USES["sigmoid"])
    model = Net(norm).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.zero_()
    take(stacked, model, ids_of(3), anchor="first_order")
    assert BACKENDS[-1]._verdicts._answers[norm]["confirmed"].popitem()[1] is False


def step_is_one_pass(fn: Any, model: nn.Module, batch: Any) -> bool:
    config = gapo.GAPOConfig(anchor="first_order")
    forward = BACKENDS[-1].forward(fn, model, batch, config)
    forward.pullback([torch.ones_like(x) for x in forward.outputs], list(forward.parameters))
    return bool(forward.one_pass)


def test_a_class_that_is_patched_after_the_first_step_is_asked_again() -> None:
    kind = type("MyRMSNorm", (RMS,), {})
    model, ids = Net(kind(USES["plain"], start=0.3)), ids_of(3)
    take(stacked, model, ids)
    kind.forward = lambda self, x: unit(x) * self.weight.exp()
    assert_by_hand(take(stacked, model, ids), by_hand(model, halves(ids)))


def patched(model: Net) -> None:
    layer = model.middle[0]
    plain = layer.forward
    layer.forward = lambda x: plain(x) * layer.weight.sum()


def patched_class(model: Net) -> None:
    class Linear(nn.Linear):
        pass

    model.middle[0].__class__ = Linear
    Linear.forward = lambda self, x: nn.functional.linear(x, self.weight * self.weight, self.bias)


def weight_norm(model: Net) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.middle[0])


def spectral_norm(model: Net) -> None:
    nn.utils.parametrizations.spectral_norm(model.middle[0])
    model.eval()  # in training each forward is another function


def old_spectral_norm(model: Net) -> None:
    nn.utils.spectral_norm(model.middle[0])
    for _ in range(20):  # until its power iteration has converged
        model(ids_of(3))
    model.eval()


def prune(model: Net) -> None:
    from torch.nn.utils import prune

    prune.random_unstructured(model.middle[0], "weight", 0.5)


def hooked(model: Net) -> None:
    """Freezes rows of the embedding."""
    rows = torch.ones(VOCAB, 1, dtype=torch.float64)
    rows[:10] = 0
    model.embed.weight.register_hook(lambda g: g * rows)


@pytest.mark.parametrize("change", [patched, patched_class, weight_norm, spectral_norm, old_spectral_norm, prune])
@pytest.mark.parametrize("late", [False, True], ids=["before the first step", "after it"])
def test_layers_that_are_not_what_their_class_is_known_for(change: Any, late: bool) -> None:
    model, ids = Net(nn.Linear(WIDTH, WIDTH)), ids_of(3)
    if late:
        take(stacked, model, ids)
    change(model)
    assert_by_hand(take(stacked, model, ids), by_hand(model, halves(ids)))


@pytest.mark.parametrize("late", [False, True], ids=["before the first step", "after it"])
def test_gradient_hooks_on_parameters_count(late: bool) -> None:
    model, ids = Net(), ids_of(3)
    if late:
        take(by_pairs(stacked), model, ids)
    hooked(model)
    result, grads = take(by_pairs(stacked), model, ids)
    expected = by_hand(model, halves(ids))
    assert_by_hand((result, grads), expected)
    assert float(grads["embed.weight"][:10].abs().max()) == 0
    assert float(grads["embed.weight"][10:].abs().max()) > 0


def test_a_forward_hook_of_all_modules() -> None:
    model, ids = Net(nn.Linear(WIDTH, WIDTH)), ids_of(3)
    take(by_pairs(stacked), model, ids)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, output: output * 1.5 if isinstance(m, nn.Linear) else None
    )
    try:
        assert_by_hand(take(by_pairs(stacked), model, ids), by_hand(model, halves(ids)))
    finally:
        handle.remove()


# Layers that mix rows.


class BatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_in_training_takes_the_slower_way_and_its_statistics_move_once(affine: bool) -> None:
    model, twin = Net(BatchNorm(WIDTH, affine=affine)), Net(BatchNorm(WIDTH, affine=affine))
    ids = ids_of(3)
    for step in range(3):
        _, grads = take(by_pairs(stacked), model, ids, rho=0.3 if step else 0.0)
        twin(ids)  # what one forward makes of the running statistics
        for name, buffer in twin.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
    one = gapo.value_and_grad(stacked, gapo.GAPOConfig(rho=0.3), backend="torch", one_pass=False)(twin, ids)
    torch.testing.assert_close(grads, one[1], rtol=1e-9, atol=1e-9)
    assert_by_hand(take(stacked, model.eval(), ids), by_hand(model, halves(ids)))


class TimeFirst(nn.Module):
    """Turns rows and tokens round in front of a layer, as recurrent models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("seq", [3, 6])
def test_as_many_tokens_as_rows(seq: int) -> None:
    model = Net(TimeFirst())
    for step in range(2):
        ids = ids_of(3, seed=step, seq=seq)
        assert_by_hand(take(by_pairs(stacked), model, ids), by_hand(model, halves(ids)))


class Neighbours(nn.Module):
    """Mixes rows, without a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.roll(1, 0)


@pytest.mark.parametrize("by", ["another layer", "another forward"])
def test_a_model_that_comes_to_mix_rows_after_its_first_step(by: str) -> None:
    model, ids = Net(nn.Identity(), nn.Linear(WIDTH, WIDTH)), ids_of(3)
    take(stacked, model, ids)
    if by == "another layer":
        model.middle[0] = Neighbours()
    else:
        model.middle[0].forward = Neighbours().forward
    one, two = (
        gapo.value_and_grad(stacked, gapo.GAPOConfig(rho=0.3), backend="torch", one_pass=one_pass)(model, ids)
        for one_pass in (True, False)
    )
    assert_by_hand(one, (two[0].anchor_gaps, two[1]))


def test_a_use_outside_of_its_layer_counts_also_where_its_gate_was_closed() -> None:
    class Gated(Net):
        gate = 0.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.gate * nn.functional.linear(self.embed(ids), self.embed.weight)

    model, ids = Gated(), ids_of(3)
    take(by_pairs(stacked), model, ids)
    model.gate = 1.0
    assert_by_hand(take(by_pairs(stacked), model, ids), by_hand(model, halves(ids)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        z = self.linear(y)
        y += 1  # of which a frozen weight's autograd keeps nothing
        return z + y


def test_biases_alone_leave_a_layers_input_to_the_model() -> None:
    model, ids = Net(InPlace()), ids_of(3)
    model.requires_grad_(False)
    model.middle[0].linear.bias.requires_grad_(True)
    found = take(stacked, model, ids)
    assert set(found[1]) == {"middle.0.linear.bias"}
    assert step_is_one_pass(stacked, model, ids)
    model.middle[0] = TwiceOutOfPlace(model.middle[0].linear)
    assert_by_hand(found, by_hand(model, halves(ids)))


class TwiceOutOfPlace(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(2 * x) + (2 * x + 1)


# One storage, two parameters.


def test_two_parameters_over_one_storage_come_back_bit_for_bit() -> None:
    model, ids = Net(), ids_of(3)
    model.lm_head.weight = nn.Parameter(model.embed.weight.data)
    before = model.embed.weight.detach().clone()
    result, _ = take(stacked, model, ids, perturb="all")
    assert torch.equal(model.embed.weight, before)
    # By hand: both deltas are of theta as it was, and the storage moves by their sum.
    probe = -torch.stack(
        [nn.functional.logsigmoid(2.5 * (c - r) - 0.25) for c, r in zip(*stacked(model, ids), strict=True)]
    ).mean()
    named = dict(model.named_parameters())
    g = dict(zip(named, torch.autograd.grad(probe, list(named.values())), strict=True))
    norm = torch.cat([(named[n] * g[n]).ravel() for n in named]).norm()
    delta = {n: 0.3 * named[n].detach() ** 2 * g[n] / norm for n in named}
    with torch.no_grad():
        clean = stacked(model, ids)
        there = copy.deepcopy(model)
        there.lm_head.weight = nn.Parameter(before + delta["embed.weight"] + delta["lm_head.weight"])
        there.embed.weight = nn.Parameter(there.lm_head.weight.data)
        there.lm_head.bias.add_(delta["lm_head.bias"])
        moved = stacked(there, ids)
    gaps = (clean[0] - clean[1]) - (moved[0] - moved[1])
    torch.testing.assert_close(result.anchor_gaps, gaps, rtol=1e-9, atol=1e-9)


# Graphs that can be pulled back once only.


class _Overwrites(torch.autograd.Function):
    """x * x, whose backward stores its result over what was saved, unseen by the version counter: as Liger's SwiGLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x.data.mul_(2 * g)
        return x.clone()


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Overwrites.apply(self.linear(x) * 1.0)
        return x + y


class Squares(Overwrites):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) ** 2


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
@pytest.mark.parametrize(("one_pass", "sft"), [(True, 0.0), (False, 0.0), (True, 0.3)])
def test_a_kernel_that_writes_over_what_it_saved(
    anchor: str, one_pass: bool, sft: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = Net(Overwrites()), Net(Squares())
    plain.load_state_dict(model.state_dict())
    config = gapo.GAPOConfig(rho=0.3, anchor=anchor, sft_weight=sft)
    step = gapo.value_and_grad(stacked, config, backend="torch", one_pass=one_pass)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        for seed in range(3):
            ids = ids_of(3, seed)
            assert_by_hand(step(model, ids), by_hand(plain, halves(ids), anchor=anchor, sft=sft))
    told = [record.message for record in caplog.records]
    assert len(told) == (0 if one_pass else 1), told
    assert all("can be pulled back once only" in line for line in told)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The mesh of a process group of one."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # a linear layer's output is a view, which nobody writes to
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_such_a_kernel_under_fsdp2(anchor: str, one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model, plain = Net(Overwrites()), Net(Squares())
    plain.load_state_dict(model.state_dict())
    fully_shard(model.middle[0], mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    for seed in range(2):
        result, grads = take(stacked, model, ids_of(3, seed), anchor=anchor)
        whole = {name: g.full_tensor() for name, g in grads.items()}
        assert_by_hand((result, whole), by_hand(plain, halves(ids_of(3, seed)), anchor=anchor))


def test_one_pass_is_kept_where_only_the_comparison_could_not_go_back_twice() -> None:
    model = Net(Overwrites())
    take(stacked, model, ids_of(3))
    assert step_is_one_pass(stacked, model, ids_of(3))


def test_a_training_loops_backward_gets_a_second_forward() -> None:
    model, plain, ids = Net(Overwrites()), Net(Squares()), ids_of(3)
    plain.load_state_dict(model.state_dict())
    backend = gapo.backends.get_backend("torch", one_pass=False)
    for _ in range(2):
        model.zero_grad()
        forward = backend.forward(stacked, model, ids, gapo.GAPOConfig(rho=0.3))
        result, cotangents = gapo.step.run(forward, gapo.GAPOConfig(rho=0.3), backend)
        forward.as_loss(result.loss, cotangents).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert_by_hand((result, grads), by_hand(plain, halves(ids)))


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
def test_a_compiled_model_that_ran_with_gradient_before_its_first_step(caplog: pytest.LogCaptureFixture) -> None:
    plain, ids = Net(nn.Linear(WIDTH, WIDTH)), ids_of(3)
    model = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    model(ids).sum().backward()
    model.zero_grad()
    with caplog.at_level(logging.WARNING, logger="gapo"):
        for _ in range(2):
            result, grads = take(stacked, model, ids)
    expected = by_hand(plain, halves(ids))
    assert_by_hand((result, {name.removeprefix("_orig_mod."): g for name, g in grads.items()}), expected)


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_a_compiled_layer_without_parameters_that_ran_before_the_first_step(anchor: str) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = torch.compile(lambda x: torch.tanh(x) * x.sin(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.run(x)
            return y

    model, ids = Net(nn.Linear(WIDTH, WIDTH), Compiled()), ids_of(3)
    model(ids).sum().backward()
    model.zero_grad()
    expected = by_hand(model, halves(ids), anchor=anchor)
    for _ in range(2):
        assert_by_hand(take(stacked, model, ids, anchor=anchor), expected)


class _Reentrant(torch.autograd.Function):
    """A checkpoint whose backward calls `backward()`."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x.detach()
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), g)
        return None, x.grad


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_backward_within_the_backward_is_an_error(one_pass: bool) -> None:
    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = _Reentrant.apply(self.linear, x)
            return y

    model, ids = Net(Offloaded()), ids_of(3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = gapo.value_and_grad(stacked, backend="torch", one_pass=one_pass)
    with pytest.raises(RuntimeError, match=r"wrote to the \.grad of 'middle\.0\.linear\.\w+'.*use_reentrant=False"):
        step(model, ids)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.equal(p.grad, torch.ones_like(p))


# Sixteen-bit compute within the model, as accelerate has it.


def test_autocast_within_the_models_forward_keeps_the_one_pass() -> None:
    class Autocast(Net):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(ids)

    model = Autocast(nn.Linear(WIDTH, WIDTH)).float()
    take(by_pairs(stacked), model, ids_of(3), anchor="first_order")
    assert step_is_one_pass(by_pairs(stacked), model, ids_of(3))


def test_coarse_products_of_float32_are_compared_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        tape,
        "compared",
        lambda *args, coarse, **kwargs: asked.append(coarse) or compared(*args, coarse=coarse, **kwargs),
    )
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            take(stacked, Net(nn.Linear(WIDTH, WIDTH)).float(), ids_of(3), anchor="first_order")
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == [False, True]


# The cut.


ELSEWHERE: list[Tensor] = []


class Block(nn.Module):
    leaves = ""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, states: list[Tensor] | None = None) -> Tensor:
        y = torch.tanh(self.inner(x))
        if states is not None:
            states.append(y)
        if self.leaves == "attribute":
            self.left = y
        if self.leaves == "elsewhere":
            ELSEWHERE.append(y)
        return x + torch.tanh(self.outer(y)).cumsum(1)


class Deep(nn.Module):
    """Four blocks, and ways from the first to the head, as `way` says."""

    def __init__(self, way: str = "none", gate: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Block() for _ in range(4))
        self.gate, self.lm_head = nn.Parameter(torch.tensor(gate)), nn.Linear(WIDTH, VOCAB)
        self.way = self.layers[0].leaves = way
        self.double()

    def forward(self, ids: Tensor, way: str | None = None) -> Tensor:
        way = way or self.way
        x, states = self.embed(ids), []
        skip = x if way == "embedding" else torch.zeros(())
        for i, layer in enumerate(self.layers):
            x = layer(x, states) if way == "list" else layer(x)
            if i == 0 and way == "output":
                skip = x
            if i == 0 and way == "attribute":
                skip = layer.__dict__.pop("left", skip)
            if i == 0 and way == "elsewhere":
                skip = ELSEWHERE.pop() if ELSEWHERE else skip
            if i == 2 and way == "in place":
                x *= 2
        if way == "list":
            skip = states[0]
        return self.lm_head(x + self.gate * skip)


def gaps_of(model: Deep, fn: Any, ids: Tensor, cut: bool = True) -> Tensor:
    """Of the last layer's perturbation; without the cut, by names that lie in no layer list."""
    moved = "^layers.3." if cut else "^layers.3.|^nowhere"
    config = gapo.GAPOConfig(rho=0.3, perturb=moved)
    return gapo.value_and_grad(fn, config, backend="torch")(model, ids)[0].anchor_gaps


def gaps_by_hand(model: Deep, ids: Tensor, way: str | None = None) -> Tensor:
    """Of a perturbation of the last layer."""

    def margins(policy: Deep) -> Tensor:
        steps = policy(ids, way)[:, :-1].log_softmax(-1)
        chosen, rejected = steps.gather(-1, ids[:, 1:, None])[..., 0].mean(1).chunk(2)
        return chosen - rejected

    last = {name: p for name, p in model.named_parameters() if name.startswith("layers.3.")}
    probe = -nn.functional.logsigmoid(2.5 * margins(model) - 0.25).mean()
    g = torch.autograd.grad(probe, list(last.values()))
    norm = torch.cat([(p * d).ravel() for p, d in zip(last.values(), g, strict=True)]).norm()
    there = copy.deepcopy(model)
    with torch.no_grad():
        for (name, p), d in zip(last.items(), g, strict=True):
            there.get_parameter(name).add_(0.3 * p**2 * d / norm)
        return margins(model) - margins(there)


def test_a_verdict_on_the_cut_is_of_one_margin_function() -> None:
    model, ids = Deep(), ids_of(3)
    assert_close(gaps_of(model, stacked, ids), gaps_by_hand(model, ids))

    def early(model: Any, ids: Tensor) -> Any:
        return gapo.sequence_logps(model(ids, "output"), ids).chunk(2)

    def listed(model: Any, ids: Tensor) -> Any:
        return gapo.sequence_logps(model(ids, "list"), ids).chunk(2)

    assert_close(gaps_of(model, early, ids), gaps_by_hand(model, ids, "output"))
    assert_close(gaps_of(model, listed, ids), gaps_by_hand(model, ids, "list"))


@pytest.mark.parametrize(
    ("way", "frozen"),
    [*itertools.product(["embedding", "output", "list", "attribute"], [False, True]), ("elsewhere", False)],
)
def test_a_way_around_the_cut_whose_gate_is_closed_at_first(way: str, frozen: bool) -> None:
    model, ids = Deep(way, gate=0.0), ids_of(3)
    if frozen:
        model.requires_grad_(False)
        model.layers[3].requires_grad_(True)
    assert_close(gaps_of(model, stacked, ids), gaps_by_hand(model, ids))
    with torch.no_grad():
        model.gate.fill_(1.0)
    assert_close(gaps_of(model, stacked, ids), gaps_by_hand(model, ids))


def test_a_forward_that_writes_to_what_was_kept() -> None:
    model, ids = Deep(), ids_of(3)
    model.requires_grad_(False)
    model.layers[3].requires_grad_(True)
    for way in ("none", "in place", "in place"):  # not at the first step, which is compared
        model.way = way
        assert_close(gaps_of(model, stacked, ids), gaps_by_hand(model, ids))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_hugging_face_models_are_compared_once_and_kept(comparisons: list[bool | None]) -> None:
    from gapo.adapters.hf.margins import pair_logps

    model = hf_models.make("llama")
    for seed in range(3):
        take(pair_logps, model, hf_models.batch(3, seed=seed))
    assert comparisons == [True]
