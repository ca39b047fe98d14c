"""For each module of the mutation check the tests that must find its mutants: names of test files, and pytest's -k."""

TORCH = "gapo/backends/torch"
ENGINE = f"{TORCH}/pairgrads"
MLX = "gapo/backends/mlx"
ROWS = "gapo/backends/jaxrows"
_ONE_ARRAY_LIBRARY = "numpy or not (torch or jax or mlx or strict)"

TESTS = {
    "gapo/objective.py": ("objective config", "not jax and not mlx and not strict and not compile"),
    "gapo/geometry.py": ("geometry", "not jax"),
    **dict.fromkeys(
        ("gapo/step.py", "gapo/anchor.py"),
        (
            "step backend_torch",
            "test_step and (torch or another or unknown or result) or bfloat16 or names_the_parameter",
        ),
    ),
    "gapo/backends/__init__.py": ("step imports", "(torch and errors) or absent or loaded"),
    "gapo/backends/base.py": ("step onepass", "(torch and (errors or alone or identity)) or fit or declaration"),
    "gapo/backends/numpy.py": ("step", "numpy"),
    "gapo/backends/jax.py": ("backend_jax step", "jax and not mesh and not flops and not third"),
    "gapo/backends/jax_head.py": ("jax_head", ""),
    "gapo/backends/jax_onepass.py": ("jax_onepass", "not flops"),
    f"{ROWS}/labels.py": ("jax_labels", ""),
    f"{ROWS}/cost.py": ("jax_onepass", "flops or rematerialised or told_apart or cost"),
    **{
        f"{ROWS}/{name}.py": ("jax_onepass", "not flops")
        for name in ("evaluation", "group_gradients", "program", "split")
    },
    **dict.fromkeys(
        (f"{MLX}/mlx_{part}.py" for part in ("backend", "forward", "onepass")),
        ("backend_mlx mlx_onepass step mlx_lm devices", "(mlx or ring) and not compiled"),
    ),
    f"{MLX}/mlx_head.py": ("mlx_head", ""),
    f"{MLX}/mlx_verdicts.py": ("mlx_onepass", "not compiled and not ctrl_c"),
    **{
        f"{MLX}/pairgrads/{name}.py": ("mlx_onepass", "not compiled")
        for name in ("contributions", "instances", "layer_rules", "mlx_state", "standins", "taps")
    },
    f"{TORCH}/backend.py": (
        "backend_torch onepass step devices",
        "(torch or onepass or ddp or fsdp2 or refused) and not log_probs and not compiles",
    ),
    f"{TORCH}/cut.py": ("cut onepass_grounds", "test_cut or cut or kept"),
    f"{TORCH}/forward.py": (
        "backend_torch step onepass onepass_grounds cut faults",
        "(torch or onepass or cut or ctrl_c) and not log_probs and not compiles",
    ),
    f"{TORCH}/head.py": ("backend_torch", "head"),
    f"{TORCH}/half.py": ("rounding", "torch"),
    f"{TORCH}/onepass.py": (
        "onepass onepass_grounds hf faults",
        "onepass or oracles or step_that_fails or refused_between",
    ),
    f"{TORCH}/random_state.py": ("backend_torch cut", "dropout or calls"),
    f"{TORCH}/replay.py": ("onepass_grounds backend_torch cut", "batch_norm or dropout or calls"),
    f"{TORCH}/plain.py": ("every_objective backend_torch step", "torch and not compiles"),
    f"{TORCH}/sharded.py": ("devices", "fsdp2 or refused"),
    f"{TORCH}/token_kl.py": ("drift", "kl_in_chunks"),
    f"{TORCH}/token_logps.py": ("backend_torch", "log"),
    f"{ENGINE}/agreement.py": ("onepass_grounds", "small or order or rows"),
    f"{ENGINE}/gradients.py": ("pairgrads onepass", ""),
    f"{ENGINE}/graph.py": ("pairgrads onepass_grounds", ""),
    f"{ENGINE}/local.py": ("pairgrads", "again or kept or refused or alone"),
    f"{ENGINE}/parts.py": ("pairgrads pairgrads_rules onepass", "pairgrads or forms"),
    f"{ENGINE}/rows.py": ("pairgrads onepass_grounds", ""),
    f"{ENGINE}/tape.py": ("pairgrads onepass onepass_grounds", ""),
    "gapo/backends/pairgrads/identity.py": (
        "onepass_grounds mlx_onepass",
        "verdict or anew or never or functions_are_one",
    ),
    f"{ENGINE}/verdicts.py": ("onepass_grounds", "verdict or anew or never or place or comes_to_mix"),
    **{
        f"{ENGINE}/rules/{name}.py": ("pairgrads pairgrads_rules onepass_grounds", "")
        for name in ("dora", "embedding", "experts", "library", "linear", "lookup", "norm", "registry")
    },
    **{
        f"gapo/objectives/{name}.py": ("objectives objective weighted", _ONE_ARRAY_LIBRARY)
        for name in ("anchored", "batch_adaptive", "formulas", "loss", "registry", "robust", "symmetric")
    },
    **{
        f"gapo/objectives/{name}.py": ("objectives objective weighted", _ONE_ARRAY_LIBRARY)
        for name in ("trl_losses", "weighted", "with_reference", "without_reference")
    },
    "gapo/rounding.py": ("rounding backend_torch", "torch or bfloat16 or drop or add_up or cause"),
}
