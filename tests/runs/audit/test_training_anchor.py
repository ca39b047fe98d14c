"""The anchor of training pairs: its direction by hand, gaps that are odd, weights as they were."""

import hf_models
import numpy as np
import pytest
import torch

from gapo.config import GAPOConfig
from gapo.data import generate_pairs
from gapo.data.flip import swapped
from gapo.runs.audit.training_anchor import training_anchor
from gapo.runs.policy.pair_batches import Row, pair_logps
from gapo.runs.policy.policy import Policy

CONFIG = GAPOConfig(rho=0.3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("policy")
    hf_models.make("llama").save_pretrained(folder)
    hf_models.tokenizer().save_pretrained(folder)
    return Policy(folder, cache=folder / "cache")


@pytest.fixture(scope="module")
def tokens(policy: Policy) -> list[Row]:
    return policy.tokenized(generate_pairs(40, seed=1), 64)


def margins(policy: Policy, rows: list[Row]) -> np.ndarray:
    logps = policy.logps(rows)
    return logps[:, 0] - logps[:, 1]


def test_the_anchor_is_that_of_the_mean_probe_gradient_of_the_pairs(policy: Policy, tokens: list[Row]) -> None:
    trained = tokens[:35]  # of which the last batch is smaller
    model = policy.model
    batch = policy.batches(trained, len(trained))[0]
    chosen, rejected = pair_logps(model, batch)
    loss = -torch.nn.functional.logsigmoid(CONFIG.beta * (chosen - rejected) - CONFIG.gamma).mean()
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    names = [name for name, p in model.named_parameters() if id(p) not in head]
    parameters = dict(model.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))
    with torch.no_grad():
        norm = sum(float((parameters[name] * g).square().sum()) for name, g in grads.items()) ** 0.5
        wanted = {name: parameters[name] + CONFIG.rho * parameters[name] ** 2 * g / norm for name, g in grads.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with training_anchor(policy, trained, CONFIG):
        for name, p in parameters.items():
            torch.testing.assert_close(p.detach(), wanted.get(name, before[name]), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_the_gap_of_a_pair_changes_its_sign_with_the_label(policy: Policy, tokens: list[Row]) -> None:
    judged = tokens[30:]
    rows = judged + [swapped(row) for row in judged]
    here = margins(policy, rows)
    with training_anchor(policy, tokens[:30], CONFIG):
        gaps = here - margins(policy, rows)
    np.testing.assert_allclose(gaps[:10], -gaps[10:], atol=1e-6)
    assert np.abs(gaps).max() > 1e-3


def test_the_weights_come_back_after_an_error(policy: Policy, tokens: list[Row]) -> None:
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), training_anchor(policy, tokens[:8], CONFIG):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
