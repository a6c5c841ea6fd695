"""A model as a GGUF file for llama.cpp and what is built on it."""

from pathlib import Path
from typing import TYPE_CHECKING

from efficientllm.delivery import llama_cpp
from efficientllm.delivery.child import in_child
from efficientllm.delivery.gguf.architecture import ARCHITECTURES, context_length, find_architecture
from efficientllm.delivery.gguf.contents import find_contents, title
from efficientllm.delivery.gguf.file import Contents, check_file, write_gguf
from efficientllm.delivery.gguf.tensors import biases
from efficientllm.delivery.gguf.tokenizer import swallows_space
from efficientllm.delivery.gguf.types import TYPES, bits_per_weight, needs_llama_cpp, plan_types, type_lines
from efficientllm.delivery.gguf.widening import widened, widened_config, widens
from efficientllm.delivery.proof import TEXTS, WORST_RATIO, compare, held_out_rows, held_out_text
from efficientllm.errors import EfficientLLMError
from efficientllm.files import check_out, check_space, put, staging
from efficientllm.models.load import empty_model, load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = {"f32": 1e-4, "f16": 2e-2, "bf16": 1e-1}  # of the largest logit: the runtime rounds activations as weights
HALF_GELU = (
    1e-2  # its CPU code reads GELU from a table of half-precision numbers: Gemma's float32 is no better than that
)
WIDENED_TOKENS = 64  # that a widened model is compared on
HEADER_BYTES = 4096  # about what the file holds beside tensors and vocabulary


def export_gguf(model: str, type: str, out: Path, *, ids: list[int], overwrite: bool, trust_remote_code: bool) -> None:
    """Writes a model as GGUF and proves the file, in llama.cpp if it is installed; prints what it does.

    Args:
        ids: held-out tokens to compare logits on; without any it is text that every Python carries.

    Raises:
        EfficientLLMError: the model does not fit, the output is there, or the proof fails; nothing is left behind then.
    """
    import torch

    check_out(out, overwrite, folder=False)
    use_llama_cpp = needs_llama_cpp(type)
    if use_llama_cpp:
        llama_cpp.require(f"--type {type}")
    config = own = load_config(model, trust_remote_code)
    if widens(own):
        config = widened_config(own)
    empty = empty_model(config, model)
    tokenizer = load_tokenizer(model, trust_remote_code)
    contents = find_contents(title(model), empty, tokenizer, type, find_architecture(config, biases(empty)))
    context = context_length(config, contents.name)
    print(f"{model} ({config.model_type}) as llama.cpp architecture {contents.name}")
    if config is not own:
        print(
            "  padded with zeros, because there the hidden size must be heads × head size: hidden size "
            f"{own.hidden_size} with {own.num_attention_heads} heads becomes {config.hidden_size} with "
            f"{config.num_attention_heads}"
        )
    if context < config.max_position_embeddings:
        print(
            f"  context cut to {context:,} tokens, the size of the sliding window: the architecture has none, and "
            "needs none up to that length"
        )
    shape = {
        "num_layers": config.num_hidden_layers,
        "many_groups": has_many_groups(contents),
    }
    plans = plan_types(contents.shapes, type, **shape, k_types=use_llama_cpp)
    plain = plan_types(contents.shapes, "f32", **shape, k_types=False)
    print(*type_lines(plans, type), sep="\n")
    both = [*plans, *plain] if use_llama_cpp else plans
    vocabulary = 2 * len(tokenizer.backend_tokenizer.to_str())
    check_space(out, sum(plan.num_bytes for plan in both) + vocabulary + HEADER_BYTES)
    loaded = load_model(model, torch.float32, trust_remote_code)
    written = loaded if config is own else _widened(loaded, ids)
    weights = dict(written.named_parameters())
    with staging(out) as folder:
        partial = folder / out.name
        if use_llama_cpp:
            write_gguf(folder / "f32.gguf", contents, plain, weights)
            llama_cpp.quantize_file(folder / "f32.gguf", partial, int(TYPES[type][1]))
        else:
            write_gguf(partial, contents, plans, weights)
        worst = check_file(partial, contents, plans, weights)
        count = f"{len(plans)} tensors and {len(contents.values)} values"
        print(f"read back: {count} match the model, the worst tensor to within {worst:.1e} of its size")
        if llama_cpp.is_installed():
            half_gelu = type == "f32" and ARCHITECTURES[contents.name].activation != "silu"
            tolerance = HALF_GELU if half_gelu else TOLERANCE.get(type)
            _prove_in_llama_cpp(partial, loaded, tokenizer, ids, context, tolerance)
        else:
            print(f"not checked in llama.cpp, which is not installed; to check it there: {llama_cpp.EXTRA}")
        put(partial, out)
    size = out.stat().st_size
    print(f"{out}: {size:,} bytes, {bits_per_weight(plans):.2f} bits per weight")


