"""fasttrain.kernels: the losses between a target's auxiliary logits and its sources' soft labels.

Imports nothing else of fasttrain. :func:`soft_target_loss` is the way in. Today it is the plain PyTorch reference on
every device; faster implementations take their place beside it and must agree with it.
"""

from .reference import soft_target_loss

__all__ = ["implementation", "soft_target_loss"]


def implementation(device: str) -> tuple[str, str]:
    """Which implementation :func:`soft_target_loss` uses on a device, and why."""
    return "reference", f"plain PyTorch in float32 is the only implementation so far (on {device} too)"
