"""PyTorch: any `nn.Module`, on CUDA or CPU."""

from gapo.backends.torch.backend import TorchBackend, TorchForward, make_backend

__all__ = ["TorchBackend", "TorchForward", "make_backend"]
