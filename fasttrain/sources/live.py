"""Live sources: they run on every batch."""

import torch

from fasttrain.loaders import Batch

from .network import SourceNetwork
from .soft_targets import SoftTargets


class LiveSources:
    """Frozen networks, run one after the other under autocast.

    Args:
        networks: on the batches' device.
        dtype: of the arithmetic; ``torch.float32`` switches autocast off.
    """

    def __init__(self, networks: list[SourceNetwork], dtype: torch.dtype) -> None:
        self.networks, self.dtype = networks, dtype
        self.class_counts = tuple(n.spec.classes for n in networks)
        self.names = tuple(n.spec.name for n in networks)

    def __call__(self, batch: Batch) -> SoftTargets:
        """Soft targets of a batch, from its ``still`` view where it has one, else from the target's pixels."""
        pixels = batch.pixels if batch.still is None else batch.still
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = [network(pixels) for network in self.networks]
        return SoftTargets(torch.cat(logits, dim=1), self.class_counts, self.names)

    def describe(self) -> str:
        return f"live, at every step, in {str(self.dtype).removeprefix('torch.')}"
