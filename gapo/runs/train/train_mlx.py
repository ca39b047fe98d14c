"""The MLX side of `gapo train`: a model that mlx-lm loads, its AdamW and the MLX-LM adapter's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import load, save_config, save_model

from gapo.adapters.mlx_lm import last_metrics, make_loss, row_logits
from gapo.adapters.mlx_pairs import as_arrays
from gapo.config import GAPOConfig
from gapo.logp_options import PairLogps
from gapo.runs.errors import ConfigError
from gapo.runs.train import loop
from gapo.runs.train.loss_option import objective_of
from gapo.runs.train.run_data import RunData
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult


class MlxTrainee:
    """A model of mlx-lm and its AdamW."""

    def __init__(self, config: TrainConfig, step_config: GAPOConfig, model: str) -> None:
        try:
            self._model, wrapper, self._config = load(
                model, tokenizer_config={"trust_remote_code": False}, return_config=True
            )
        except (FileNotFoundError, ValueError, OSError) as error:
            raise ConfigError(f"model {model!r} could not be loaded by mlx-lm: {error}") from error
        self.tokenizer = wrapper._tokenizer
        packed = [name for name, x in tree_flatten(self._model.parameters()) if not mx.issubdtype(x.dtype, mx.floating)]
        if packed:
            raise ConfigError(
                f"model {model!r} is quantised ({packed[0]} and others are packed integers), and gapo train with "
                "backend mlx trains all weights: give an unquantised model, or train adapters over this one with "
                "gapo.adapters.mlx_lm (docs/mlx.md)"
            )
        self.vocabulary = next(len(m.weight) for m in self._model.modules() if isinstance(m, nn.Embedding))
        self._model.update(tree_map(lambda x: x.astype(mx.float32), self._model.parameters()))
        self._optimizer = optim.AdamW(0.0, weight_decay=config.weight_decay, bias_correction=True)
        self._optimizer.init(self._model.trainable_parameters())
        self._results: list[StepResult] = []
        self._make_loss = partial(
            make_loss,
            step_config,
            objective=objective_of(config.loss),
            objective_settings=config.loss_settings,
            **asdict(config.logp_options),
            on_step=self._results.append,
        )
        self._value_and_grad = nn.value_and_grad(self._model, self._make_loss())
        self._clip, self._accumulation = config.max_grad_norm, config.accumulation
        self._grads: list[Any] = []
        self._measured = PairLogps(row_logits, config.logp_options)
        mx.random.seed(config.seed)

    def train_step(self, batch: Mapping[str, np.ndarray], learning_rate: float) -> tuple[Mapping[str, Any], StepResult]:
        self._model.train()
        self._results.clear()
        _, grads = self._value_and_grad(self._model, *as_arrays(batch))
        self._grads.append(grads)
        if len(self._grads) == self._accumulation:
            mean = tree_map(lambda *g: sum(g) / len(g), *self._grads)
            mean, _ = optim.clip_grad_norm(mean, self._clip)
            self._optimizer.learning_rate = learning_rate
            self._optimizer.update(self._model, mean)
            self._grads.clear()
        mx.eval(self._model.state, self._optimizer.state, self._grads)
        return last_metrics(self._model), self._results[0]

    def measured(self, batch: Mapping[str, np.ndarray]) -> tuple[tuple[mx.array, mx.array], mx.array | None]:
        self._model.eval()
        self._measured.await_batch(batch)
        return self._measured(self._model, batch), self._measured.pair_weights()

    def state(self) -> dict[str, np.ndarray]:
        parts = {"model": self._model.parameters(), "optimizer": self._optimizer.state, "random": mx.random.state}
        return {name: np.array(x) for name, x in tree_flatten(parts)}

    def restore(self, arrays: dict[str, np.ndarray], running: Mapping[str, np.ndarray]) -> None:
        parts: Any = tree_unflatten([(name, mx.array(x)) for name, x in arrays.items()])
        self._model.update(parts["model"])
        self._optimizer.state = parts["optimizer"]
        states: Any = mx.random.state
        states[0][:] = parts["random"][0]
        loss = self._make_loss(running={name: float(value) for name, value in running.items()})
        self._value_and_grad = nn.value_and_grad(self._model, loss)

    def save(self, folder: Path) -> None:
        save_model(folder, self._model)
        save_config(dict(self._config), config_path=folder / "config.json")
        self.tokenizer.save_pretrained(folder)


def run(
    config: TrainConfig, step_config: GAPOConfig, data: RunData, model_name: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    trainee = MlxTrainee(config, step_config, model_name)
    return loop.train(trainee, config, step_config, data, trainee.tokenizer, folder)
