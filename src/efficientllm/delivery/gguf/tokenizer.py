"""A tokenizer as GGUF metadata, taken from what its tokenizer.json does, not from the names of known models.

llama.cpp has two that matter here: byte-level BPE ("gpt2"), whose splitting of text into words it knows by name, and
SentencePiece's BPE with byte fall-back ("llama"), which merges by scores of pieces instead of a list of merges.
"""

import json
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from efficientllm.delivery.gguf.architecture import Value
from efficientllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED, _CASED_REST = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# By (how text is split into words, whether whole words skip the merges): the name llama.cpp has for it.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    ((rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",), False): "dbrx",
    ((rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_CASED_REST}",), True): "tekken",
    (
        (rf"{_CASED}*{_LOWER}+{_SHORT}?|{_CASED}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_CASED_REST}",),
        False,
    ): "gpt-4o",
}


def tokenizer_metadata(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> dict[str, Value]:
    """Returns everything llama.cpp needs to tokenise as `tokenizer` does, chat template included.

    Args:
        vocab_size: rows of the embedding; ids that no token has are named [PAD…].

    Raises:
        UnsupportedModelError: llama.cpp cannot tokenise so; names what it lacks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError("GGUF: the tokenizer has no tokenizer.json; save it with a fast tokenizer first")
    content = json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind != "BPE":
        raise UnsupportedModelError(
            f"GGUF: a {kind} tokenizer cannot be exported; use a model with a BPE one (byte-level, or SentencePiece's)"
        )
    special = _piece_scores(content) if content["model"].get("byte_fallback") else _merges(content)
    values = special | _tokens(content, vocab_size, byte_fallback="scores" in special)
    if isinstance(scores := values.get("scores"), list):
        values["scores"] = [*scores, *[0.0] * (vocab_size - len(scores))]
    values |= _special_tokens(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    found: dict[str, Value] = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    for name, text in templates.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    if others := [name for name in templates if name != "default"]:
        found["tokenizer.chat_templates"] = others
    return found


def swallows_space(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Returns whether a space at the beginning of a text is the one that the tokenizer would have put there itself.

    So it is with Metaspace; llama.cpp and SentencePiece put another one before it.
    """
    steps = _steps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns a normalizer's or pre-tokenizer's steps as a flat list."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        inner = step.get("normalizers") or step.get("pretokenizers") or []
        return [each for part in inner for each in _steps(part)]
    return [step]


def _tokens(content: dict[str, Any], vocab_size: int, byte_fallback: bool) -> dict[str, Value]:
    """Returns texts and kinds of all ids."""
    vocab: dict[str, int] = content["model"]["vocab"]
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {number: text for text, number in vocab.items()} | {
        number: token["content"] for number, token in added.items()
    }
    if len(by_id) and max(by_id) >= vocab_size:
        raise UnsupportedModelError(
            f"GGUF: the tokenizer has ids up to {max(by_id)}, but the model's vocabulary has only {vocab_size} rows; "
            "get both from one source"
        )
    unknown = content["model"].get("unk_token")
    texts: list[str] = []
    kinds: list[int] = []
    for number in range(vocab_size):
        text = by_id.get(number)
        if text is None:
            kind = TokenType.UNUSED
        elif byte_fallback and text == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        elif byte_fallback and _is_byte(text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        if kind == TokenType.USER_DEFINED and byte_fallback and text:
            text = text.replace(SPACE, " ")  # llama.cpp searches for them before it escapes spaces
        texts.append(f"[PAD{number}]" if text is None else text)
        kinds.append(int(kind))
    values: dict[str, Value] = {"tokens": texts, "token_type": kinds}
    return values


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _merges(content: dict[str, Any]) -> dict[str, Value]:
    """Returns merges and splitting of a byte-level BPE."""
    if kinds := {step["type"] for step in _steps(content["normalizer"])} - {"NFC"}:  # llama.cpp applies no NFC either
        raise UnsupportedModelError(f"GGUF: llama.cpp has no normalizer {sorted(kinds)[0]} for a byte-level tokenizer")
    steps = _steps(content["pre_tokenizer"])
    names = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            names.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            names += ["ByteLevel"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            names.append("Digits")
        else:
            names.append(step["type"] + " with these settings")
    if not steps or steps[-1]["type"] != "ByteLevel":
        names = ["one that does not end with ByteLevel"]
    found = PRE_TOKENIZERS.get((tuple(names), bool(content["model"].get("ignore_merges"))))
    if found is None:
        raise UnsupportedModelError(f"GGUF: llama.cpp does not know this pre-tokenizer: {', '.join(names)}")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    if not merges:
        raise UnsupportedModelError("GGUF: a byte-level tokenizer without merges; llama.cpp needs at least one")
    return {"model": "gpt2", "pre": found, "merges": merges, "add_space_prefix": False}


def _piece_scores(content: dict[str, Any]) -> dict[str, Value]:
    """Returns scores of a BPE with byte fall-back: a piece's rank among all merges, negative.

    Equal to merging by the list only if every way to make a piece of two is in it, and the pieces' merges do not
    interleave. Lists that were made from a SentencePiece model are so; this is checked.
    """
    prefix = False
    for step in (*_steps(content["normalizer"]), *_steps(content["pre_tokenizer"])):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE:
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            pass
        elif step["type"] == "Split" and step["pattern"] == {"String": " "}:
            pass  # Gemma's: all spaces have been replaced by then
        else:
            raise UnsupportedModelError(
                f"GGUF: llama.cpp's SentencePiece does not support this tokenizer's step {step['type']}"
            )
    vocab: dict[str, int] = content["model"]["vocab"]
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
        raise UnsupportedModelError(f"GGUF: the tokenizer's byte fallback has no token for byte {missing[0]}")
    added = {token["content"] for token in content["added_tokens"]}
    ranks: dict[str, tuple[int, int]] = {}  # first and last rank of the merges that make a piece
    pairs = set()
    for rank, pair in enumerate(content["model"]["merges"]):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        pairs.add((left, right))
        ranks[left + right] = (ranks.get(left + right, (rank, rank))[0], rank)
    for piece in vocab:
        if piece in added or _is_byte(piece):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                raise UnsupportedModelError(
                    f"GGUF: its merges lack '{left}' + '{right}', so they are not a SentencePiece model's, and "
                    "llama.cpp would tokenise differently"
                )
    ordered = sorted(ranks, key=lambda piece: ranks[piece])
    for piece, later in pairwise(ordered):
        if ranks[piece][1] > ranks[later][0]:
            raise UnsupportedModelError(
                f"GGUF: merges of '{piece}' and '{later}' interleave; llama.cpp would tokenise differently"
            )
    scores = [0.0] * (max(vocab.values()) + 1)
    for piece, (first, _) in ranks.items():
        scores[vocab[piece]] = -1.0 - first
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Value]:
    """Returns ids of special tokens, and which of them are put around a text, as the tokenizer itself does it."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    values: dict[str, Value] = {f"{names[name]}_token_id": number for name, number in ids.items() if number is not None}
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for bos, eos in product((False, True), repeat=2):
        if whole == [ids["bos"]] * bos + plain + [ids["eos"]] * eos:
            return values | {"add_bos_token": bos, "add_eos_token": eos}
    raise UnsupportedModelError(
        f"GGUF: the tokenizer turns the ids {plain} into {whole}, which is not just its BOS and EOS around them"
    )
