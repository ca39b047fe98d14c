"""One thin adapter for each training loop: `gapo.adapters.hf`, `gapo.adapters.flax`, `gapo.adapters.mlx_lm`.

Import the one you need; importing this package loads no framework.
"""
