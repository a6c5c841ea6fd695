"""Fixtures of the whole suite."""

import os

# before torch reads it: these models are too small for a second thread, which spins where others use the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a float64 model compute in float64: transformers sends norms, rotations and softmax through float32."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
