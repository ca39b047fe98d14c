"""A policy whose lower layers are frozen: their states are computed once, and change nothing but the cost."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch

import gapo
from gapo.data import generate_pairs
from gapo.data.flip import swapped
from gapo.pairs import REFERENCE
from gapo.runs.errors import ConfigError
from gapo.runs.policy import states
from gapo.runs.policy.fit import bucketed, fit
from gapo.runs.policy.frozen import require_same, states_of, train_last
from gapo.runs.policy.pair_batches import Row, pair_logps
from gapo.runs.policy.policy import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("policy")
    hf_models.make("llama", layers=3).save_pretrained(made)
    hf_models.tokenizer().save_pretrained(made)
    return made


def prepared(folder: Path, cache: Path, count: int = 6, layers: int | None = 1) -> tuple[Policy, list[Row]]:
    policy = Policy(folder, cache=cache, train_layers=layers)
    tokens = policy.tokenized(generate_pairs(count, seed=0), 64)
    policy.prepare({"all": tokens})
    return policy, tokens


def without_states(tokens: list[Row]) -> list[Row]:
    return [{name: x for name, x in row.items() if not name.endswith("states")} for row in tokens]


def test_log_probabilities_from_the_states_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    policy, tokens = prepared(folder, tmp_path)
    for row, logps in zip(tokens, policy.logps(tokens), strict=True):
        for side, measured in zip(("chosen", "rejected"), logps, strict=True):
            labels = row[f"{side}_labels"]
            # The mean of the negative log-probabilities is the loss that transformers computes from labels.
            ids = torch.tensor([row[f"{side}_input_ids"]])
            with torch.no_grad():
                loss = policy.model(input_ids=ids, labels=torch.tensor([labels])).loss
            assert measured == pytest.approx(-float(loss), abs=1e-5)


@pytest.mark.parametrize("settings", [{"anchor": "exact"}, {"anchor": "first_order"}, {"last_layers": 1}])
def test_training_from_the_states_is_training_of_the_whole_forward(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    policy, tokens = prepared(folder, tmp_path, 8, layers=2)
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.2, **settings), backend="torch")
    order = [np.arange(4), np.arange(4, 8), np.arange(8)[::2]]
    weights = []
    for rows in (tokens, without_states(tokens)):
        fit(policy, rows, order, step, learning_rate=1e-2)
        weights.append({name: p.detach().clone() for name, p in policy.model.named_parameters()})
    first = {name: p.clone() for name, p in Policy(folder, cache=tmp_path).model.named_parameters()}
    for name, p in first.items():
        trained = "layers.1." in name or "layers.2." in name
        assert torch.equal(p, weights[0][name]) != trained, name
        # AdamW's first steps go a learning rate far, whatever the gradient; where it is nearly 0 they may differ.
        assert float((weights[0][name] - weights[1][name]).abs().mean()) < 1e-4, name
    policy.reset()
    assert all(torch.equal(p, first[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_frozen_head_sees_the_answers_alone_and_the_gradients_are_the_same(
    folder: Path, tmp_path: Path, cap: float | None
) -> None:
    """Against plain autograd through the whole logits; also where the model goes on behind its head."""
    policy, tokens = prepared(folder, tmp_path)
    model, head = policy.model, policy.model.get_output_embeddings()
    whole_forward = type(model).forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = whole_forward(model, *args, **kwargs)
        output.logits = output.logits if cap is None else cap * torch.tanh(output.logits / cap)
        return output

    model.forward = capped
    (batch,) = policy.batches(tokens, 6, [np.arange(6)])
    _, grads = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.0), "simpo", backend="torch")(model, batch)
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.2, anchor="first_order"), backend="torch")
    step(model, batch)  # the first one compares itself with autograd
    shapes: list[torch.Size] = []
    backwards: list[torch.Size] = []

    def watch(_: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        shapes.append(args[0].shape[:-1])
        output.register_hook(lambda grad: backwards.append(grad.shape[:-1]))

    handle = head.register_forward_hook(watch)
    step(model, batch)
    handle.remove()
    answers = sum(sum(t != -100 for t in row[f"{side}_labels"]) for row in tokens for side in ("chosen", "rejected"))
    assert shapes == [(answers,) if cap is None else (12, len(batch["columns"]))]
    assert len(backwards) == 1

    total = torch.zeros(())
    for row in tokens:
        logps = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{side}_input_ids"]])
            picked = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            logps[side] = picked[torch.tensor(row[f"{side}_labels"])[1:] != -100].mean()
        z = 2.5 * (logps["chosen"] - logps["rejected"]) - 0.25
        total = total - torch.nn.functional.logsigmoid(z) / len(tokens)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(total, list(trained.values()))
    for name, grad in zip(trained, expected, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6)


def test_running_statistics_go_from_step_to_step_and_end_with_the_run(folder: Path, tmp_path: Path) -> None:
    """RE-PO's share of true labels: by its formula from the weights of each batch, over two micro-batches a step."""
    policy, tokens = prepared(folder, tmp_path, 8)
    plain = gapo.value_and_grad(pair_logps, objective="re_po", backend="torch")
    etas = [0.9]

    def step(model: Any, batch: Any, *, running: Any) -> Any:
        eta = 0.9 if running is None else float(running["reliability"])
        assert eta == pytest.approx(etas[-1], abs=1e-6)
        result, grads = plain(model, batch, running=running)
        p = torch.sigmoid(0.1 * result.log_ratio_margins)
        etas.append(0.9 * eta + 0.1 * float((eta * p / (eta * p + (1 - eta) * (1 - p))).mean()))
        return result, grads

    fit(policy, tokens, [np.arange(8)] * 3, step, learning_rate=1e-2, anchor_pairs=4)
    assert len(etas) == 7
    assert abs(etas[-2] - 0.9) > 1e-3  # away from where it starts, which the first batches, at margins of 0, are not
    etas[:] = [0.9]
    fit(policy, tokens, [np.arange(8)], step, learning_rate=1e-2)


