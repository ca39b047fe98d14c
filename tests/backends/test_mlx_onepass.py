"""The one-pass step of MLX against MLX's own gradients, for each kind of layer; where it refuses; what it leaves."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_models
import mlx_problem
import numpy as np
import pytest
from interrupts import interrupt_at
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

import gapo
import gapo.backends.mlx.pairgrads as engine
from gapo.adapters import mlx_lm as adapter
from gapo.adapters.mlx_lm import pair_logps
from gapo.backends.mlx import MlxForward, OnePassMlxForward
from gapo.backends.mlx.mlx_verdicts import MlxVerdicts, identity
from gapo.backends.mlx.pairgrads import instances, standins, taps

WIDE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}  # a row is whole groups of a quantised layer


def adapted(model: nn.Module, dora: bool = False, dropout: float = 0.0) -> nn.Module:
    """`model` with low-rank adapters that are not 0."""
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 4.0, "dropout": dropout}, use_dora=dora)
    return drawn(model)


def drawn(model: nn.Module) -> nn.Module:
    mx.random.seed(1)
    adapters = [(name, x) for name, x in tree_flatten(model.trainable_parameters()) if "lora" in name]
    model.load_weights([(name, 0.3 * mx.random.normal(x.shape)) for name, x in adapters], strict=False)
    mx.eval(model.parameters())
    return model.train()


def quantised(kind: str, **sizes: Any) -> nn.Module:
    model = mlx_models.make(kind, **WIDE, **sizes)
    nn.quantize(model, group_size=32, bits=4)
    return model


def adapted_embedding(tied: bool) -> nn.Module:
    model = mlx_models.make("qwen2", tied)
    model.freeze()
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=2)
    model.model.embed_tokens.embedding.freeze()
    return drawn(model)


class Norms(nn.Module):
    """Layer norms with and without a bias, a linear layer with one, and a scale that a norm of one's own has."""

    class OwnRMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = 0.1 * mx.random.normal((width,))

        def __call__(self, x: mx.array) -> mx.array:
            return mx.fast.rms_norm(x, 1.0 + self.weight, 1e-6)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(mlx_models.VOCAB, 8), nn.Linear(8, mlx_models.VOCAB)
        self.norms = [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), self.OwnRMSNorm(8)]
        self.mix = nn.Linear(8, 8)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        for norm in self.norms:
            x = x + self.mix(norm(mx.cumsum(x, axis=1)))  # one layer, called four times
        return self.head(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: mlx_models.make("llama"),
    "tied": lambda: mlx_models.make("llama", tied=True),
    "biases": lambda: mlx_models.make("starcoder2"),
    "norms": Norms,
    "gemma": lambda: mlx_models.make("gemma2"),
    "mixture": lambda: mlx_models.make("mixtral", num_local_experts=3, num_experts_per_tok=2),
    "lora": lambda: adapted(mlx_models.make("llama")),
    "lora, dropout": lambda: adapted(mlx_models.make("llama"), dropout=0.4),
    "qlora": lambda: adapted(quantised("llama")),
    "dora": lambda: adapted(mlx_models.make("starcoder2"), dora=True),  # over layers with a bias
    "qdora, dropout": lambda: adapted(quantised("llama"), dora=True, dropout=0.4),
    "lora, mixture": lambda: adapted(mlx_models.make("mixtral"), dropout=0.4),
    "qlora, mixture": lambda: adapted(quantised("mixtral")),
    "lora, embedding": lambda: adapted_embedding(tied=False),
    "lora, tied": lambda: adapted_embedding(tied=True),
}


def one_pass(model: nn.Module, batch: Any, by_side: bool = False, margin_fn: Any = pair_logps) -> OnePassMlxForward:
    return OnePassMlxForward(margin_fn, model, batch, MlxVerdicts(), by_side=by_side)


def assert_near(ours: dict[str, mx.array], theirs: dict[str, mx.array], tol: float = 2e-6) -> None:
    """Of each parameter, relative to the largest gradient of any."""
    assert ours.keys() == theirs.keys()
    scale = max(float(mx.abs(x).max()) for x in theirs.values())
    assert scale > 1e-3
    for name, x in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(x), rtol=0, atol=tol * scale, err_msg=name)


