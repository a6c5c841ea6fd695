"""Folders of tiny models with tokenizers, as an export finds them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from helpers.families import make_model

disable_progress_bar()  # stderr is for errors, which tests read
VOCAB = 280  # rows of the embeddings: a few more than the tokenizers have ids
MERGES = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("i", "n")]


def byte_level_tokenizer(split: Any = None, **settings: Any) -> Any:
    """A BPE over bytes that puts BOS before a text; `split` is the pre-tokenizer before the byte-level one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate(["<s>", "</s>", *letters, *("".join(pair) for pair in MERGES)])}
    inside = Tokenizer(models.BPE(vocab, MERGES, **settings))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    inside.pre_tokenizer = last if split is None else pre_tokenizers.Sequence([*split, last])
    inside.decoder = decoders.ByteLevel()
    inside.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return fast(inside)


def sentence_piece_tokenizer(merges: list[tuple[str, str]] | None = None, like: str = "llama") -> Any:
    """A BPE with byte fall-back, as SentencePiece's are in tokenizer.json: Llama 2's, Mistral's or Gemma's way."""
    merges = merges or [("h", "e"), ("▁", "t"), ("i", "n")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁theina"]
    vocab = {piece: n for n, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    inside = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if like == "llama":
        inside.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif like == "mistral":
        inside.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        inside.normalizer = normalizers.Replace(" ", "▁")
        inside.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inside.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return fast(inside, unk_token="<unk>")


def fast(inside: Tokenizer, **settings: Any) -> Any:
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=inside, bos_token="<s>", eos_token="</s>", **settings)


def save(folder: Path, name: str, heads: str = "grouped", *, tokenizer: Any = None, **changes: Any) -> Any:
    """Writes a tiny model of a family in float32 with a tokenizer, and returns it."""
    model = make_model(name, heads, dtype=torch.float32, **{"vocab_size": VOCAB, **changes}).eval()
    model.save_pretrained(folder)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
    return model
