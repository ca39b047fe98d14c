"""`DriftCallback`: how far the policy has moved from where it started, at every checkpoint of any `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

import gapo
from gapo.adapters.hf.batches import further_inputs, stack_pairs
from gapo.adapters.hf.callback import calling_trainer
from gapo.adapters.hf.drift.responses import Responses, prompt_of
from gapo.adapters.hf.drift.starting import Rows, StartingPolicy, adapters_change_nothing, answer_logits
from gapo.adapters.hf.models import end_tokens, forward_parameters, stay_differentiable, undo
from gapo.adapters.hf.models.prepared import Change
from gapo.backends.torch.random_state import RandomState
from gapo.data.tokenize import IGNORE_INDEX

logger = logging.getLogger(__name__)


class DriftCallback(TrainerCallback):
    """Log, at the start of a training and just before each checkpoint, how far the policy has drifted.

    `Trainer(..., callbacks=[GAPOCallback(config), DriftCallback()])`; with `GAPOTrainer` and with a plain `Trainer`
    alike. What it logs, to whatever `report_to` names:

    - `drift/kl`: KL(policy || starting policy) over the whole vocabulary, mean over the answers' tokens of the held-out
      sample, chosen and rejected, nats per token;
    - `drift/train_margin`, `drift/held_out_margin`: mean margin of a fixed sample of pairs, nats per token, and
      `..._accuracy`, the share of them above 0;
    - `drift/train_chosen_logps`, `drift/held_out_chosen_logps`: mean log-probability of chosen answers, nats per token;
    - `drift/response_length`, `drift/response_ended`: tokens of the responses generated for held-out prompts, without
      the closing one, and the share of responses that closed within `max_new_tokens`.

    The training goes on as if nothing had been measured: random state, training mode and gradients are restored. Pairs
    pass through the model one at a time.

    The starting policy is the policy at step 0, also after a resumption. Where fresh adapters are trained, it is their
    base: the adapters are switched off. Otherwise its log-probabilities are kept in `output_dir`/_starting_policy, in
    2 bytes for each answer token and vocabulary entry of the held-out sample. 32 pairs of 2 x 100 tokens with 128,256
    entries take 1.5 GiB of disk, and no memory.

    Args:
        held_out: pairs to measure KL, margins and responses on; None for the trainer's `eval_dataset`.
        train: training pairs to measure margins on; None for the trainer's `train_dataset`.
        pairs: size of each sample, drawn by `seed`; all pairs, where there are fewer.
        every: measure also each time this number of steps has passed; 0 for checkpoints alone.
        prompts: number of held-out pairs to generate responses for; 0 for none.
        max_new_tokens: most tokens of a response.
        temperature: 0 for greedy responses; otherwise responses are sampled, by `seed`.
        seed: of the samples of pairs and of the sampled responses.
        warn_above_gib: log a warning where the starting policy takes more disk than this.

    Raises:
        ValueError: an argument is out of its range. When training begins: the trainer has no pairs to draw from, the
            disk has no room for the starting policy, or the held-out sample is not that of step 0.
    """

    def __init__(
        self,
        held_out: Sequence[dict[str, Any]] | Any = None,
        train: Sequence[dict[str, Any]] | Any = None,
        *,
        pairs: int = 32,
        every: int = 0,
        prompts: int = 16,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        warn_above_gib: float = 4.0,
    ) -> None:
        for name, value, least in (
            ("pairs", pairs, 1),
            ("every", every, 0),
            ("prompts", prompts, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("temperature", temperature, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value!r}")
        self.held_out, self.train = held_out, train
        self.pairs, self.every, self.prompts, self.seed = pairs, every, prompts, seed
        self._responses = Responses(max_new_tokens, temperature)
        self._warn_above = warn_above_gib
        self._samples: dict[str, list[Rows]] = {}
        self._measured: int | None = None
        self._warned = False
        self._changes: list[Change] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = calling_trainer(self)
        self._changes += stay_differentiable(trainer.model)
        sources = {"held_out": (self.held_out, trainer.eval_dataset), "train": (self.train, trainer.train_dataset)}
        self._samples = {name: self._sample(name, *rows, trainer) for name, rows in sources.items()}
        # The underscore keeps it out of what a Trainer uploads to the Hub.
        self._starting = StartingPolicy(Path(args.output_dir, "_starting_policy"))
        self._measured = None
        if state.global_step == 0:
            with _undisturbed(trainer.model):
                self._keep_start(trainer)
            self._measure(trainer, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the checkpoint is written, which then holds this log: a resumed run need not measure again.
        if control.should_save or (self.every and state.global_step % self.every == 0):
            self._measure(calling_trainer(self), control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._measure(calling_trainer(self), control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(calling_trainer(self), control)  # a checkpoint that was decided on late, such as the best one

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        undo(self._changes)
        self._changes.clear()

    def _sample(self, name: str, pairs: Any, of_trainer: Any, trainer: Trainer) -> list[Rows]:
        """The rows of each pair of a sample of `pairs`, or of the trainer's data set, on the CPU."""
        source = of_trainer if pairs is None else pairs
        if source is None or isinstance(source, dict) or not hasattr(source, "__len__") or not len(source):
            where = "eval_dataset" if name == "held_out" else "train_dataset"
            raise ValueError(
                f"DriftCallback draws its sample from the trainer's {where}, which must be a data set with a length "
                f"and a pair in it; got {type(source).__name__}. Give pairs with DriftCallback({name}=...)"
            )
        # A stream of its own: flips and splits by the same seed take the first rows of the plain permutation.
        stream = np.random.SeedSequence(self.seed, spawn_key=(1,))
        drawn = np.random.default_rng(stream).permutation(len(source))[: self.pairs]
        accepted = forward_parameters(trainer.model)
        rows = [stack_pairs(trainer.data_collator([source[int(i)]]), accepted) for i in drawn]
        further = ", ".join(further_inputs(rows[0]))
        if further and self.prompts and name == "held_out":
            raise ValueError(f"DriftCallback generates from token ids alone, and pairs hold {further}: set prompts=0")
        return rows

    def _keep_start(self, trainer: Trainer) -> None:
        model, accelerator, sample = trainer.model, trainer.accelerator, self._samples["held_out"]
        if accelerator.is_local_main_process:
            self._starting.clear()
        accelerator.wait_for_everyone()
        first = _on(accelerator.device, sample[0])
        if bool(_over_ranks(accelerator, 1, lambda _: [[float(adapters_change_nothing(model, first))]]).all()):
            self._starting.use_adapters_off()
            return
        self._starting.require_room(model, first, sum(_answer_tokens(rows) for rows in sample), self._warn_above)

        def keep(indices: Sequence[int]) -> list[list[float]]:
            for i in _progress(trainer, indices, "keeping the starting policy"):
                self._starting.keep(model, i, _on(accelerator.device, sample[i]))
            return [[0.0]] * len(indices)

        _over_ranks(accelerator, len(sample), keep)

    def _measure(self, trainer: Trainer, control: Any) -> None:
        """Measure and log, once a step."""
        if self._measured == trainer.state.global_step:
            return
        self._measured = trainer.state.global_step
        with _undisturbed(trainer.model):
            metrics = self._of_pairs(trainer, "train") | self._of_pairs(trainer, "held_out")
            metrics |= self._of_responses(trainer)
        due = control.should_log
        # Not a subclass's log: TRL's trainers close a window of their own metrics in it, and would do so in this row.
        Trainer.log(trainer, {f"drift/{name}": value for name, value in metrics.items()})
        control.should_log = due  # the log has reset it, and the step's own log is still to come

    def _of_pairs(self, trainer: Trainer, name: str) -> dict[str, float]:
        sample, device = self._samples[name], trainer.accelerator.device

        def measure(indices: Sequence[int]) -> list[list[float]]:
            return [
                self._of_pair(trainer.model, name, i, _on(device, sample[i]))
                for i in _progress(trainer, indices, f"drift on {name.replace('_', '-')} pairs")
            ]

        chosen, margins, has_start, kl = _over_ranks(trainer.accelerator, len(sample), measure).unbind(-1)
        metrics = {
            f"{name}_chosen_logps": float(chosen.mean()),
            f"{name}_margin": float(margins.mean()),
            f"{name}_accuracy": float((margins > 0).double().mean()),
        }
        if name == "held_out" and bool(has_start.all()):
            metrics["kl"] = float(kl.sum()) / sum(_answer_tokens(rows) for rows in sample)
        elif name == "held_out":
            self._warn_that_no_start_is_kept()
        return metrics

    def _of_pair(self, model: nn.Module, name: str, index: int, rows: Rows) -> list[float]:
        """Chosen log-probability, margin, whether the starting policy can be asked, and the sum of the KL to it."""
        answers, logits, labels = answer_logits(model, rows)
        chosen, rejected = gapo.sequence_logps(logits, labels, backend="torch").tolist()
        has_start = name == "held_out" and self._starting.has(index)
        kl = float(self._starting.kl(model, index, rows, answers).sum()) if has_start else 0.0
        return [chosen, chosen - rejected, float(has_start), kl]

    def _of_responses(self, trainer: Trainer) -> dict[str, float]:
        model, accelerator = trainer.model, trainer.accelerator
        prompts = [prompt for rows in self._samples["held_out"] if len(prompt := prompt_of(rows))][: self.prompts]
        if not prompts:
            return {}
        ends = end_tokens(model, trainer.processing_class)
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self._responses.temperature:
            torch.manual_seed(self.seed + accelerator.process_index)

        def measure(indices: Sequence[int]) -> list[list[float]]:
            own = [prompts[i] for i in indices]
            lengths = self._responses.lengths(model, own, ends, synced_gpus=sharded)
            return list(_progress(trainer, lengths, "responses", total=len(own)))

        length, ended = _over_ranks(accelerator, len(prompts), measure).mean(0).tolist()
        return {"response_length": length, "response_ended": ended}

    def _warn_that_no_start_is_kept(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "drift/kl is left out: the starting policy was not kept at step 0 in this output_dir. The callback has "
                "to be there from the start of a training"
            )


