"""Tune a model as TRL's scripts do, with all settings from a YAML file or the command line, and with `--help`.

python examples/trl_style.py --config examples/trl_style.yaml --model_name_or_path MODEL --train_pairs pairs.jsonl
"""

from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from gapo.adapters.hf import GAPOConfig, GAPOTrainer
from gapo.data import read_pairs


@dataclass
class Data:
    """Where the pairs are."""

    train_pairs: str = field(metadata={"help": "File or data set of training pairs."})
    eval_pairs: str | None = field(default=None, metadata={"help": "File or data set of pairs to evaluate on."})


def main() -> None:
    """Parse, train, evaluate, save."""
    data, args, model = TrlParser((Data, GAPOConfig, ModelConfig)).parse_args_and_config()
    trainer = GAPOTrainer(
        model.model_name_or_path,
        args,
        train_dataset=Dataset.from_list(read_pairs(data.train_pairs).rows),
        eval_dataset=Dataset.from_list(read_pairs(data.eval_pairs).rows) if data.eval_pairs else None,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    if data.eval_pairs:
        print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
