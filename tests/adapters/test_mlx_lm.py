"""GAPO in MLX-LM's own `train`: gradients as the step says, full and LoRA, evaluation, callbacks, adapters."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import mlx_models
import numpy as np
import pytest
import token_pairs
from drifting import by_hand, drifting
from frameworks import require
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from mlx_lm.tuner import callbacks
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from mlx_lm_runs import CONFIG, load, one_batch, run

import gapo
from gapo import data
from gapo.adapters import mlx_lm as adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, as `save_pretrained` leaves them."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": token_pairs.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    config = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **sizes,
    }
    mx.random.seed(0)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    token_pairs.tokenizer().save_pretrained(path)
    return path


def bare_step(model: nn.Module, batch: Any, config: gapo.GAPOConfig = CONFIG) -> Any:
    return gapo.value_and_grad(adapter.pair_logps, config, backend="mlx")(model, batch)


def assert_close(found: Any, expected: Any, tol: float = 2e-5) -> None:
    expected = dict(tree_flatten(expected))
    found = dict(tree_flatten(found))
    assert set(found) == set(expected)
    scale = max(float(mx.abs(x).max()) for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(x), rtol=tol, atol=tol * scale, err_msg=name)


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # adapters that are nearly 0 bend within rho
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_gradient_of_the_loss_is_the_steps(folder: Path, lora: bool, anchor: str) -> None:
    model = load(folder, lora).train()
    config = gapo.GAPOConfig(rho=0.3, anchor=anchor, adaptive=not lora)
    result, grads = bare_step(model, one_batch(), config)
    (value, count), found = nn.value_and_grad(model, adapter.make_loss(config))(model, *one_batch())
    assert_close(found, grads)
    assert float(value) == pytest.approx(float(result.loss), rel=1e-5)
    assert int(count) == int((one_batch()[1] != -100).sum())


def quantised(folder: Path) -> nn.Module:
    """The same with its linear layers in 4 bits, where a row is whole groups, and adapters over them that do work."""
    model = load(folder)
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0,
    )
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    mx.random.seed(1)
    drawn = [(name, 0.1 * mx.random.normal(x.shape)) for name, x in tree_flatten(model.trainable_parameters())]
    model.load_weights(drawn, strict=False)
    return model


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_the_step_over_a_quantised_base_is_that_of_the_dequantised_one(folder: Path, anchor: str) -> None:
    from mlx_lm.utils import dequantize_model

    model = quantised(folder).train()
    plain = dequantize_model(quantised(folder)).train()
    plain.freeze()
    plain.unfreeze(keys=["lora_a", "lora_b"])
    layers = [{type(m).__name__ for m in one.modules()} for one in (model, plain)]
    assert "QuantizedLinear" in layers[0] - layers[1]
    config = gapo.GAPOConfig(rho=0.3, anchor=anchor)
    (found, grads), (expected, plain_grads) = (bare_step(one, one_batch(), config) for one in (model, plain))
    np.testing.assert_allclose(np.array(found.anchor_gaps), np.array(expected.anchor_gaps), rtol=1e-3, atol=5e-6)
    assert float(mx.abs(found.anchor_gaps).min()) > 1e-4
    assert_close(grads, plain_grads, 1e-3)
    (_, _), in_loss = nn.value_and_grad(model, adapter.make_loss(config))(model, *one_batch())
    assert_close(in_loss, grads)


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # adapters that are nearly 0 bend within rho
def test_training_over_a_quantised_base_moves_the_adapters_alone(folder: Path, tmp_path: Path) -> None:
    model = quantised(folder)
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    run(model, tmp_path)
    moved = {name for name, x in tree_flatten(model.parameters()) if not np.array_equal(np.array(x), before[name])}
    assert moved == {name for name in before if name.endswith(("lora_a", "lora_b"))}
    assert len(moved) == 2 * 2 * 7  # two layers of seven matrices


def test_the_models_agree_with_pytorch(folder: Path) -> None:
    torch = require("torch")
    from transformers import AutoModelForCausalLM

    from gapo.adapters.hf.margins import pair_logps

    ids, labels, _ = one_batch()
    half = len(ids) // 2
    sides = {"chosen": slice(0, half), "rejected": slice(half, None)}
    batch = {}
    for side, rows in sides.items():
        arrays = {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": mx.ones_like(ids[rows])}
        batch |= {f"{side}_{name}": torch.from_numpy(np.array(x)).long() for name, x in arrays.items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    there, _ = gapo.value_and_grad(pair_logps, CONFIG, backend="torch")(model, batch)
    here, _ = bare_step(load(folder), (ids, labels))
    for name in ("margins", "anchor_gaps", "weights"):
        np.testing.assert_allclose(np.array(getattr(here, name)), getattr(there, name).numpy(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_mlx_lms_train_takes_the_steps(folder: Path, tmp_path: Path, lora: bool) -> None:
    model, reference = load(folder, lora), load(folder, lora)
    if lora:
        reference.update(model.parameters())
    callback = run(model, tmp_path)
    batches = adapter.iterate_batches(token_pairs.pairs(8), 4, 64, loop=True)
    for batch, report in zip((next(batches) for _ in range(4)), callback.train, strict=True):
        result, grads = bare_step(reference, batch)
        optim.SGD(0.1).update(reference, grads)
        assert report["train_loss"] == pytest.approx(float(result.loss), rel=1e-4)
        assert report["gapo/weight_min"] == pytest.approx(float(result.weights.min()), rel=1e-4)
    assert_close(model.trainable_parameters(), reference.trainable_parameters(), 1e-4)
    assert {"rewards/accuracies", "gapo/rho", "gapo/radius"} <= set(callback.train[0])
    assert [report["iteration"] for report in callback.valid] == [0, 1, 3]
    assert "rewards/margins" in callback.valid[0]


def test_weights_stay_at_learning_rate_zero(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    run(model, tmp_path, learning_rate=0.0)
    for name, x in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(x), before[name])


def test_evaluation_is_the_probe_loss_over_pairs(folder: Path) -> None:
    model = load(folder)
    rows = token_pairs.pairs(8)
    value = evaluate(model, rows, 4, -1, 64, loss=adapter.make_loss(CONFIG), iterate_batches=adapter.iterate_batches)
    losses = []
    for batch in adapter.iterate_batches(rows, 4, 64):
        chosen, rejected = adapter.pair_logps(model, batch)
        losses += [float(x) for x in mx.logaddexp(mx.array(0.0), CONFIG.gamma - CONFIG.beta * (chosen - rejected))]
    assert len(losses) == 8
    assert value == pytest.approx(np.mean(losses), rel=1e-4)


def test_dpo_trains_from_where_it_started(folder: Path, tmp_path: Path) -> None:
    model = load(folder)

    def summed(batch: Any) -> Any:
        ids, labels = (
            mx.array(np.concatenate([batch[f"{side}_{part}"] for side in ("chosen", "rejected")]))
            for part in ("input_ids", "labels")
        )
        averages = adapter.pair_logps(model, (ids, labels))
        lengths = [(batch[f"{side}_labels"] != -100).sum(-1) for side in ("chosen", "rejected")]
        return [np.array(a) * n for a, n in zip(averages, lengths, strict=True)]

    rows = data.with_reference_logps(token_pairs.pairs(8), summed, pad_token_id=0, progress=None)
    loss = adapter.make_loss(CONFIG, objective="dpo", objective_settings={"beta": 0.5})
    batch = next(adapter.iterate_batches(rows, 4, 64))
    assert [tuple(x.shape) for x in batch] == [(8, batch[0].shape[1])] * 2 + [(2, 4)]
    model.train()
    value, grads = nn.value_and_grad(model, lambda m: loss(m, *batch)[0])(model)[:2]
    assert float(value) == pytest.approx(math.log(2), abs=1e-5)

    def half_margins(m: nn.Module) -> Any:  # where the policy is the reference, -beta / 2 times the summed margins
        lengths = mx.sum(batch[1][:, 1:] != -100, axis=-1)
        chosen, rejected = adapter.pair_logps(m, batch[:2])
        return -0.25 * mx.mean(chosen * lengths[:4] - rejected * lengths[4:])

    assert_close(grads, nn.value_and_grad(model, half_margins)(model)[1])
    args = TrainingArgs(batch_size=4, iters=4, max_seq_length=64, adapter_file=str(tmp_path / "a.safetensors"))
    train(model, optim.SGD(0.05), rows, rows, args, loss=loss, iterate_batches=adapter.iterate_batches)
    trained = evaluate(model, rows, 4, -1, 64, loss=loss, iterate_batches=adapter.iterate_batches)
    assert trained < math.log(2)
    with pytest.raises(ValueError, match=r"objective 'dpo' needs ref_chosen_logps and ref_rejected_logps"):
        loss(model, *batch[:2])


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(**options: Any) -> list[float]:
        return [report["train_loss"] for report in run(load(folder), tmp_path, iters=3, **options).train]

    plain, layer, calls = losses(), llama.TransformerBlock, []
    checkpoint = mx.checkpoint
    monkeypatch.setattr(layer, "__call__", layer.__call__)  # mlx-lm patches the class for good; here it is put back
    monkeypatch.setattr(mx, "checkpoint", lambda function: calls.append(1) or checkpoint(function))
    assert losses(grad_checkpoint=True) == pytest.approx(plain, rel=1e-4)
    assert calls


def test_checkpointing_with_dropout_is_refused(folder: Path) -> None:
    model = load(folder)
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 10.0, "dropout": 0.1})

    class Checkpointed(type(model.layers[0])):  # type: ignore[misc]
        def checkpointed_fn(self, *args: Any) -> Any:
            return super().__call__(*args)

        __call__ = checkpointed_fn

    model.layers[0].__class__ = Checkpointed
    for objective in ("gapo", "simpo"):
        with pytest.raises(ValueError, match="grad_checkpoint draws other dropout masks"):
            adapter.make_loss(objective=objective)(model.train(), *one_batch())


@pytest.mark.parametrize("anchor", ["exact", pytest.param("first_order", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("mlx_compiles")
def test_compiled_equals_eager(folder: Path, tmp_path: Path, anchor: str) -> None:
    """mlx-lm's step, as it compiles it itself."""
    config = gapo.GAPOConfig(rho=0.3, anchor=anchor)

    def reports() -> list[list[float]]:
        found = run(load(folder), tmp_path, iters=3, config=config).train
        return [[report["train_loss"], report["gapo/weight_min"]] for report in found]

    compiled = reports()
    mx.disable_compile()
    np.testing.assert_allclose(compiled, reports(), rtol=1e-4)


