"""fasttrain.kernels: the losses between a target's auxiliary logits and its sources' soft labels, and networks' inputs.

Imports nothing else of fasttrain. :func:`soft_target_loss` (or, in a training loop, :class:`SoftTargetLoss`) is the way
in: a fused Triton kernel on CUDA, plain PyTorch elsewhere, the same numbers.
"""

from .dispatch import IMPLEMENTATIONS, implementation
from .pixels import network_input
from .problem import Probabilities, SoftTarget, TopK
from .soft_target import SoftTargetLoss, soft_target_loss

__all__ = [
    "IMPLEMENTATIONS",
    "Probabilities",
    "SoftTarget",
    "SoftTargetLoss",
    "TopK",
    "implementation",
    "network_input",
    "soft_target_loss",
]
