"""One thin adapter for each training loop: `gapo.adapters.hf`, `gapo.adapters.flax`, `gapo.adapters.mlx_lm`.

Import the one you need; importing this package loads no framework.
"""

from __future__ import annotations


def missing(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """What to raise when an adapter's library is not installed: names the extra to install."""
    adapter = extra.replace("-", "_")
    return ModuleNotFoundError(
        f'gapo.adapters.{adapter} needs {error.name}, which is not installed: pip install "gapo[{extra}]"',
        name=error.name,
    )
