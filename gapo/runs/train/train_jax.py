"""The JAX side of `gapo train`: Llama with `TrainState`, optax and the Flax adapter's step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState

from gapo.adapters.flax import make_train_step
from gapo.adapters.flax_pairs import measured
from gapo.config import GAPOConfig
from gapo.runs.models import llama
from gapo.runs.models.pretrained import load_tokenizer, require_same_ids
from gapo.runs.train import loop
from gapo.runs.train.loss_option import objective_of
from gapo.runs.train.run_data import RunData
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult


class JaxTrainee:
    """A Llama and its AdamW."""

    def __init__(self, config: TrainConfig, step_config: GAPOConfig, model: str, tokenizer: Any) -> None:
        self._source, self._tokenizer = Path(model), tokenizer
        settings, params = llama.load(model)
        self.vocabulary = len(params["model.embed_tokens.weight"])
        adamw = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=config.weight_decay)
        clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
        tx = optax.chain(clip, adamw)
        if config.accumulation > 1:
            tx = optax.MultiSteps(tx, config.accumulation).gradient_transformation()
        forward = lambda params, ids, _: llama.logits(params, ids, settings)  # noqa: E731
        self._state = TrainState.create(apply_fn=forward, params=params, tx=tx)
        self._step = make_train_step(
            forward,
            step_config,
            objective=objective_of(config.loss),
            objective_settings=config.loss_settings,
            **asdict(config.logp_options),
        )
        options = config.logp_options
        self._measured = jax.jit(lambda p, batch: measured(lambda ids, mask: forward(p, ids, mask), batch, options))
        self._running: Mapping[str, Any] | None = None
        self._key, self._draws = (
            jax.random.key(config.seed),
            step_config.direction == "gaussian",
        )  # Llama has no dropout

    def train_step(self, batch: Mapping[str, np.ndarray], learning_rate: float) -> tuple[Mapping[str, Any], StepResult]:
        opt_state = optax.tree.set(self._state.opt_state, learning_rate=np.float32(learning_rate))
        state = self._state.replace(opt_state=opt_state)
        key = jax.random.fold_in(self._key, int(state.step)) if self._draws else None
        self._state, metrics, result = self._step(state, batch, rng=key, running=self._running)
        self._running = result.running
        return metrics, result

    def measured(self, batch: Mapping[str, np.ndarray]) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
        return self._measured(self._state.params, dict(batch))

    def state(self) -> dict[str, np.ndarray]:
        return loop.named("leaf", jax.tree.leaves(self._state))

    def restore(self, arrays: dict[str, np.ndarray], running: Mapping[str, np.ndarray]) -> None:
        leaves, tree = jax.tree.flatten(self._state)
        restored = [jax.numpy.asarray(arrays[name]) for name in sorted(arrays)]
        self._state = jax.tree.unflatten(
            tree, [new.reshape(np.shape(old)) for new, old in zip(restored, leaves, strict=True)]
        )
        self._running = running or None

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):
            if (self._source / name).exists():
                shutil.copy(self._source / name, folder / name)
        weights = {name: np.ascontiguousarray(x) for name, x in self._state.params.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def require(config: TrainConfig, step_config: GAPOConfig) -> TrainConfig:
    """`loop.require_supported`, and ConfigError for a model that cannot be used, before pairs and weights are read."""
    config = loop.require_supported(config, step_config)
    if config.model != "tiny":
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        if config.tokenizer is not None:
            require_same_ids(tokenizer, config.tokenizer, config.model)
        llama.settings_of(config.model)
    return config


def run(
    config: TrainConfig, step_config: GAPOConfig, data: RunData, model_name: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    tokenizer = load_tokenizer(config.tokenizer or model_name)
    return loop.train(
        JaxTrainee(config, step_config, model_name, tokenizer), config, step_config, data, tokenizer, folder
    )
