"""On a CUDA device: a checkpoint holds what was there when it was asked for, whatever the device is given next."""

import pytest
import torch

from fasttrain import checkpoint
from fasttrain.writer import CheckpointWriter

pytestmark = pytest.mark.gpu


def test_a_snapshot_is_taken_before_what_the_device_is_given_next(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=1, report=pytest.fail)
    weight = torch.zeros(64, 1 << 20, device="cuda")
    kernel = torch.randn(256, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    try:
        for step in range(3):
            writer.save("last.pt", {"weight": weight, "kernel": kernel, "position": {"step": step}})
            weight.add_(1)
            writer.wait()
            found = checkpoint.load(tmp_path / "last.pt")
            assert found["weight"].min() == found["weight"].max() == step
            assert torch.equal(found["kernel"], kernel.cpu()) and found["kernel"].stride() == kernel.stride()
    finally:
        writer.close()
