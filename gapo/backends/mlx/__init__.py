"""The MLX backend: any `mlx.nn.Module`, with a forward for every model and a faster one for layers that have rules."""

from gapo.backends.mlx.mlx_backend import MlxBackend, make_backend
from gapo.backends.mlx.mlx_forward import MlxForward
from gapo.backends.mlx.mlx_onepass import OnePassMlxForward

__all__ = ["MlxBackend", "MlxForward", "OnePassMlxForward", "make_backend"]