def _widened(model: "PreTrainedModel", ids: list[int]) -> "PreTrainedModel":
    """Returns the model padded with zeros, after a check that it computes the same.

    Raises:
        EfficientLLMError: it does not.
    """
    import torch

    wide = widened(model)
    rows = torch.tensor([(ids or list(range(model.config.vocab_size)))[:WIDENED_TOKENS]])
    with torch.no_grad():
        expected, found = (each(input_ids=rows, use_cache=False).logits for each in (model, wide))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE["f32"]:
        raise EfficientLLMError(
            f"padding with zeros changed its logits, by {difference:.1e} of the largest; report this as a bug"
        )
    return wide


def has_many_groups(contents: Contents) -> bool:
    """Returns whether llama.cpp takes a model of 80 layers for one with several queries a key: any that is deci."""
    heads, groups = (contents.values[f"{contents.name}.attention.{key}"] for key in ("head_count", "head_count_kv"))
    return contents.name == "deci" or heads != groups


def _prove_in_llama_cpp(
    path: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ids: list[int],
    context: int,
    tolerance: float | None,
) -> None:
    """Loads the file in llama.cpp and compares tokens and logits with transformers'.

    Args:
        tolerance: largest difference of the logits, relative to the largest; None for quantised weights.

    Raises:
        EfficientLLMError: they differ by more than the type explains.
    """
    import torch

    texts: tuple[str, ...] = (*TEXTS, held_out_text())
    given = texts
    if swallows_space(tokenizer):
        given = tuple(text.removeprefix(" ") for text in texts)
        print("  note: if a text starts with a space, llama.cpp adds another one, as SentencePiece itself does")
    theirs = in_child("llama.cpp", llama_cpp.tokens, str(path), given)
    ours = [list(tokenizer(text)["input_ids"]) for text in texts]
    for text, got, expected in zip(texts, theirs, ours, strict=True):
        if got != expected:
            at = next((n for n, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), 0)
            raise EfficientLLMError(
                f"{path.name}: llama.cpp tokenises {text[:40]!r} differently: {got[at : at + 5]} instead of "
                f"{expected[at : at + 5]} at token {at}; the tokenizer cannot be exported"
            )
    rows = held_out_rows(ids or ours[-1], context)
    found = in_child("llama.cpp", llama_cpp.logits, str(path), rows)
    with torch.no_grad():
        reference = model(input_ids=torch.tensor(rows), use_cache=False).logits.float().numpy()
    comparison = compare(found, reference, rows)
    print(
        f"llama.cpp: {len(texts)} texts tokenised identically; {len(rows)} × {len(rows[0])} "
        f"{'held-out ' if ids else ''}tokens: {comparison}"
    )
    good = (
        comparison.difference <= tolerance
        if tolerance is not None
        else comparison.perplexity <= WORST_RATIO * comparison.reference
    )
    if not good:
        raise EfficientLLMError(f"{path.name}: llama.cpp computes something else ({comparison}); no file was kept")