# Mixtures sort their tokens by expert from 64 entries on.
@pytest.mark.parametrize(("kind", "seq"), [*((k, 6) for k in MODELS), *((k, 24) for k in MODELS if "mixture" in k)])
def test_gradients_are_mlx_own(kind: str, seq: int) -> None:
    model, batch = MODELS[kind](), mlx_models.batch(pairs=3, seq=seq)
    own = [mx.array([0.3, -1.0, 0.5]), mx.array([0.7, 0.2, 0.4])]
    for by_side, cotangents in ((False, [own[0], -own[0]]), (True, own)):
        mx.random.seed(2)
        forward = one_pass(model, batch, by_side)
        assert forward.one_pass
        assert_near(forward.pullback(cotangents), MlxForward.pullback(forward, cotangents))
        direction = {name: mx.random.normal(x.shape) for name, x in forward.parameters.items()}
        along = forward.directional(lambda name, theta: direction[name], direction)  # noqa: B023
        assert_near({"along": along}, {"along": forward._pair_by_pair(direction)})
        forward.require_repeatable()


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_the_step_is_the_plain_one(anchor: str) -> None:
    model, batch = mlx_models.make("llama"), mlx_models.batch(3)
    config = gapo.GAPOConfig(rho=0.1, anchor=anchor)
    (result, grads), (plain, plain_grads) = (
        gapo.value_and_grad(pair_logps, config, backend="mlx", one_pass=one)(model, batch) for one in (True, False)
    )
    assert_near(dict(tree_flatten(grads)), dict(tree_flatten(plain_grads)))
    np.testing.assert_allclose(np.array(result.anchor_gaps), np.array(plain.anchor_gaps), rtol=1e-4)
    np.testing.assert_allclose(float(result.grad_norm), float(plain.grad_norm), rtol=1e-5)
    _, in_loss = nn.value_and_grad(model, adapter.make_loss(config))(model, *batch)
    assert_near(dict(tree_flatten(in_loss)), dict(tree_flatten(plain_grads)))
    scaled = nn.value_and_grad(model, lambda m: 0.5 * adapter.make_loss(config)(m, *batch)[0])(model)[1]
    halves = {name: 0.5 * x for name, x in tree_flatten(plain_grads)}
    assert_near(dict(tree_flatten(scaled)), halves)


@pytest.mark.parametrize(("anchor", "forwards"), [("exact", 2), ("first_order", 1)])
def test_how_often_the_model_runs(anchor: str, forwards: int) -> None:
    model, batch, calls = mlx_models.make("llama"), mlx_models.batch(2), []

    def counted(m: nn.Module, b: Any) -> Any:
        calls.append(1)
        return pair_logps(m, b)

    step = gapo.value_and_grad(counted, gapo.GAPOConfig(anchor=anchor), backend="mlx")
    step(model, batch)  # proves what it rests on
    for data in (batch, mlx_models.batch(2, seq=9), mlx_models.batch(4)):
        calls.clear()
        step(model, data)
        assert len(calls) == forwards
    model.layers[0].eval()  # another mode of a layer is proved anew
    calls.clear()
    step(model, batch)
    assert len(calls) > forwards


def test_a_mixture_of_experts_has_first_order_gaps(caplog: pytest.LogCaptureFixture) -> None:
    """Against central differences of the margins along delta, which the exact anchor's two radii give."""
    model, batch = mlx_models.make("mixtral"), mlx_models.batch()

    def gaps(rho: float, anchor: str) -> np.ndarray:
        config = gapo.GAPOConfig(rho=rho, anchor=anchor, adaptive=False, probe="margin")
        return np.array(gapo.value_and_grad(pair_logps, config, backend="mlx")(model, batch)[0].anchor_gaps)

    with caplog.at_level(logging.WARNING, logger="gapo"):
        first_order, half, whole = gaps(0.02, "first_order"), gaps(0.01, "exact"), gaps(0.02, "exact")
    assert not caplog.records
    np.testing.assert_allclose(first_order, 4 * half - whole, rtol=2e-2, atol=2e-5)
    assert np.abs(first_order).min() > 1e-4


