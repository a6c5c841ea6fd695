"""Makes the untrained source of the demo's model: a tokenizer trained on the demo's text and a Llama config.

    python experiments/demo_model/make_source.py CORPUS OUT

CORPUS is a folder to write the text into, OUT the model folder: config.json, tokenizer.json, tokenizer_config.json and
generation_config.json, without weights. README.md gives the commands that train it from there.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from efficientllm.demo.docstrings import write_corpus

BOS, EOS = "<s>", "</s>"
VOCAB_SIZE = 2048  # of some 600k parameters the tied embedding then holds a third, as in models of 100M
CONTEXT = 512  # tokens; twice what the demo trains with


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE of `vocab_size` entries: every byte has one, so nothing is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return tokenizer


def make_source(corpus_folder: Path, out: Path) -> LlamaConfig:
    """Returns the config of the demo's model, which was written, with the tokenizer, into the folder `out`."""
    corpus = write_corpus(corpus_folder)
    # The held-out documents stay unseen by the tokenizer too.
    with corpus.train.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return write_model(
        texts,
        out,
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
    )


def write_model(texts: Iterable[str], out: Path, *, vocab_size: int, **sizes: int) -> LlamaConfig:
    """Returns the config of a Llama with a tied head, written without weights, with a tokenizer of these texts."""
    tokenizer = train_tokenizer(texts, vocab_size)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
        **sizes,
    )
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=bos, eos_token_id=eos).save_pretrained(out)
    length = sizes["max_position_embeddings"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=length)
    fast.save_pretrained(out)
    return config


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_source.py CORPUS OUT")
    make_source(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"wrote {sys.argv[2]}")
