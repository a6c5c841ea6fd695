"""The parts of a step and of a removal on a GPU, each as it is and as it could be, at SmolLM-135M's shape.

    python benchmarks/parts.py [--smoke]      # a GPU, under a minute; --smoke runs the code on a CPU at tiny sizes

Milliseconds, the least of some calls, for all layers where a part is done layer by layer. What is done today stands
first in each part; another way is to be taken only for what it shows here.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from shapes import now, quiet, show, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from efficientllm.pruning.compensation import damped_, gram, solve
from efficientllm.training.cross_entropy import next_token_loss

ROUNDS, STREAMS = 5, 8
GPU = torch.cuda.is_available()

Rows = list[tuple[str, str, str]]


@dataclass(frozen=True)
class Sizes:
    """A model's, and the rows that are kept of an input."""

    layers: int
    ffn: int
    hidden: int
    heads: int
    kv: int
    head: int
    vocab: int
    rows: int


SMOLLM, TINY = Sizes(30, 1536, 576, 9, 3, 64, 49152, 8192), Sizes(2, 48, 24, 3, 1, 8, 97, 256)


def compare(part: str, ways: Mapping[str, Callable[[], Any]]) -> Rows:
    """Returns each way's milliseconds, or what it failed with: not every torch has all of them."""
    rows = []
    for name, way in ways.items():
        try:
            way()  # makes workspaces
            found = f"{1e3 * min(timed(way) for _ in range(ROUNDS)):.2f} ms"
        except (RuntimeError, NotImplementedError, TypeError) as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        rows.append((part, f"{found} {name}", ""))
        print(*rows[-1], file=sys.stderr)
    return rows


def moments(of: Sizes, device: torch.device) -> Rows:
    """XᵀX of every layer's inputs, in float32 from bf16 rows."""
    X = torch.randn(of.rows, of.ffn, device=device, dtype=torch.bfloat16)
    wide: dict[str, Any] = {"out_dtype": torch.float32}
    return compare(
        f"{of.layers} moments of {of.rows} × {of.ffn}",
        {
            "in float32": lambda: [gram(X) for _ in range(of.layers)],
            "of bf16, summed in float32": lambda: [torch.mm(X.T, X, **wide) for _ in range(of.layers)],
        },
    )


def solves(of: Sizes, device: torch.device) -> Rows:
    """Z of every layer, from its moments."""
    H = damped_(gram(torch.randn(of.rows, of.ffn, device=device)))
    every, removed = H.expand(of.layers, -1, -1).contiguous(), torch.tensor([of.ffn // 2], device=device)

    def in_streams() -> list[Tensor]:
        here = torch.cuda.current_stream()
        found = []
        for stream, matrix in zip(streams * of.layers, every, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                found.append(solve(matrix, removed))
        for stream in streams:
            here.wait_stream(stream)
        return found

    def one_solve(matrix: Tensor) -> Tensor:
        """As `solve`, with the removed behind the others: the factor holds half of the solution."""
        order = torch.zeros(of.ffn, device=device).index_fill_(0, removed, 1).argsort(stable=True)
        L = torch.linalg.cholesky_ex(matrix[order[:, None], order])[0]
        tail = torch.zeros(of.ffn, len(removed), device=device)
        tail[-len(removed) :] = L[-len(removed) :, -len(removed) :].T
        return torch.empty_like(tail).index_copy_(0, order, torch.linalg.solve_triangular(L.T, tail, upper=True))

    torch.testing.assert_close(one_solve(H), solve(H, removed), rtol=1e-3, atol=1e-3)
    streams = [torch.cuda.Stream() for _ in range(STREAMS)] if GPU else []
    return compare(
        f"{of.layers} solves of {of.ffn}²",
        {
            "one after the other": lambda: [solve(matrix, removed) for matrix in every],
            **({f"in {STREAMS} streams": in_streams} if GPU else {}),
            "with one triangular solve each": lambda: [one_solve(matrix) for matrix in every],
            "the factors alone": lambda: [torch.linalg.cholesky_ex(matrix) for matrix in every],
            "the factors alone, as one batch": lambda: torch.linalg.cholesky_ex(every),
        },
    )


def loss(of: Sizes, device: torch.device) -> Rows:
    """The loss and its gradients in chunks of several sizes, 16 rows of 2,048 tokens."""
    tokens = 4 * of.rows
    h = torch.randn(tokens, of.hidden, device=device, requires_grad=True)
    W = torch.randn(of.vocab, of.hidden, device=device, requires_grad=True)
    targets = torch.randint(0, of.vocab, (tokens,), device=device)

    def run(rows: int | None) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=GPU):
            next_token_loss(h, W, targets, rows=rows).backward()

    sizes = {f"chunks of 2^{power} logits": max(1, 2**power // of.vocab) for power in (24, 25, 26, 27, 28)}
    ways = {"as it is": None, **sizes}
    return compare(f"loss of {tokens} tokens", {name: partial(run, rows) for name, rows in ways.items()})


def attention(of: Sizes, device: torch.device) -> Rows:
    """Causal attention, forward and backward, of all layers, by torch's choice and by each kernel."""
    dtype, length = torch.bfloat16 if GPU else torch.float32, of.rows // 4
    q = torch.randn(8, of.heads, length, of.head, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(8, of.kv, length, of.head, device=device, dtype=dtype, requires_grad=True) for _ in range(2))

    def run(backends: list[SDPBackend] | None, grouped: bool) -> None:
        keys, values = (k, v) if grouped else (each.repeat_interleave(of.heads // of.kv, 1) for each in (k, v))
        for _ in range(of.layers):
            if backends is None:
                out = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
            else:
                with sdpa_kernel(backends):
                    out = scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
            out.sum().backward(retain_graph=True)

    kernels = {"torch's choice": None, "flash": [SDPBackend.FLASH_ATTENTION], "cuDNN": [SDPBackend.CUDNN_ATTENTION]}
    ways = {
        f"{name}, keys {'shared' if grouped else 'repeated'}": partial(run, backends, grouped)
        for (name, backends), grouped in product(kernels.items(), (True, False))
    }
    return compare(f"attention of {of.layers} layers", ways)


def look(of: Sizes, device: torch.device) -> Rows:
    """What the host waits for to choose, while the optimizer's step is under way behind the scores."""
    totals = torch.randn(of.layers * (of.ffn + of.kv) + of.hidden, device=device)
    params = [torch.randn(of.hidden, of.ffn, device=device) for _ in range(150)]

    def at_the_end() -> None:
        torch._foreach_mul_(params, 1.0)
        totals.cpu()

    def copied_before() -> None:
        there = torch.empty_like(totals, device="cpu", pin_memory=GPU).copy_(totals, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        torch._foreach_mul_(params, 1.0)
        arrived.synchronize()
        there.sum()

    return compare(
        "the look at the scores", {"at the end": at_the_end} | ({"copied before": copied_before} if GPU else {})
    )


def main(smoke: bool) -> None:
    if not GPU and not smoke:
        print("no GPU here: --smoke runs the code at tiny sizes")
        return
    of, device = TINY if smoke else SMOLLM, torch.device("cuda" if GPU else "cpu")
    show([row for part in (moments, solves, loss, attention, look) for row in part(of, device)])


if __name__ == "__main__":
    quiet()
    now()
    main("--smoke" in sys.argv)