def test_a_saved_adapter_loads_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder, lora=True)
    run(model, tmp_path)
    config = {"fine_tune_type": "lora", "num_layers": 2}
    config["lora_parameters"] = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path))
    ours, theirs = (adapter.pair_logps(m.eval(), one_batch())[0] for m in (model, loaded))
    assert_close({"logps": theirs}, {"logps": ours}, 1e-4)


def test_pairs_in_mlx_lms_folder_convention(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "train.jsonl", data.generate_pairs(6))
    train_rows, valid = adapter.load_pairs(tmp_path, token_pairs.tokenizer(), max_length=40)
    assert (len(train_rows), valid) == (6, [])
    assert max(len(row["chosen_input_ids"]) for row in train_rows) <= 40
    data.write_rows(tmp_path / "valid.jsonl", data.generate_pairs(3, split="test"))
    assert len(adapter.load_pairs(tmp_path, token_pairs.tokenizer())[1]) == 3
    with pytest.raises(data.PairError, match=r"train\.jsonl does not exist"):
        adapter.load_pairs(tmp_path / "gone", token_pairs.tokenizer())


def test_ranks_share_a_batch() -> None:
    class Group:
        def __init__(self, rank: int) -> None:
            self._rank = rank

        def rank(self) -> int:
            return self._rank

        def size(self) -> int:
            return 2

    rows = token_pairs.pairs(8)
    whole = one_batch(4)[0]
    parts = [next(adapter.iterate_batches(rows, 4, 64, comm_group=Group(rank)))[0] for rank in (0, 1)]
    assert [tuple(part.shape) for part in parts] == [(4, whole.shape[1])] * 2
    seen = sorted(tuple(row.tolist()) for part in parts for row in part)
    assert seen == sorted(tuple(row.tolist()) for row in whole)
    with pytest.raises(ValueError, match="batch_size=3 pairs cannot be divided among 2 ranks"):
        next(adapter.iterate_batches(rows, 3, 64, comm_group=Group(0)))
    with pytest.raises(ValueError, match=r"a row has \d+ tokens, more than max_seq_length=8: pass max_length=8"):
        next(adapter.iterate_batches(rows, 4, 8))


