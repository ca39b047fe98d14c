"""The output head of a function, by what it does with its parameters and not by their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from flax import linen, nnx
from frameworks import LIBRARIES
from torch import nn

import gapo
from gapo.adapters.flax import pair_logps
from gapo.backends.jax import JaxBackend
from gapo.backends.jax_head import Readings, read

WIDTH, VOCAB, RANK = 8, 12, 2
IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (3, 5)))
SIZES = {
    "table": (VOCAB, WIDTH),
    "inner": (WIDTH, WIDTH),
    "stack": (2, WIDTH, WIDTH),
    "last": (WIDTH, VOCAB),
    "wide": (WIDTH, VOCAB + 4),
    "bias": (VOCAB,),
    "scale": (WIDTH,),
    "a": (WIDTH, RANK),
    "b": (RANK, VOCAB),
    "small": (WIDTH, RANK),
    "score": (WIDTH, 1),
}
Arrays = dict[str, jax.Array]


def weights(*names: str) -> Arrays:
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    drawn = {name: jax.random.normal(key, SIZES[name]) for key, name in zip(keys, SIZES, strict=True)}
    return {name: drawn[name] for name in ("table", "inner", *names)}


def hidden(p: Arrays) -> jax.Array:
    x = p["table"][IDS]
    return (x + jnp.tanh(x @ p["inner"])) * p.get("scale", 1.0)


def layers(p: Arrays) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w), None

    return jax.lax.scan(jax.checkpoint(layer), hidden(p), p["stack"])[0]


def attended(x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x


@jax.custom_vjp
def product(h: jax.Array, w: jax.Array) -> jax.Array:
    return h @ w


product.defvjp(lambda h, w: (h @ w, (h, w)), lambda saved, g: (g @ saved[1].T, jnp.einsum("btd,btv->dv", saved[0], g)))


def adapted(p: Arrays, head: jax.Array) -> jax.Array:
    h = hidden(p)
    dropped = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0)
    return h @ head + 2 * (dropped @ p["a"]) @ p["b"]


FROZEN = weights("last")
CASES: dict[str, tuple[Callable[[Arrays], jax.Array], set[str], set[str]]] = {
    "untied": (lambda p: hidden(p) @ p["last"], {"last"}, {"last"}),
    "tied": (lambda p: hidden(p) @ p["table"].T, set(), {"table"}),
    "tied einsum": (lambda p: jnp.einsum("btd,vd->btv", hidden(p), p["table"]), set(), {"table"}),
    "tied, scaled": (lambda p: 2 * hidden(p) @ (p["table"] / WIDTH).T, set(), {"table"}),
    "bias": (lambda p: hidden(p) @ p["last"] + p["bias"], {"last", "bias", "scale"}, {"last", "bias"}),
    "a scan of layers": (lambda p: layers(p) @ p["last"], {"last", "stack"}, {"last"}),
    "attention before": (lambda p: attended(hidden(p)) @ p["last"], {"last"}, {"last"}),
    "under jit": (lambda p: jax.jit(jnp.matmul)(hidden(p), p["last"]), {"last"}, {"last"}),
    "rematerialised": (jax.checkpoint(lambda p: hidden(p) @ p["last"]), {"last"}, {"last"}),
    "a soft cap": (lambda p: 5 * jnp.tanh(hidden(p) @ p["last"] / 5), {"last"}, {"last"}),
    "bfloat16": (lambda p: hidden(p).astype(jnp.bfloat16) @ p["last"].astype(jnp.bfloat16), {"last"}, {"last"}),
    "a padded vocabulary": (lambda p: (hidden(p) @ p["wide"])[..., :VOCAB], {"wide"}, {"wide"}),
    "pairs by vmap": (lambda p: jax.vmap(lambda h: h @ p["last"])(hidden(p)), {"last"}, {"last"}),
    "an adapter": (
        lambda p: adapted(p, p["last"]),
        {"last", "a", "b"},
        {"last", "a", "b"},
    ),
    "an adapter alone": (
        lambda p: adapted(p, FROZEN["last"]),
        {"a", "b"},
        {"a", "b"},
    ),
    "an adapter, merged": (
        lambda p: hidden(p) @ (FROZEN["last"] + p["a"] @ p["b"]),
        {"a", "b"},
        {"a", "b"},
    ),
    "two factors": (lambda p: (hidden(p) @ p["a"]) @ p["b"], {"a", "b"}, {"b"}),
    "frozen": (lambda p: hidden(p) @ FROZEN["last"], set(), set()),
    "a custom gradient": (lambda p: product(jax.nn.relu(hidden(p)), p["last"]), {"last"}, {"last"}),
    "a choice": (
        lambda p: jax.lax.cond(p["scale"][0] > 0, lambda h: h @ p["last"], lambda h: -h @ p["last"], hidden(p)),
        {"last", "scale"},
        {"last"},
    ),
    "one-hot input": (
        lambda p: jnp.tanh(jax.nn.one_hot(IDS, VOCAB) @ p["table"]) @ p["inner"] @ p["last"],
        {"last"},
        {"last"},
    ),
}


def found(logps: Callable[[Any], Any], p: Any) -> set[str]:
    """The head of `logps`, asked under a trace: nothing is compiled."""
    heads: list[set[str]] = []

    def ask(p: Any) -> None:
        forward = JaxBackend().forward(lambda p, _: logps(p), p, None, gapo.GAPOConfig())
        heads.append(set(forward.head))

    jax.eval_shape(ask, p)
    return heads[0]


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_found_by_what_it_is(case: str) -> None:
    logits, names, head = CASES[case]
    p = weights(*names)
    assert found(lambda p: gapo.sequence_logps(logits(p), IDS), p) == head


def by_log_softmax(p: Arrays) -> jax.Array:
    logps = jax.nn.log_softmax(hidden(p) @ p["last"])
    return jnp.take_along_axis(logps, IDS[..., None], -1)[..., 0].sum(-1)


def by_one_hot(p: Arrays) -> jax.Array:
    logits = hidden(p) @ p["last"]
    picked = jnp.einsum("btv,btv->bt", logits, jax.nn.one_hot(IDS, VOCAB))
    return (picked - jax.nn.logsumexp(logits, axis=-1)).sum(-1)


def by_chunks(p: Arrays) -> jax.Array:
    """Cross-entropy one position after another, so that no logits of a whole row exist."""

    def one(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        h, ids = at
        logps = jax.nn.log_softmax(h @ p["last"])
        return total + jnp.take_along_axis(logps, ids[:, None], -1)[:, 0], None

    return jax.lax.scan(jax.checkpoint(one), jnp.zeros(3), (hidden(p).swapaxes(0, 1), IDS.T))[0]


def by_optax(p: Arrays) -> jax.Array:
    return -optax.softmax_cross_entropy_with_integer_labels(hidden(p) @ p["last"], IDS).sum(-1)


@pytest.mark.parametrize("logps", [by_log_softmax, by_one_hot, by_chunks, by_optax])
def test_a_cross_entropy_of_ones_own(logps: Callable[[Arrays], jax.Array]) -> None:
    assert found(logps, weights("last")) == {"last"}


@pytest.mark.parametrize(
    "margins",
    [
        lambda p: (hidden(p) @ p["score"])[:, -1, 0],
        lambda p: (jax.nn.softmax(hidden(p) @ p["score"], axis=1) * hidden(p)).sum((1, 2)),
        lambda p: attended(hidden(p)).mean((1, 2)),
        lambda p: jax.nn.softplus(hidden(p) @ p["score"]).sum((1, 2)),
        lambda p: (p["score"][:3] * IDS[:, :1]).sum(1),
    ],
)
def test_without_a_vocabulary_names_decide(margins: Callable[[Arrays], jax.Array]) -> None:
    """The last layer of a model of something else is backbone."""
    p = weights("score")
    assert found(margins, p) == set()
    named = {("lm_head" if name == "score" else name): x for name, x in p.items()}
    assert found(lambda p: margins({**p, "score": p["lm_head"]}), named) == {"lm_head"}


def test_where_nothing_would_be_left_names_decide() -> None:
    logps = lambda p: gapo.sequence_logps(jax.nn.one_hot(IDS, VOCAB) @ p["w"], IDS)  # noqa: E731
    assert found(logps, {"w": jnp.ones((VOCAB, VOCAB))}) == set()


def test_a_function_that_looks_at_values_is_left_to_names() -> None:
    def margins(p: Arrays) -> jax.Array:
        return p["w"] if float(jax.lax.stop_gradient(p["w"])[0]) > 0 else -p["w"]

    p = {"w": jnp.ones(3)}
    with pytest.raises(jax.errors.JAXTypeError):
        jax.make_jaxpr(margins)(p)
    assert set(JaxBackend().forward(lambda p, _: margins(p), p, None, gapo.GAPOConfig()).head) == set()


class Tied(nnx.Module):
    """A tied model; `shared` ties by one variable in two places, else by `nnx.Embed.attend`."""

    def __init__(self, rngs: nnx.Rngs, shared: bool) -> None:
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.table = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        if shared:
            self.decode = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.decode.embedding = self.table.embedding

    def __call__(self, ids: Any) -> Any:
        x = self.table(ids)
        return (self.decode if hasattr(self, "decode") else self.table).attend(x + jnp.tanh(self.layer(x)))


class Stacked(linen.Module):
    """Two layers of a scan, and a head of an odd name."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        x = linen.Embed(VOCAB, WIDTH)(ids)
        scanned = linen.scan(
            lambda module, x, _: (x + jnp.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = scanned(linen.Dense(WIDTH, name="block_0"), x, None)
        return linen.Dense(VOCAB, name="words")(x)


def pairs(logits: Callable[[Any], Any]) -> tuple[Any, Any]:
    sides = {
        f"{side}_{part}": IDS for side in ("chosen", "rejected") for part in ("input_ids", "attention_mask", "labels")
    }
    return pair_logps(lambda ids, _: logits(ids), sides)


def test_flax_modules() -> None:
    for shared in (False, True):
        graph, params = nnx.split(nnx.eval_shape(lambda: Tied(nnx.Rngs(0), shared)))  # noqa: B023
        names = found(lambda p: pairs(nnx.merge(graph, p)), params)  # noqa: B023
        assert names == {"decode.embedding.value" if shared else "table.embedding.value"}
    module = Stacked()
    params = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert found(lambda p: pairs(lambda ids: module.apply(p, ids)), params) == {
        "params.words.kernel",
        "params.words.bias",
    }


def test_layers_of_a_scan_have_no_numbers() -> None:
    module = Stacked()
    params = jax.eval_shape(module.init, jax.random.key(0), IDS)
    step = gapo.value_and_grad(
        lambda p, _: pairs(lambda ids: module.apply(p, ids)), gapo.GAPOConfig(last_layers=1), backend="jax"
    )
    message = (
        r"last_layers=1 counts layers by the numbers .* params\.block_0\.bias, .* hold all layers of a scan: .*perturb="
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, params, None)


def test_outside_of_jit_a_function_is_read_once_for_each_shape() -> None:
    calls = []

    def margins(p: Arrays, batch: dict[str, Any]) -> jax.Array:
        calls.append(1)
        return p["w"] * batch["x"]

    backend = JaxBackend()
    ones, half, other = {"w": jnp.ones(3)}, {"w": jnp.ones(3, jnp.float16)}, {"w": jnp.ones(2)}
    one, two, short = {"x": jnp.ones(3), "name": "a"}, {"x": jnp.zeros(3), "name": "a"}, {"x": jnp.ones(2), "name": "a"}
    unhashable = {"x": jnp.ones(3), "name": slice(set())}
    steps = [(ones, one, 1), (ones, two, 0), (half, one, 1), (other, short, 1), (ones, {**two, "name": "b"}, 1)]
    for params, batch, new in [*steps, (ones, two, 0), (half, two, 0), (ones, unhashable, 1), (ones, unhashable, 1)]:
        before = len(calls)
        assert set(backend.forward(margins, params, batch, gapo.GAPOConfig()).head) == set()
        assert len(calls) - before == 1 + new


def test_a_reading_is_of_one_function() -> None:
    """The same code with other cells is another function."""
    names, leaves = zip(*jax.eval_shape(lambda: weights("last")).items(), strict=True)
    readings = Readings()
    for name in ("last", "table", "last"):

        def logps(leaves: list[Any], name: str = name) -> jax.Array:
            p = dict(zip(names, leaves, strict=True))
            return gapo.sequence_logps(hidden(p) @ (p[name] if name == "last" else p[name].T), IDS)

        reading = readings.of(logps, "shapes", partial(read, logps, names, leaves))
        assert reading.head == {name}
    assert len(readings._by_signature) == 1  # those of earlier functions are gone


class TorchTied(nn.Module):
    """The tests' tiny transformer as a module that tells its output embeddings."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.arrays = models.to_backend(LIBRARIES["torch"], arrays, "float64")
        self.head = nn.Linear(*reversed(arrays["embed.weight"].shape), bias=False)
        self.head.weight = self.arrays.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_a_tied_model_has_the_same_gaps_in_torch() -> None:
    arrays, batch = models.make_params(width=4, tied=True, seed=1), models.make_batch(pairs=2, seq=4, seed=1)
    inner, module = models.make_margin_fn(LIBRARIES["torch"]), TorchTied(arrays)
    gaps = {}
    for perturb in ("backbone", "all"):
        config = gapo.GAPOConfig(rho=0.3, perturb=perturb)
        step = gapo.value_and_grad(lambda m, b: inner(m.arrays, b), config, backend="torch")
        gaps[perturb] = step(module, batch)[0].anchor_gaps.numpy()
    assert np.abs(gaps["backbone"] - gaps["all"]).max() > 1e-3
    config = gapo.GAPOConfig(rho=0.3)
    step = gapo.value_and_grad(models.make_margin_fn(LIBRARIES["jax"]), config, backend="jax")
    found = jax.jit(lambda p: step(p, batch)[0].anchor_gaps)(models.to_backend(LIBRARIES["jax"], arrays, "float64"))
    np.testing.assert_allclose(np.asarray(found), gaps["backbone"], rtol=1e-9)


def test_tied_names_of_a_plain_torch_module() -> None:
    """A module that cannot be asked is asked by all names of its parameters, of which PyTorch lists only the first."""
    from gapo.backends.torch.head import head_parameters

    module = nn.Module()
    module.embed, module.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
    module.lm_head.weight = module.embed.weight
    assert head_parameters(module, ["embed.weight", "lm_head.bias"]) == ["embed.weight", "lm_head.bias"]
