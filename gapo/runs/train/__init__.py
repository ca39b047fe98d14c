"""`gapo train`: its settings, its loops on PyTorch, JAX and MLX, its page."""
