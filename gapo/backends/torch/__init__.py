"""PyTorch: any `nn.Module`, on CUDA or CPU."""

from gapo.backends.torch.backend import TorchBackend, make_backend
from gapo.backends.torch.forward import TorchForward
from gapo.backends.torch.onepass import OnePassForward
from gapo.backends.torch.sharded import ShardedForward

__all__ = ["OnePassForward", "ShardedForward", "TorchBackend", "TorchForward", "make_backend"]