def test_layers_in_16_bits_keep_the_weights_of_pairs_and_the_dtypes() -> None:
    model, batch = mlx_models.make("llama"), mlx_models.batch(3)
    model.set_dtype(mx.bfloat16)
    forward = one_pass(model, batch)
    assert forward.one_pass
    w = mx.array([0.3, -1.0, 0.5])
    grads = forward.pullback([w, -w])
    assert all(g.dtype == mx.bfloat16 for g in grads.values())
    wide = mlx_models.make("llama")
    wide.update(tree_unflatten([(name, x.astype(mx.float32)) for name, x in tree_flatten(model.parameters())]))
    exact = MlxForward(pair_logps, wide, batch).pullback([w, -w])
    assert_near({name: g.astype(mx.float32) for name, g in grads.items()}, exact, 0.03)
    assert forward.directional(lambda name, theta: mx.ones(theta.shape), forward.parameters).dtype == mx.float32


# --- where it refuses: the step of MLX's own gradients, and one line in the log


class Custom(nn.Module):
    def __init__(self, body: Any, **parts: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(mlx_models.VOCAB, 8), nn.Linear(8, mlx_models.VOCAB)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body

    def __call__(self, ids: mx.array) -> mx.array:
        return self.head(self.body(self, mx.tanh(mx.cumsum(self.embed(ids), axis=1))))


def linear() -> nn.Module:
    mx.random.seed(3)
    return nn.Linear(8, 8)


def twice_one_layer() -> nn.Module:
    layer = linear()
    return Custom(lambda m, x: m.first(x) + m.second(mx.tanh(x)), first=layer, second=layer)


def flattened(m: Custom, x: mx.array) -> mx.array:
    return m.mix(x.reshape(-1, 8)).reshape(x.shape)


def sides_apart(model: nn.Module, batch: Any) -> Any:
    sides = zip(*(mx.split(x, 2) for x in batch), strict=True)
    return tuple(gapo.sequence_logps(model(ids), labels) for ids, labels in sides)


def interleaved(model: nn.Module, batch: Any) -> Any:
    logps = gapo.sequence_logps(model(batch[0]), batch[1])
    return logps[::2], logps[1::2]


def by_keyword(m: Custom, x: mx.array) -> mx.array:
    return m.mix(x=x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, bool, str]] = {
    "a parameter of the module": (
        lambda: Custom(lambda m, x: x * m.gain, gain=mx.ones((8,))),
        pair_logps,
        False,
        "no rule for gain of the module",
    ),
    "a parameter in a list": (
        lambda: Custom(lambda m, x: x * m.gains[0], gains=[mx.ones((8,))]),
        pair_logps,
        False,
        "outside of any layer",
    ),
    "a layer without a rule": (
        lambda: Custom(lambda m, x: m.bi(x, x), bi=nn.Bilinear(8, 8, 8)),
        pair_logps,
        False,
        "for bias, weight of bi",
    ),
    "a weight used outside of its layer": (
        lambda: Custom(lambda m, x: m.mix(x) @ m.mix.weight, mix=linear()),
        pair_logps,
        False,
        "mix.weight is not MLX's",
    ),
    "one layer in two places": (twice_one_layer, pair_logps, False, "a Linear, is "),
    "pairs that mix": (
        lambda: Custom(lambda m, x: m.mix(x - mx.mean(x, axis=0)), mix=linear()),
        pair_logps,
        False,
        "is not MLX's own",
    ),
    "batch norm": (
        lambda: Custom(lambda m, x: m.norm(x), norm=nn.BatchNorm(8, affine=False)),
        pair_logps,
        False,
        "not MLX's own",
    ),
    "tokens as rows": (lambda: Custom(flattened, mix=linear()), pair_logps, False, "not one with the batch's rows"),
    "sides by themselves, weighted apart": (
        lambda: Custom(lambda m, x: m.mix(x), mix=linear()),
        sides_apart,
        True,
        "not one with the batch's rows",
    ),
    "rows in another order": (
        lambda: Custom(lambda m, x: m.mix(x), mix=linear()),
        interleaved,
        False,
        "is not MLX's own",
    ),
    "a call by keyword": (lambda: Custom(by_keyword, mix=linear()), pair_logps, False, "called in a way that has no"),
    "the table as a matrix": (
        lambda: mlx_models.make("minicpm", tied=True),
        pair_logps,
        False,
        "embed_tokens.weight is not MLX's own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_does_not_apply_the_plain_step_is_taken(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, margin_fn, by_side, reason = REFUSED[case]
    model, batch, verdicts = make().train(), mlx_models.batch(3), MlxVerdicts()
    state = dict(tree_flatten(model.parameters()))
    classes = [type(m) for m in model.modules()]
    w = mx.array([0.3, -1.0, 0.5])
    with caplog.at_level(logging.WARNING, logger="gapo"):
        forwards = [OnePassMlxForward(margin_fn, model, batch, verdicts, by_side=by_side) for _ in range(2)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert reason in messages[0]
    assert "the slower step is used" in messages[0]
    assert not forwards[1].one_pass
    assert [type(m) for m in model.modules()] == classes
    if case != "batch norm":  # whose statistics move
        assert all(x is state[name] for name, x in tree_flatten(model.parameters()))
    plain = MlxForward(margin_fn, model, batch)
    assert_near(forwards[1].pullback([w, -w]), plain.pullback([w, -w]), 1e-6)
    set(forwards[1].head)  # the clean forward was watched


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_mlx_lm_checkpoints(lora: bool) -> None:
    """mlx-lm patches the layer's class, here one that no other model has."""
    model = mlx_models.make("llama", num_hidden_layers=2)
    model = adapted(model) if lora else model
    plain = MlxForward(pair_logps, model, mlx_models.batch(3))
    w = mx.array([0.3, -1.0, 0.5])
    expected = plain.pullback([w, -w])
    checkpointed = type("Block", (type(model.layers[0]),), {})
    for layer in model.layers:
        layer.__class__ = checkpointed
    grad_checkpoint(model.layers[0])
    before = dict(tree_flatten(model.parameters()))
    forward = one_pass(model, mlx_models.batch(3))
    assert forward.one_pass
    assert all(x is before[name] for name, x in tree_flatten(model.parameters()))
    assert_near(forward.pullback([w, -w]), expected)


def test_sides_by_themselves_are_rows_of_their_pair() -> None:
    model, w = mlx_models.make("llama"), mx.array([0.3, -1.0, 0.5])
    forward = one_pass(model, mlx_models.batch(3), margin_fn=sides_apart)
    assert forward.one_pass
    assert_near(forward.pullback([w, -w]), MlxForward.pullback(forward, [w, -w]))


def test_a_wrong_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = engine.layer_rules._RULES
    wrong = rules[nn.RMSNorm.__call__]._replace(
        contributions=lambda call, g: iter([("weight", engine.contributions.vector(1.01 * g * call.y, call.groups))])
    )
    monkeypatch.setitem(rules, nn.RMSNorm.__call__, wrong)
    assert not one_pass(mlx_models.make("llama"), mlx_models.batch(3)).one_pass


def test_the_proof_does_not_rest_on_gradients_that_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh adapter's B is 0, and so is every gradient by A."""
    model = mlx_models.make("llama")
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    right = engine.layer_rules._low_rank

    def wrong(call: Any, g: mx.array) -> Any:
        yield from ((name, part) for name, part in right(call, g) if name == "lora_b")

    assert one_pass(model.train(), mlx_models.batch(3)).one_pass
    monkeypatch.setattr(engine.layer_rules, "_low_rank", wrong)
    assert not one_pass(model, mlx_models.batch(3)).one_pass


def test_one_pair_proves_nothing_for_several() -> None:
    model, verdicts = Custom(lambda m, x: m.mix(x - mx.mean(x, axis=0)), mix=linear()), MlxVerdicts()
    pair = (mx.array([[1, 2, 3, 4], [1, 2, 5, 6]]), mx.array([[-100, 2, 3, 4], [-100, 2, 5, 6]]))
    assert OnePassMlxForward(pair_logps, model, pair, verdicts).one_pass
    assert not OnePassMlxForward(pair_logps, model, mlx_models.batch(3), verdicts).one_pass


def test_functions_are_one_where_their_code_and_what_they_hold_are() -> None:
    def made(scale: float, holder: Any) -> Any:
        return lambda model, batch: (scale, holder)

    model, other = linear(), linear()
    assert identity(made(1.0, model)) == identity(made(1.0, model))
    assert identity(made(1.0, model)) != identity(made(2.0, model))
    assert identity(made(1.0, model)) != identity(made(1.0, other))
    assert identity(model.__call__) == identity(model.__call__) != identity(other.__call__)
    assert identity(made(1.0, mx.zeros((2,)))) == identity(made(1.0, mx.ones((2,)))) != identity(made(1.0, mx.ones(())))
    assert identity(pair_logps) == identity(pair_logps) != identity(sides_apart)


# --- what it leaves behind


@pytest.mark.parametrize("code", ["engine", "proof"])
def test_ctrl_c_at_any_line_leaves_the_module_as_it_was(code: str) -> None:
    codes = {
        "engine": {taps.Recorder.run.__code__, instances.subclassed.__wrapped__.__code__, instances._put_back.__code__},
        "proof": {standins.stand_ins.__wrapped__.__code__, standins._replace.__code__},
    }[code]
    model, batch = mlx_problem.mixer(), mlx_problem.BATCH
    state, classes = dict(tree_flatten(model.parameters())), [type(m) for m in model.modules()]
    random = np.array(mx.random.state[0])
    for line in range(1, 600):
        sys.settrace(interrupt_at(line, codes))
        try:
            one_pass(model, batch, margin_fn=mlx_problem.margin_fn)
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
            assert [type(m) for m in model.modules()] == classes
            assert all(x is state[name] for name, x in tree_flatten(model.parameters()))
            np.testing.assert_array_equal(np.array(mx.random.state[0]), random)
        break
    assert 10 < line < 599


def test_memory_is_simpos_also_within_a_surrounding_gradient() -> None:
    model, batch = mlx_models.make("llama", num_hidden_layers=2, **WIDE), mlx_models.batch(4, seq=48)
    peaks = {}
    for name, loss in {
        "simpo": adapter.make_loss(objective="simpo"),
        "exact": adapter.make_loss(gapo.GAPOConfig(anchor="exact")),
        "first_order": adapter.make_loss(gapo.GAPOConfig(anchor="first_order")),
    }.items():
        step = nn.value_and_grad(model, loss)
        for _ in range(2):
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(step(model, *batch))
            peaks[name] = mx.get_peak_memory() - before
    assert max(peaks["exact"], peaks["first_order"]) < 1.3 * peaks["simpo"]


def test_the_engine_knows_nothing_of_what_it_serves() -> None:
    for path in sorted(Path(engine.__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        for word in ("gapo", "margin", "anchor", "chosen", "rejected", "pair of"):
            assert word not in text.lower().replace("gapo.backends.mlx.pairgrads", ""), f"{path.name}: {word}"
        imports = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert not [m for m in imports if m and m.startswith("gapo.") and "pairgrads" not in m], path


@pytest.mark.usefixtures("mlx_compiles")
def test_compiled_equals_eager(caplog: pytest.LogCaptureFixture) -> None:
    """mx.compile for real: the proof is made while the step is traced, where no array of the model can be read."""

    def compiled(model: nn.Module) -> Any:
        grad = nn.value_and_grad(model, adapter.make_loss(config))
        state = [model.state, mx.random.state]
        return mx.compile(lambda ids, labels: grad(model, ids, labels), inputs=state, outputs=state)

    config = gapo.GAPOConfig(rho=0.05, anchor="first_order", perturb="all")
    model, batch = MODELS["qlora, mixture"](), mlx_models.batch(3, seq=24)
    step = compiled(model)
    for _ in range(2):
        _, ours = step(*batch)
        mx.eval(ours, model.state)
    mx.disable_compile()
    plain = gapo.value_and_grad(pair_logps, config, backend="mlx")(model, batch)[1]
    assert_near(dict(tree_flatten(ours)), dict(tree_flatten(plain)), 1e-5)
    assert not caplog.records
    mx.enable_compile()
    mx.eval(compiled(REFUSED["pairs that mix"][0]())(*batch)[1])
    (record,) = caplog.records
    assert "is not MLX's own" in record.getMessage()