def test_swapped_pairs_keep_their_states(folder: Path, tmp_path: Path) -> None:
    policy, tokens = prepared(folder, tmp_path)
    np.testing.assert_allclose(
        policy.logps([swapped(row) for row in tokens]), policy.logps(tokens)[:, ::-1], rtol=0, atol=1e-5
    )


def test_states_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_BLOCK", 4)
    _, tokens = prepared(folder, tmp_path)
    (kept,) = tmp_path.glob("states-*")
    assert [path.name for path in sorted(kept.iterdir())] == ["00000.npy", "00001.npy", "00002.npy"]
    (kept / "00001.npy").unlink()
    computed = []
    compute = states.states_of
    monkeypatch.setattr(states, "states_of", lambda *call: computed.append(len(call[1])) or compute(*call))
    _, again = prepared(folder, tmp_path)
    assert computed == [4]  # of the file that is gone
    for row, other in zip(tokens, again, strict=True):
        np.testing.assert_allclose(row["chosen_states"], other["chosen_states"], rtol=0, atol=1e-6)


def test_flipped_reordered_and_repeated_pairs_share_the_states(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokens = prepared(folder, tmp_path)
    monkeypatch.setattr(states, "states_of", lambda *call: pytest.fail("computed anew"))
    others = [swapped(row) for row in policy.tokenized(generate_pairs(6, seed=0), 64)[::-1]]
    policy.prepare({"all": [*others, *policy.tokenized(generate_pairs(2, seed=0), 64)]})
    for row, other in zip(tokens[::-1], others, strict=True):
        for side, opposite in (("chosen", "rejected"), ("rejected", "chosen")):
            np.testing.assert_array_equal(row[f"{side}_states"], other[f"{opposite}_states"])


@pytest.mark.parametrize("layers", [None, 1])
def test_pairs_that_are_prepared_again_are_read(
    folder: Path, tmp_path: Path, layers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tokens = prepared(folder, tmp_path, layers=layers)
    first = [dict(row) for row in tokens]
    measured: list[int] = []
    monkeypatch.setattr(policy, "logps", lambda rows: measured.append(len(rows)))
    policy.prepare({"all": tokens})
    assert measured == []
    (_,) = tmp_path.glob("**/reference-*.safetensors")
    for row, other in zip(first, tokens, strict=True):
        assert all(row[name] == other[name] for name in REFERENCE)
    tokens[0]["chosen_labels"][-1] = -100  # other pairs are measured
    monkeypatch.undo()
    policy.prepare({"all": tokens})
    assert tokens[0][REFERENCE[0]] != first[0][REFERENCE[0]]


@pytest.mark.parametrize("layers", [None, 1])
def test_the_reference_of_a_trained_policy_is_the_policy_at_the_start(
    folder: Path, tmp_path: Path, layers: int | None
) -> None:
    _, expected = prepared(folder, tmp_path / "untrained", layers=layers)
    policy = Policy(folder, cache=tmp_path / "trained", train_layers=layers)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(p.requires_grad * 0.1)
    trained = {name: p.clone() for name, p in policy.model.named_parameters()}
    tokens = policy.tokenized(generate_pairs(6, seed=0), 64)
    start = policy.prepare({"all": tokens})["all"]
    for row, other in zip(tokens, expected, strict=True):
        assert [row[name] for name in REFERENCE] == [other[name] for name in REFERENCE]
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {
        path.name for path in (tmp_path / "untrained").iterdir()
    }
    assert all(torch.equal(p, trained[name]) for name, p in policy.model.named_parameters())
    assert not np.allclose(policy.logps(tokens), start)


def test_states_of_other_weights_layers_and_pairs_are_others(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    hf_models.make("llama", layers=3, seed=1).save_pretrained(other)
    hf_models.tokenizer().save_pretrained(other)
    for model, count, layers in ((folder, 6, 1), (folder, 6, 2), (folder, 5, 1), (other, 6, 1)):
        prepared(model, tmp_path / "cache", count, layers)
    assert len(list((tmp_path / "cache").glob("states-*"))) == 4
    prepared(folder, tmp_path / "cache", 6, layers=3)  # nothing is frozen but the embeddings
    assert len(list((tmp_path / "cache").glob("states-*"))) == 4


@pytest.mark.parametrize("damage", [b"", b"no array", "short"])
def test_damaged_states_are_refused(folder: Path, tmp_path: Path, damage: bytes | str) -> None:
    prepared(folder, tmp_path)
    (path,) = tmp_path.glob("states-*/*.npy")
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(ConfigError, match=r"00000.npy (is damaged|has \d+ states for)"):
        prepared(folder, tmp_path)


def test_states_that_are_others_are_refused(folder: Path, tmp_path: Path) -> None:
    prepared(folder, tmp_path)
    (path,) = tmp_path.glob("states-*/*.npy")
    np.save(path, np.load(path)[::-1])
    with pytest.raises(ConfigError, match="computes other values from the states"):
        prepared(folder, tmp_path)


def test_a_model_whose_layers_share_more_than_their_states_is_refused(folder: Path, tmp_path: Path) -> None:
    policy = Policy(folder, cache=tmp_path, train_layers=1)
    first, *_, last = policy.model.model.layers
    seen: list[Any] = []
    first.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    last.register_forward_hook(lambda layer, args, output: output + seen[-1] * (len(seen) % 2 + 1))
    with pytest.raises(ConfigError, match="computes other values from the states"):
        policy.prepare({"all": policy.tokenized(generate_pairs(4, seed=0), 64)})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_rounding_is_the_only_difference_that_is_let_pass(precision: str) -> None:
    """States that are 1 % off are others in 32 bits, and what rounding makes of them in 16."""
    model = hf_models.make("llama", layers=3)
    train_last(model, 1)
    model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    ids = hf_models.batch()["chosen_input_ids"]
    states = torch.stack([torch.from_numpy(x) for x in states_of(model, ids.tolist(), 0)])
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) * states.std()

    def compare(share: float) -> None:
        moved = (states + share * noise).to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            require_same(model, moved, {"input_ids": ids, "use_cache": False}, which="it", advice="leave it")

    compare(0.0)
    refusal = pytest.raises(ConfigError, match=r"^it computes other values from the states .*: leave it$")
    with refusal if precision == "float32" else nullcontext():
        compare(0.01)
    for share in (0.5, float("nan")):
        with pytest.raises(ConfigError, match="computes other values"):
            compare(share)


@pytest.mark.parametrize("count", [0, 4])
def test_more_layers_than_there_are_is_refused(folder: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"train_layers must be in 1 to 3, .*got {count}"):
        Policy(folder, cache=tmp_path, train_layers=count)


def test_a_model_without_layers_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (torch.nn.Linear(2, 2), hf_models.tokenizer())
    monkeypatch.setattr("gapo.runs.policy.policy.load_model", lambda *args, **kwargs: plain)
    with pytest.raises(ConfigError, match=r"layers stand in an nn.ModuleList; Linear has none"):
        Policy(folder, cache=tmp_path, train_layers=1)


def test_pairs_beyond_the_positions_are_refused(folder: Path, tmp_path: Path) -> None:
    policy = Policy(folder, cache=tmp_path)
    tokens = policy.tokenized(generate_pairs(2, seed=0), 64)
    policy.model.config.max_position_embeddings = 5
    with pytest.raises(ConfigError, match="has 5 positions"):
        policy.prepare({"all": tokens})


def test_batches_hold_each_pair_once_and_neighbours_in_length() -> None:
    lengths = np.arange(100) % 37
    made = bucketed(lengths, 8, np.random.default_rng(0))
    every = np.concatenate(made)
    assert len(every) == len(set(every.tolist())) == 96  # of the 13 batches one is incomplete
    assert np.mean([np.ptp(lengths[batch]) for batch in made]) < 12
