"""The result as a Hugging Face folder that loads anywhere, checked by loading it again."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from efficientllm.errors import ConfigError, EfficientLLMError
from efficientllm.models.heterogeneous import make_uniform_
from efficientllm.models.llama_mistral import llama_config
from efficientllm.models.load import build_model, find_model, load_config, load_model, load_tokenizer
from efficientllm.numbers import counted

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS_COMPARED = 32


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    dtype: torch.dtype,
    card: str,
    shard_size: str = "50GB",
) -> None:
    """Writes a compacted model with tokenizer, generation config and model card, whole or not at all; then proves it.

    The folder's model is a stock one: Llama where the shape is legal for it, else Mistral, which is the same function.
    One whose layers have widths of their own goes with the code that builds it (models/modeling_per_layer.py).
    An older folder of that name is replaced. An empty card is none; no file of weights is larger than `shard_size`.

    Raises:
        EfficientLLMError: if what was written does not load as the same model.
    """
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        was_llama = json.loads((source / "config.json").read_text())["model_type"] == "llama"
        stock_model(model, dtype, was_llama).save_pretrained(partial, max_shard_size=shard_size)
        tokenizer.save_pretrained(partial)
        if (source / "generation_config.json").is_file():  # as it is: loading it would refuse what others accept
            shutil.copy(source / "generation_config.json", partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        check_reload(model, partial, dtype)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_folder(
    model: str, out: Path, *, dtype: str, shard_size: str | None, overwrite: bool, trust_remote_code: bool
) -> None:
    """Rewrites a model in another dtype, in files of at most `shard_size`, with its own card.

    Raises:
        EfficientLLMError: it cannot be loaded, the output is there, or what was written is not the model.
    """
    from efficientllm.files import check_out, check_space

    size = shard_size or "50GB"
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", size):
        raise ConfigError(f"--shard-size {size}: not a size; write digits with KB, MB, GB or TB, such as 2GB")
    check_out(out, overwrite, folder=True)
    load_config(model, trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_model(model, torch.float32, trust_remote_code)
    num_bytes = DTYPES[dtype].itemsize * sum(param.numel() for param in loaded.parameters())
    check_space(out, num_bytes)
    source = find_model(model)
    card = (source / "README.md").read_text(encoding="utf-8") if (source / "README.md").is_file() else ""
    save_model(loaded, out, tokenizer=tokenizer, source=source, dtype=DTYPES[dtype], card=card, shard_size=size)
    files = sorted(out.glob("*.safetensors"))
    print(f"{out}: {sum(file.stat().st_size for file in files):,} bytes in {counted(len(files), 'file')}, {dtype}")
    print("loaded again: every weight matches the model's, rounded; the logits agree")


@torch.no_grad()
def stock_model(model: PreTrainedModel, dtype: torch.dtype, was_llama: bool) -> PreTrainedModel:
    """Returns a new model of the present shape with the weights of `model`, rounded to `dtype`, on the CPU."""
    config = result_config(model.config, was_llama)
    config.dtype = dtype
    with torch.device("meta"):
        stock = build_model(config, dtype)
    weights = {name: param.detach().to("cpu", dtype) for name, param in model.named_parameters()}
    left = stock.load_state_dict(weights, strict=False, assign=True)
    stock.tie_weights()
    missing = set(left.missing_keys) & {name for name, param in stock.named_parameters() if param.is_meta}
    if missing or left.unexpected_keys:
        raise EfficientLLMError(f"the result has no weights for {sorted(missing)[:1] or left.unexpected_keys[:1]}")
    return stock


def result_config(config: Any, was_llama: bool) -> Any:
    """Returns a copy of the config: a relabelled Llama's becomes Llama's again if Llama accepts the shape.

    Llama's accepts no layers that differ in heads.
    """
    copy = type(config).from_dict(config.to_dict())
    if copy.is_heterogeneous:
        copy.architectures = None
        return copy
    make_uniform_(copy)  # of a source whose layers differed
    if was_llama and config.model_type == "mistral" and config.hidden_size % config.num_attention_heads == 0:
        copy = llama_config(copy)
    copy.architectures = None  # written from the class that is saved
    return copy


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Loads the folder as anyone would and compares weights, exactly, and logits with the live model.

    Raises:
        EfficientLLMError: if they differ.
    """
    reloaded = load_model(str(folder), torch.float32)
    written = dict(reloaded.named_parameters())
    for name, param in model.named_parameters():
        expected = param.detach().to("cpu", dtype).float()
        if name not in written or not torch.equal(written[name].detach(), expected):
            raise EfficientLLMError(f"{folder}: '{name}' differs from what was trained; report this as a bug")
    vocab_size: int = model.config.vocab_size
    tokens = (
        torch.arange(TOKENS_COMPARED).remainder(vocab_size)[None] * (vocab_size // TOKENS_COMPARED or 1) % vocab_size
    )
    live, again = _logits(model, tokens), _logits(reloaded, tokens)
    difference = float((live - again).abs().max() / live.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE[dtype]:
        raise EfficientLLMError(
            f"{folder}: the reloaded model's logits differ from the original's by {difference:.2g} of the largest; "
            "report this as a bug"
        )


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    logits: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()
    model.train(was_training)
    return logits
