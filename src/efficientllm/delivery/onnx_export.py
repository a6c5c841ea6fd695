"""A model as an ONNX graph with its cache of keys and values, by transformers' own exporter, for onnxruntime.

One graph both reads a prompt (the cache empty) and continues it. The folder is what `transformers.exporters` writes and
loads again (`ExportedModel.from_pretrained`), with the tokenizer beside it.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efficientllm.delivery.onnx_runtime import Session, generate
from efficientllm.delivery.proof import compare, held_out_rows, held_out_text
from efficientllm.errors import ConfigError, EfficientLLMError, UnsupportedModelError
from efficientllm.files import check_out, check_space, put, staging
from efficientllm.models.load import empty_model, load_config, load_model, load_tokenizer
from efficientllm.numbers import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("onnx", "onnxscript", "onnxruntime")
EXTRA = "pip install 'efficientllm[onnx]'"
TOLERANCE = 1e-4  # of the largest logit
NEW_TOKENS = 16


def export_onnx(model: str, out: Path, *, ids: list[int], overwrite: bool, trust_remote_code: bool) -> None:
    """Writes a model as ONNX in float32 and proves it in onnxruntime; prints what it does.

    Args:
        ids: held-out tokens to compare logits on; without any it is text that every Python carries.

    Raises:
        EfficientLLMError: it cannot be exported, the output is there, or the proof fails; nothing is left behind then.
    """
    import torch

    check_out(out, overwrite, folder=True)
    if missing := [part for part in PARTS if find_spec(part) is None]:
        raise ConfigError(f"--to onnx needs {', '.join(missing)}; run {EXTRA}")
    config = load_config(model, trust_remote_code)
    empty = empty_model(config, model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    num_bytes = 4 * sum(param.numel() for param in empty.parameters())
    check_space(out, num_bytes)
    print(f"{model} ({config.model_type}): {num_bytes:,} bytes of float32 weights")
    loaded = load_model(model, torch.float32, trust_remote_code)
    with staging(out) as folder:
        partial = folder / out.name
        _export(loaded, model).save_pretrained(partial)
        if loaded.generation_config is not None:
            loaded.generation_config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        ids = ids or list(tokenizer(held_out_text())["input_ids"])
        _prove(partial, loaded, held_out_rows(ids, config.max_position_embeddings))
        put(partial, out)
    size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
    print(f"{out}: {size:,} bytes")


def _export(model: "PreTrainedModel", name: str) -> Any:
    """Returns transformers' exported model: any batch, any prompt, any length of the cache."""
    import torch
    from transformers import DynamicCache

    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError:
        raise ConfigError("--to onnx needs transformers' own ONNX exporter; upgrade transformers") from None
    past, new, rows = 5, 3, 2  # all different, so that none is taken for another
    ids = torch.arange(rows * (past + new)).reshape(rows, -1) % model.config.vocab_size
    cache = DynamicCache()  # without the config: whole keys for sliding layers too, which the mask then cuts
    with torch.no_grad():
        model(input_ids=ids[:, :past], past_key_values=cache, use_cache=True)
    inputs = {
        "input_ids": ids[:, past:].contiguous(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(past, past + new)[None].repeat(rows, 1),
        "past_key_values": cache,
    }
    try:
        with _quiet():
            return OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    except Exception as error:  # torch's exporter raises whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"model {name}: torch's ONNX exporter failed on it ({reason})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress and its notes to programmers from the terminal."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _prove(folder: Path, model: "PreTrainedModel", rows: list[list[int]]) -> None:
    """Compares logits and a greedy continuation in onnxruntime with transformers'.

    Raises:
        EfficientLLMError: they differ.
    """
    import torch

    session = Session(folder)
    found = session(np.array(rows, np.int64))
    with torch.no_grad():
        reference = model(input_ids=torch.tensor(rows), use_cache=False).logits.numpy()
    comparison = compare(found, reference, rows)
    prompt = rows[0][: len(rows[0]) // 2]
    new = min(NEW_TOKENS, len(rows[0]) - len(prompt))
    ours = generate(session, prompt, new)
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    print(f"onnxruntime: {len(rows)} × {len(rows[0])} tokens: {comparison}")
    if not comparison.difference <= TOLERANCE:
        raise EfficientLLMError(f"{folder.name}: onnxruntime computes something else ({comparison}); no file was kept")
    if ours != theirs:
        raise EfficientLLMError(f"{folder.name}: onnxruntime generates {ours}, transformers {theirs}; no file was kept")
    print(f"onnxruntime: generated the same {counted(new, 'token')} with the cache")
