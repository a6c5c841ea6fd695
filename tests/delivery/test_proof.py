"""Comparing logits: against transformers' own loss, and against what they cannot be."""

import math

import numpy as np
import pytest
import torch

from efficientllm.delivery.proof import compare, held_out_rows, held_out_text
from helpers.families import loss_of, make_model


def test_perplexity_is_transformers_loss() -> None:
    model = make_model("llama", dtype=torch.float32).eval()
    rows = [[1, 5, 9, 2, 60, 33], [4, 4, 8, 1, 0, 7]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(rows)).logits.numpy()
        loss = float(loss_of(model, torch.tensor(rows)))
    same = compare(logits, logits, rows)
    assert same.perplexity == same.reference == pytest.approx(math.exp(loss), rel=1e-5)
    assert (same.difference, same.agreement) == (0.0, 1.0)


def test_what_differs_is_counted() -> None:
    reference = np.zeros((1, 4, 3), np.float32)
    reference[0, :, 1] = 10
    found = reference.copy()
    found[0, 2] = [20, 0, 0]
    comparison = compare(found, reference, [[1, 1, 1, 1]])
    assert (comparison.difference, comparison.agreement) == (2.0, 0.75)  # of the largest logit; of four tokens
    assert comparison.perplexity > 100 * comparison.reference
    assert "same most likely token 75.0%" in str(comparison)


def test_rows_fit_the_context() -> None:
    assert held_out_rows(range(1000), 100) == [list(range(100)), list(range(100, 200))]
    assert [len(row) for row in held_out_rows(range(1000), 4096)] == [256, 256]
    assert [len(row) for row in held_out_rows(range(50), 4096)] == [25, 25]
    assert len(held_out_text()) == 20_000 and "assert" in held_out_text()
