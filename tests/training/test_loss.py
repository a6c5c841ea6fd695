"""The chunked loss against transformers' own, in value and every gradient, and the memory that it is for."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from efficientllm.training.cross_entropy import next_token_loss
from efficientllm.training.loss import chunked_loss_
from helpers.families import NAMES, batch, capped, logits, loss_of, make_model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*NAMES])
def test_every_family_has_its_own_loss_and_gradients(name: str) -> None:
    stock, ours = make_model(name, **capped(name)), make_model(name, **capped(name))
    chunked_loss_(ours)
    tokens = batch(rows=3)
    expected = loss_of(stock, tokens)
    loss = loss_of(ours, tokens)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    expected.backward(), loss.backward()
    for (key, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-9, msg=key)
    assert torch.equal(logits(ours), logits(stock))  # without labels nothing changes


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 20, 64])
def test_any_chunk_gives_the_same(rows: int, cap: float | None) -> None:
    h, W = torch.randn(20, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    targets = torch.randint(0, 11, (20,))
    leaves = [(h.clone().requires_grad_(), W.clone().requires_grad_()) for _ in range(2)]
    z = 0.7 * leaves[0][0] @ leaves[0][1].T
    expected = F.cross_entropy(z if cap is None else cap * torch.tanh(z / cap), targets)
    found = next_token_loss(*leaves[1], targets, scale=0.7, cap=cap, rows=rows)
    (3 * expected).backward(), (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    for mine, theirs in zip(leaves[1], leaves[0], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=1e-9)


def test_under_autocast_it_is_as_near_as_autocast_itself() -> None:
    torch.manual_seed(0)
    h, W, targets = torch.randn(64, 32), torch.randn(97, 32), torch.randint(0, 97, (64,))
    results = {}
    for way in ("exact", "autocast", "chunked"):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way != "exact"):
            loss = (
                next_token_loss(a, b, targets, rows=10)
                if way == "chunked"
                else F.cross_entropy(F.linear(a, b).float(), targets)
            )
        loss.backward()
        assert a.grad is not None and b.grad is not None and a.grad.dtype == b.grad.dtype == torch.float32
        results[way] = torch.cat([a.grad.flatten(), b.grad.flatten()])
    error = {way: float((grads - results["exact"]).norm()) for way, grads in results.items()}
    assert 0 < error["chunked"] < 2 * error["autocast"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the most memory a process has held")
def test_logits_never_stand_whole() -> None:
    """In a process of its own: 1,024 tokens of a vocabulary of 128k are 0.5 GB of logits, several times."""
    script = """
        import torch
        from pathlib import Path
        from torch.nn import functional as F
        from efficientllm.training.cross_entropy import next_token_loss
        h, W = torch.randn(1024, 16, requires_grad=True), torch.randn(131072, 16, requires_grad=True)
        targets = torch.randint(0, 131072, (1024,))
        def peak():  # not ru_maxrss: a child inherits its parent's
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
        before = peak()
        next_token_loss(h, W, targets).backward()
        chunked = peak()
        F.cross_entropy(h @ W.T, targets).backward()
        print(chunked - before, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=200
    )
    chunked, whole = map(float, done.stdout.split())
    assert whole > 1000 and chunked < 400, (chunked, whole)  # MiB
