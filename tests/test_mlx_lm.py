"""GAPO in MLX-LM's own `train`: gradients as the step says, full and LoRA, evaluation, callbacks, adapters."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
import token_pairs
from frameworks import require
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import gapo
from gapo import data
from gapo.adapters import mlx_lm as adapter

CONFIG = gapo.GAPOConfig(rho=0.3)


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


def load(folder: Path, lora: bool = False) -> Any:
    model, _ = mlx_lm.load(str(folder))
    model.update(tree_map_float(model))
    if lora:
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    return model


def tree_map_float(model: nn.Module) -> Any:
    from mlx.utils import tree_map

    return tree_map(lambda x: x.astype(mx.float32), model.parameters())


def one_batch(pairs: int = 4, seed: int = 0) -> tuple[mx.array, mx.array]:
    return next(adapter.iterate_batches(token_pairs.pairs(8), pairs, 64, seed=seed))


def bare_step(model: nn.Module, batch: Any, config: gapo.GAPOConfig = CONFIG) -> Any:
    return gapo.value_and_grad(adapter.pair_logps, config, backend="mlx")(model, batch)


def assert_close(found: Any, expected: Any, tol: float = 2e-5) -> None:
    expected = dict(tree_flatten(expected))
    found = dict(tree_flatten(found))
    assert set(found) == set(expected)
    scale = max(float(mx.abs(x).max()) for x in expected.values())
    for name, x in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(x), rtol=tol, atol=tol * scale, err_msg=name)


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

    ids, labels = one_batch()
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


def run(
    model: nn.Module,
    tmp_path: Path,
    iters: int = 4,
    callback: Any = None,
    config: gapo.GAPOConfig = CONFIG,
    **options: Any,
) -> Any:
    optimizer = optim.SGD(options.pop("learning_rate", 0.1))
    args = TrainingArgs(
        batch_size=4,
        iters=iters,
        max_seq_length=64,
        steps_per_report=1,
        steps_per_eval=2,
        adapter_file=str(tmp_path / "adapters.safetensors"),
        **options,
    )
    callback = adapter.MetricsCallback(model) if callback is None else callback
    rows = token_pairs.pairs(8), token_pairs.pairs(8, seed=3)
    loss = adapter.make_loss(config)
    train(model, optimizer, *rows, args, loss=loss, iterate_batches=adapter.iterate_batches, training_callback=callback)
    return callback


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
    assert {"rewards/accuracies", "gapo/radius"} <= set(callback.train[0])
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


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path) -> None:
    # mlx-lm patches the layer's class for good, so a process of its own takes the checkpointed run.
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_mlx_lm as t; from pathlib import Path
model = t.load(Path({str(folder)!r}))
reports = t.run(model, Path({str(tmp_path)!r}), iters=3, grad_checkpoint=True).train
import json; print(json.dumps([r["train_loss"] for r in reports]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = [report["train_loss"] for report in run(load(folder), tmp_path, iters=3).train]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == pytest.approx(plain, rel=1e-4)


def test_checkpointing_with_dropout_is_refused(folder: Path) -> None:
    model = load(folder)
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 10.0, "dropout": 0.1})

    class Checkpointed(type(model.layers[0])):  # type: ignore[misc]
        def checkpointed_fn(self, *args: Any) -> Any:
            return super().__call__(*args)

        __call__ = checkpointed_fn

    model.layers[0].__class__ = Checkpointed
    with pytest.raises(ValueError, match="grad_checkpoint draws other dropout masks"):
        adapter.loss(model.train(), *one_batch())


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_compiled_equals_eager(folder: Path, tmp_path: Path, anchor: str) -> None:
    """The one test with mx.compile on: mlx-lm's compiled step, in a process where it is not disabled."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_mlx_lm as t; from pathlib import Path
import mlx.core as mx; mx.enable_compile()
model = t.load(Path({str(folder)!r}))
reports = t.run(model, Path({str(tmp_path)!r}), iters=3, config=t.gapo.GAPOConfig(rho=0.3, anchor={anchor!r})).train
import json; print(json.dumps([[r["train_loss"], r["gapo/weight_min"]] for r in reports]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "MLX_DISABLE_COMPILE"}
    environment["CI"] = environment.get("CI", "")
    code = code.replace("import test_mlx_lm", "import os; import test_mlx_lm")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    config = gapo.GAPOConfig(rho=0.3, anchor=anchor)
    plain = [
        [report["train_loss"], report["gapo/weight_min"]]
        for report in run(load(folder), tmp_path, iters=3, config=config).train
    ]
    np.testing.assert_allclose(json.loads(done.stdout.strip().splitlines()[-1]), plain, rtol=1e-4)


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
