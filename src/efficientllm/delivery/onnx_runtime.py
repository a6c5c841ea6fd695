"""An exported ONNX folder in onnxruntime. Imports no torch, so that its memory is the runtime's alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAST = "input.past_key_values.layers."  # as transformers' exporter names them
PRESENT = "output.past_key_values.layers."


class Session:
    """An exported folder in onnxruntime, with its cache."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.cache: dict[str, NDArray[Any]] = {}

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns logits (rows, tokens, vocabulary) of ids (rows, tokens) that continue what came before."""
        rows, new = ids.shape
        if not self.cache:
            for name in self.names:
                if name.startswith(PAST):
                    _, heads, _, head_dim = self.shapes[name]
                    self.cache[name] = np.zeros((rows, int(heads), 0, int(head_dim)), np.float32)
        positions = np.arange(self.length, self.length + new)[None].repeat(rows, 0)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self.length + new), np.int64),
            "position_ids": positions,
            **self.cache,
        }
        outputs = [value.name for value in self.session.get_outputs()]
        values = self.session.run(outputs, {name: given[name] for name in self.names})
        found = dict(zip(outputs, values, strict=True))
        self.cache = {name: found[name.replace(PAST, PRESENT)] for name in self.cache}
        self.length += new
        logits: NDArray[np.float32] = found["logits"]
        return logits


def generate(session: Session, prompt: Sequence[int], new: int) -> list[int]:
    """Returns the likeliest continuation, a token at a time through the cache."""
    session.reset()
    ids: list[int] = []
    logits = session(np.array([prompt], np.int64))
    for _ in range(new):
        ids.append(int(logits[0, -1].argmax()))
        logits = session(np.array([ids[-1:]], np.int64))
    return ids