def test_a_tied_model_has_pytorchs_gaps(tmp_path: Path) -> None:
    """The head that both leave out is the embedding."""
    torch = require("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from gapo.adapters.hf.margins import pair_logps

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    there = LlamaForCausalLM(LlamaConfig(vocab_size=token_pairs.VOCAB, **sizes, tie_word_embeddings=True)).eval()
    there.save_pretrained(tmp_path)
    here, _ = load_model(tmp_path)
    assert "lm_head" not in here
    arrays = token_pairs.arrays(4)
    batch = {name: torch.from_numpy(x) for name, x in arrays.items()}
    stacked = [
        mx.array(np.concatenate([arrays[f"{side}_{part}"] for side in ("chosen", "rejected")]))
        for part in ("input_ids", "labels")
    ]
    gaps = {}
    for perturb in ("backbone", "all"):
        config = gapo.GAPOConfig(rho=0.3, perturb=perturb)
        expected, _ = gapo.value_and_grad(pair_logps, config, backend="torch")(there, batch)
        found, _ = bare_step(here, stacked, config)
        gaps[perturb] = np.array(found.anchor_gaps)
        np.testing.assert_allclose(gaps[perturb], expected.anchor_gaps.numpy(), rtol=1e-3, atol=2e-5)
    assert np.abs(gaps["all"] - gaps["backbone"]).max() > 0.005


def held(objective: Any, steps: int = 3) -> float:
    """Bytes that stay allocated by steps whose caller evaluates what it trains, in weights."""
    model, batch = mlx_models.make("llama"), mlx_models.batch(4, 48)
    optimizer, loss = optim.SGD(1e-3), adapter.make_loss(CONFIG, objective=objective)
    value_and_grad = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> None:
        optimizer.update(model, value_and_grad(model, *batch)[1])

    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    before = mx.get_active_memory()
    for _ in range(steps):
        step(*batch)
        mx.eval(model.parameters(), optimizer.state)
    held = float(mx.get_active_memory() - before) / weights
    assert adapter.last_metrics(model)
    return held


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("quick_kernels")
def test_metrics_hold_no_graph(compiled: bool) -> None:
    try:
        if compiled:
            mx.enable_compile()
        assert held("gapo") <= held("simpo") + 0.5
        assert held(drifting) <= held("simpo") + 0.5
    finally:
        mx.disable_compile()


@pytest.mark.parametrize("objective", ["gapo", "simpo"])
def test_the_results_that_on_step_gets_hold_none_either(objective: str) -> None:
    model, results = mlx_models.make("llama"), []
    loss = adapter.make_loss(CONFIG, objective=objective, on_step=results.append)
    mx.eval(nn.value_and_grad(model, loss)(model, *mlx_models.batch(4, 48))[1])
    model.pop("_gapo_train")
    before = mx.get_active_memory()
    results.clear()
    assert before - mx.get_active_memory() < 0.1 * sum(x.nbytes for _, x in tree_flatten(model.parameters()))


def squares(logps: gapo.objectives.LogProbs) -> Any:
    return (1 - logps.margins) ** 2


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_an_objective_of_ones_own(sft_weight: float) -> None:
    """Against `mx.grad` of the formula; reading the loss's value within the gradient changes nothing."""
    model, results = mlx_models.make("llama"), []
    config = gapo.GAPOConfig(sft_weight=sft_weight)
    loss = adapter.make_loss(config, objective=squares, on_step=results.append)

    def read(model: nn.Module, *batch: mx.array) -> mx.array:
        value, _ = loss(model, *batch)
        assert value.item() > 0
        return value

    def formula(model: nn.Module, *batch: mx.array) -> mx.array:
        chosen, rejected = adapter.pair_logps(model, batch)
        return mx.mean((1 - chosen + rejected) ** 2 - sft_weight * chosen)

    expected, grads = nn.value_and_grad(model, formula)(model, *mlx_models.batch(4))
    value, found = nn.value_and_grad(model, read)(model, *mlx_models.batch(4))
    assert_close(found, grads)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    chosen, rejected = adapter.pair_logps(model, mlx_models.batch(4))
    np.testing.assert_allclose(results[0].weights, 2 * (1 - chosen + rejected), rtol=1e-4)
    assert results[0].anchor_gaps is None
    metrics = adapter.last_metrics(model)
    assert metrics["gapo/weight_mean"] == pytest.approx(float(mx.mean(results[0].weights)), rel=1e-5)
    model.eval()
    assert float(loss(model, *mlx_models.batch(4))[0]) == pytest.approx(
        float(mx.mean((1 - chosen + rejected) ** 2)), rel=1e-5
    )
    if sft_weight:
        with pytest.raises(ValueError, match=r"in evaluation mode, .* no SFT term"):
            nn.value_and_grad(model, loss)(model, *mlx_models.batch(4))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("quick_kernels")
def test_running_statistics_go_on_from_batch_to_batch(compiled: bool) -> None:
    """Also within a compiled step, also over the same model after another loss, and from where a training stopped."""
    model = mlx_models.make("llama").train()
    last = 0.0

    def train(running: Any, before: float) -> float:
        optimizer, loss = optim.SGD(0.1), adapter.make_loss(objective=drifting, running=running)
        value_and_grad, state = nn.value_and_grad(model, loss), [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(*batch: mx.array) -> mx.array:
            (value, _), grads = value_and_grad(model, *batch)
            optimizer.update(model, grads)
            return value

        for batch in (mlx_models.batch(4),) * 4:
            chosen, rejected = adapter.pair_logps(model, batch)
            row = by_hand([(chosen - rejected).tolist()], before=before)[0]
            value = step(*batch)
            mx.eval(value, state)
            found, before = adapter.last_metrics(model), row["mean"]
            assert float(value) == pytest.approx(row["loss"], rel=1e-5)
            assert found["gapo/weight_mean"] == pytest.approx(row["weights"].mean(), rel=1e-5)
            assert found["gapo/running/mean"] == pytest.approx(before, rel=1e-5, abs=1e-6)
        return found["gapo/running/mean"]

    try:
        if compiled:
            mx.enable_compile()
        for _ in range(2):  # a new loss begins anew
            last = train(None, 0.0)
        train({"mean": last}, last)
    finally:
        mx.disable_compile()


def test_running_statistics_of_another_objective_are_refused() -> None:
    loss = adapter.make_loss(objective=drifting, running={"gapo/running/mean": 1.0})
    with pytest.raises(ValueError, match=r"running names 'gapo/running/mean'; the .* of this objective are 'mean'"):
        loss(mlx_models.make("llama").train(), *mlx_models.batch())
    with pytest.raises(ValueError, match="running names 'mean'; the running statistics of this objective are none"):
        adapter.make_loss(running={"mean": 1.0})(mlx_models.make("llama").train(), *mlx_models.batch())


def tiny_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised pairs over the vocabulary of `mlx_models`, of unequal lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = rng.integers(1, mlx_models.VOCAB, 3).tolist()
        row = {}
        for side in ("chosen", "rejected"):
            answer = rng.integers(1, mlx_models.VOCAB, rng.integers(2, 6)).tolist()
            row |= {f"{side}_input_ids": prompt + answer, f"{side}_labels": [-100] * 3 + answer}
        rows.append(row)
    return rows


def test_another_loss_cannot_digest_our_batches_nor_ours_another_batch(tmp_path: Path) -> None:
    model, rows = mlx_models.make("llama"), tiny_rows(4)
    args = TrainingArgs(batch_size=2, iters=1, max_seq_length=64, adapter_file=str(tmp_path / "a.safetensors"))
    for call in (
        lambda: train(model, optim.SGD(0.1), rows, None, args, iterate_batches=adapter.iterate_batches),
        lambda: evaluate(model, rows, 2, -1, 64, iterate_batches=adapter.iterate_batches),
    ):
        with pytest.raises(TypeError, match=r"default_loss\(\) takes 3 positional arguments but 4 were given"):
            call()
    texts = [(row["chosen_input_ids"], 3) for row in rows]
    with pytest.raises(ValueError, match=r"got \(2, 33\) and \(2, 2\)\. .* iterate_batches=gapo"):
        train(model.train(), optim.SGD(0.1), texts, None, args, loss=adapter.loss)


def test_batches_that_are_no_pairs_are_refused() -> None:
    model, (ids, labels) = mlx_models.make("llama"), mlx_models.batch()
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(ValueError, match=r"each \(2N, seq\), chosen rows first; got \(3, 6\) and \(3, 6\)"):
            adapter.loss(model, ids[:3], labels[:3])
        with pytest.raises(ValueError, match=r"got \(4, 6\) and \(4, 5\)"):
            adapter.loss(model, ids, labels[:, 1:])
    tuples = mlx_models.make("llama")
    with pytest.raises(TypeError, match=r"the model must return logits, an array .* got tuple"):
        adapter.pair_logps(lambda x: (tuples(x), None), (ids, labels))  # type: ignore[arg-type]


def test_left_padding_is_refused_and_right_padding_is_exact() -> None:
    rows, model = tiny_rows(3), mlx_models.make("mamba")
    right, left = (data.collate_pairs(rows, pad_token_id=0, padding_side=side) for side in ("right", "left"))
    singly = [adapter.pair_logps(model, data.collate_pairs([row], pad_token_id=0)) for row in rows]
    found = adapter.pair_logps(model, right)
    for side in (0, 1):
        np.testing.assert_allclose(np.array(found[side]), [float(one[side][0]) for one in singly], rtol=1e-5)
    with pytest.raises(ValueError, match=r"padded on the left, .* padding_side='right'"):
        adapter.pair_logps(model, left)
    ids, labels = (
        mx.array(np.concatenate([left[f"{side}_{part}"] for side in ("chosen", "rejected")]))
        for part in ("input_ids", "labels")
    )
    with pytest.raises(ValueError, match="padded on the left"):
        adapter.loss(model, ids, labels)


def test_data_sets_as_people_pass_them() -> None:
    rows = tiny_rows(4)
    plain, cached = (next(adapter.iterate_batches(each, 4, 64)) for each in (rows, CacheDataset(rows)))
    assert all(mx.array_equal(a, b) for a, b in zip(plain, cached, strict=True))
    with pytest.raises(ValueError, match=r"row 0 is not a tokenised pair: it is the columns .*prompt, .* load_pairs"):
        next(adapter.iterate_batches(data.generate_pairs(4), 4, 64))
    with pytest.raises(ValueError, match=r"row 0 is not a tokenised pair: it is a list"):
        next(adapter.iterate_batches([[1, 2, 3]] * 4, 4, 64))  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"has 4 pairs, fewer than batch_size=8: give more pairs or a smaller"):
        next(adapter.iterate_batches(rows, 8, 64, loop=True))
    with pytest.raises(ValueError, match="has 0 pairs"):
        next(adapter.iterate_batches([], 8, 64))


def test_a_validation_set_smaller_than_the_batch_is_one_batch(tmp_path: Path) -> None:
    model, rows, valid = mlx_models.make("llama"), tiny_rows(4), tiny_rows(3, seed=1)
    args = TrainingArgs(batch_size=4, iters=1, max_seq_length=64, adapter_file=str(tmp_path / "a.safetensors"))
    report = adapter.MetricsCallback(model)
    chosen, rejected = adapter.pair_logps(model, data.collate_pairs(valid, pad_token_id=0))
    expected = float(mx.mean(mx.logaddexp(mx.array(0.0), CONFIG.gamma - CONFIG.beta * (chosen - rejected))))
    train(
        model,
        optim.SGD(0.0),
        rows,
        valid,
        args,
        loss=adapter.make_loss(CONFIG),
        iterate_batches=adapter.iterate_batches,
        training_callback=report,
    )
    assert report.valid[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert report.valid[0]["rewards/accuracies"] == pytest.approx(float(mx.mean(chosen > rejected)))


def test_metrics_of_an_evaluation_are_means_over_its_pairs() -> None:
    model, rows = mlx_models.make("llama"), tiny_rows(6)
    loss = adapter.make_loss(CONFIG)
    for _ in range(2):  # what was asked for is not added to
        evaluate(model, rows, 2, -1, 64, loss=loss, iterate_batches=adapter.iterate_batches)
        chosen, rejected = adapter.pair_logps(model, data.collate_pairs(rows, pad_token_id=0))
        found = adapter.last_metrics(model, evaluation=True)
        assert found["logps/chosen"] == pytest.approx(float(mx.mean(chosen)), rel=1e-5)
        assert found["rewards/accuracies"] == pytest.approx(float(mx.mean(chosen > rejected)))
        assert adapter.last_metrics(model, evaluation=True) == found
    evaluate(model, rows[:2], 2, -1, 64, loss=loss, iterate_batches=adapter.iterate_batches)
    model.update(tree_map(lambda x: 2 * x, model.parameters()))  # as an optimiser does, and nobody asked
    evaluate(model, rows[2:4], 2, -1, 64, loss=loss, iterate_batches=adapter.iterate_batches)
    chosen, _ = adapter.pair_logps(model, data.collate_pairs(rows[2:4], pad_token_id=0))
    found = adapter.last_metrics(model, evaluation=True)
    assert found["logps/chosen"] == pytest.approx(float(mx.mean(chosen)), rel=1e-5)


def test_wandb_gets_the_metrics_in_one_order_and_a_warning_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    wandb = SimpleNamespace(init=lambda **_: None, log=lambda row, step: logged.append(dict(row)))
    monkeypatch.setattr(callbacks, "wandb", wandb)
    model = mlx_models.make("llama")
    adapter.loss(model, *mlx_models.batch())
    tracker = callbacks.WandBCallback("project", "logs", {})
    adapter.MetricsCallback(model, then=tracker).on_train_loss_report({"iteration": 1})
    assert "gapo/weight_mean" in logged[-1]
    wrapped = adapter.MetricsCallback(model)
    tracker = callbacks.WandBCallback("project", "logs", {}, wrapped_callback=wrapped)
    with pytest.warns(UserWarning, match=r"turn them round, MetricsCallback\(model, then=WandBCallback\(\.\.\.\)\)"):
        tracker.on_train_loss_report({"iteration": 1})
    assert "gapo/weight_mean" in wrapped.train[-1]
    tracker.on_train_loss_report({"iteration": 2})  # once


def test_a_gradient_in_evaluation_mode_is_refused() -> None:
    """mlx_lm.load leaves a model in evaluation mode, and a loop of one's own would train on the loss without anchor."""
    model = mlx_models.make("llama").eval()
    assert float(adapter.loss(model, *mlx_models.batch())[0]) > 0
    with pytest.raises(ValueError, match=r"in evaluation mode, .* call model\.train\(\) before training"):
        nn.value_and_grad(model, adapter.loss)(model, *mlx_models.batch())
    nn.value_and_grad(model.train(), adapter.loss)(model, *mlx_models.batch())


def test_a_model_that_cannot_train_is_named() -> None:
    model = mlx_models.make("llama", hidden_size=32, head_dim=16, intermediate_size=32)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.warns(UserWarning, match=r"no adapters: 9 packed matrices stay .*linear_to_lora_layers first"):
        adapter.loss(model, *mlx_models.batch())
    model.freeze()
    with pytest.raises(ValueError, match=r"no trainable parameter \(all are frozen\)"):
        adapter.MetricsCallback(model)


def test_gapo_train_refuses_a_quantised_folder(tmp_path: Path) -> None:
    from gapo.runs.errors import ConfigError
    from gapo.runs.train.train_config import TrainConfig
    from gapo.runs.train.train_mlx import MlxTrainee

    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32}
    model = mlx_models.make("llama", **sizes)
    config = {**vars(model.args), "quantization": {"group_size": 32, "bits": 4}}
    nn.quantize(model, **config["quantization"])
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    token_pairs.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is quantised \(.*packed integers\), and gapo train with backend mlx"):
        MlxTrainee(TrainConfig(backend="mlx"), CONFIG, str(tmp_path))


def test_what_the_docs_save_loads_again(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "mlx.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "model")
    Path("pairs").mkdir()
    for name in ("train", "valid"):
        data.write_rows(Path("pairs") / f"{name}.jsonl", data.generate_pairs(4))
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    loaded, _ = mlx_lm.load("model", adapter_path="adapters")
    trained = dict(tree_flatten(names["model"].trainable_parameters()))
    assert trained
    for name, x in tree_flatten(loaded.parameters()):
        if name in trained:
            np.testing.assert_array_equal(np.array(x), np.array(trained[name]))
    ours, theirs = (adapter.pair_logps(m.eval(), one_batch())[0] for m in (names["model"], loaded))
    assert_close({"logps": theirs}, {"logps": ours}, 1e-4)


def test_target_gap_finds_the_radius_that_spreads_the_gaps_so(folder: Path, tmp_path: Path) -> None:
    """In the reports of mlx-lm's own training; the same radius, set by hand, makes the same first report."""
    config = gapo.GAPOConfig(target_gap=0.3, anchor="first_order")
    reports = run(load(folder), tmp_path, iters=2, config=config).train
    assert [row["gapo/anchor_gap_std"] for row in reports] == pytest.approx([0.3, 0.3], rel=1e-3)
    rho = reports[0]["gapo/rho"]
    assert abs(reports[1]["gapo/rho"] / rho - 1) > 1e-3
    by_hand = run(load(folder), tmp_path, iters=1, config=gapo.GAPOConfig(rho=rho, anchor="first_order")).train
    for name in ("gapo/anchor_gap_mean", "gapo/anchor_gap_std", "gapo/weight_min", "gapo/radius"):
        assert by_hand[0][name] == pytest.approx(reports[0][name], rel=1e-3), name
