"""Every Python example of the README runs as it stands, after the names that it takes for given."""

import re
from pathlib import Path
from typing import Any

import datasets
import griffe
import hf_models
import peft
import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gapo.adapters.hf.margins import pair_logps
from gapo.data import generate_pairs, write_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^## (.+?)$|```python\n(.*?)```", README, re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """The Python blocks by the heading that they stand under."""
    found, heading = {}, ""
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found[heading if heading not in found else f"{heading} (more)"] = code
    return found


def given(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the example under `heading` takes for given."""
    if heading == "devices.md":
        import jax_problem

        params, batch = jax_problem.problem()
        jax_names = {"params": params, "jax_batch": batch, "margin_fn": jax_problem.margin_fn}
        torch_names = {"sharded": hf_models.make("llama"), "batch": hf_models.batch()}
        return {**given("Trainer", folder, monkeypatch), **torch_names, **jax_names}
    if "Trainer" in heading:
        arguments = TrainingArguments(str(folder), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
        names = {"Trainer": Trainer, "args": arguments, "pairs": hf_models.pairs(8)}
        hf_models.make("llama").save_pretrained(folder / "model")
        hf_models.tokenizer().save_pretrained(folder / "model")
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in generate_pairs(8)]
        names |= {"path": str(folder / "model"), "dataset": datasets.Dataset.from_list(rows)}
        return {**names, "model": hf_models.make("llama"), "tokenizer": hf_models.tokenizer()}
    if "Flax" in heading:
        import optax
        from flax import nnx
        from flax_problem import batch, nnx_problem

        model, optimizer = nnx_problem(optax.adam(1e-3))
        return {"model": model, "optimizer": optimizer, "batches": [batch(0), batch(1)], "nnx": nnx}
    if "MLX" in heading:
        import mlx.optimizers as optim
        import mlx_lm
        from mlx_lm.tuner.trainer import TrainingArgs, train

        hf_models.make("llama").save_pretrained(folder / "model")
        hf_models.tokenizer().save_pretrained(folder / "model")
        model, tokenizer = mlx_lm.load(str(folder / "model"))
        (folder / "pairs").mkdir()
        for name in ("train", "valid"):
            write_rows(folder / "pairs" / f"{name}.jsonl", generate_pairs(8))
        monkeypatch.chdir(folder)
        args = TrainingArgs(batch_size=4, iters=1, max_seq_length=2048)
        return {"model": model, "tokenizer": tokenizer, "train": train, "args": args, "optimizer": optim.SGD(0.1)}
    if "(more)" in heading:
        import jax
        import jax_problem
        import mlx_problem

        import gapo

        params, batch = jax_problem.problem()
        mlx_names = {"mlx_model": mlx_problem.mixer(), "mlx_batch": mlx_problem.BATCH}
        names = {"gapo": gapo, "jax": jax, "params": params, "batch": batch, **mlx_names}
        return {**names, "margin_fn": jax_problem.margin_fn, "mlx_margin_fn": mlx_problem.margin_fn}
    if heading in ("drift.md", "quantised.md"):
        arguments = TrainingArguments(str(folder), max_steps=2, save_steps=2, report_to="none", use_cpu=True)
        names = {
            "Trainer": Trainer,
            "args": arguments,
            "pairs": hf_models.pairs(8),
            "held_out": hf_models.pairs(9, seed=1),
        }
        hf_models.save_wide_llama(folder / "model")
        names |= {"path": folder / "model", "tokenizer": hf_models.tokenizer(), "model": hf_models.make("llama")}
        return names
    if heading == "after-training.md":
        hf_models.make("llama").save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        adapted.save_pretrained(folder / "adapter")
        hf_models.tokenizer().save_pretrained(folder / "adapter")
        return {"adapter": folder / "adapter", "merged": folder / "merged", "runs": folder / "runs"}
    if heading in ("score.md", "relatives.md"):
        hf_models.make("llama").save_pretrained(folder / "model")
        hf_models.tokenizer().save_pretrained(folder / "model")
        write_rows(folder / "pairs.jsonl", generate_pairs(8))
        return {"batch": hf_models.batch()}
    if "own loop" in heading:
        names = {"model": hf_models.make("llama"), "batch": hf_models.batch(), "margin_fn": pair_logps}
        return {**names, "batches": [hf_models.batch(seed=1), hf_models.batch(seed=2)]}
    return {}


@pytest.mark.parametrize("heading", examples())
def test_example(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = given(heading or "Trainer", tmp_path, monkeypatch)
    exec(compile(examples()[heading], f"README.md: {heading}", "exec"), names)
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # a reader has a GPU, the tests may have none
@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_page_of_the_docs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after another."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    subject = {"flax.md": "Flax", "mlx.md": "MLX", "trainer.md": "Trainer", "index.md": "Trainer"}
    subject["objectives.md"] = "Trainer"
    subject |= dict.fromkeys(("loop.md", "choosing.md"), "own loop")
    names = {"folder": tmp_path, **given(subject.get(page, page), tmp_path, monkeypatch)}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_reference_shows_the_functions_that_users_call() -> None:
    extensions = griffe.load_extensions(str(ROOT / "docs" / "public_signatures.py"))
    modules = griffe.load("gapo.objectives", search_paths=[ROOT], extensions=extensions, resolve_aliases=True)
    function = modules["dpo"]
    arrays = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    assert [p.name for p in function.parameters] == [*arrays, "beta", "reduction", "backend"]
    assert all(f"{name}: (N,)" in function.docstring.value for name in arrays)
    assert [p.name for p in modules["LogProbs"].parameters][:2] == ["self", "chosen"]  # others as they are written


def test_the_readme_says_which_gapo_it_is() -> None:
    assert len(examples()) >= 6
    for number in ("2602.04909", "2503.20194", "2510.21830"):
        assert number in README
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path.partition("#")[0]).exists(), path
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}:" in (ROOT / "Makefile").read_text()