def _over_ranks(accelerator: Any, n: int, measure: Callable[[Sequence[int]], list[list[float]]]) -> Tensor:
    """(n, columns): `measure` takes indices of items and returns a row for each; the ranks share the items.

    Each rank measures equally many, so that engines with collectives in a forward stay together. The last rank repeats
    the last item where they do not divide evenly, and the repeated rows are cut.
    """
    each = -(-n // accelerator.num_processes)
    start = each * accelerator.process_index
    rows = measure([min(i, n - 1) for i in range(start, start + each)])
    table: Tensor = accelerator.gather(torch.tensor(rows, dtype=torch.float32, device=accelerator.device))
    return table.cpu().double()[:n]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient; modes and random streams are restored."""
    modes = [(module, module.training) for module in model.modules()]
    state = RandomState(model)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        state.restore()
        for module, training in modes:
            module.training = training


def _answer_tokens(rows: Rows) -> int:
    return int((rows["labels"][:, 1:] != IGNORE_INDEX).sum())


def _on(device: torch.device, rows: Rows) -> Rows:
    return {name: x.to(device) for name, x in rows.items()}


def _progress(trainer: Trainer, items: Iterable[Any], what: str, total: int | None = None) -> Any:
    hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    return tqdm(items, desc=what, total=total, disable=hidden, leave=False)
