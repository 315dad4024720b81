"""Shared by the GPU tests."""

import pytest
import torch


@pytest.fixture
def exact(monkeypatch):
    """float32 as the CPU has it: by default cuDNN's convolutions round it to the 10 bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
