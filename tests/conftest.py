"""Fixtures of the whole suite."""

import pytest
import torch


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a float64 model compute in float64: transformers sends norms, rotations and softmax through float32."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
