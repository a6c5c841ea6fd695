"""Text to documents, documents to token shards, shards to batches."""

import bz2
import gzip
import hashlib
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from efficientllm.data import shards as shards_module
from efficientllm.data.documents import DataSource, parse_source, read_documents
from efficientllm.data.loader import batches, epochs, mixture, require_batch
from efficientllm.data.token_folder import is_prepared, open_tokens, prepare, tokenizer_fingerprint
from efficientllm.errors import ConfigError, DataError
from helpers.paths import SHARED

BOS, EOS = 256, 257


def byte_tokenizer(*, bos: bool = True, eos: bool = True, extra: int = 0, template: str | None = None) -> Any:
    """One token a byte: ids are the bytes' positions in the byte-level alphabet, sorted."""
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": BOS, "</s>": EOS} | {f"<x{n}>": 258 + n for n in range(extra)}
    inside = Tokenizer(models.BPE(vocab, []))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    names = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=inside, **names)
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> list[int]:
    """The oracle: GPT-2's byte-to-letter table, written out here."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: byte for byte in printable} | {byte: 256 + n for n, byte in enumerate(others)}
    rank = {letter: n for n, letter in enumerate(sorted(letters.values()))}
    return [rank[letters[byte]] for byte in text.encode()]


def documents(path: Path, **options: Any) -> list[str]:
    return list(read_documents(parse_source(str(path)), **options))


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_texts(path: Path, texts: list[str]) -> DataSource:
    path.write_bytes(jsonl(*texts))
    return parse_source(str(path))


def folder_of(tmp_path: Path, name: str, letter: str, count: int) -> Any:
    """A prepared folder of `count` distinct rows of 8 tokens, each a BOS and seven letters."""
    texts = [f"{letter}{n:06d}" for n in range(count)]
    return prepare([write_texts(tmp_path / f"{name}.jsonl", texts)], byte_tokenizer(), tmp_path / name, hold_out=False)


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", None)])
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str, pack: Any) -> None:
    texts = ["one", "zwei äöü €", "drei\nlines", "x" * 3_000_000]
    data = jsonl(*texts)
    if pack is None:  # two frames in one file, as `cat a.zst b.zst` gives
        pack = lambda d: b"".join(zstandard.compress(part) for part in (d[:50], d[50:]))  # noqa: E731
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(data))
    assert documents(path) == texts


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_broken_compression(tmp_path: Path, suffix: str, pack: Any, damage: str) -> None:
    packed = pack(jsonl(*(hashlib.sha256(bytes([n])).hexdigest() for n in range(200))))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else b"not packed at all")
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: corrupt or truncated"):
        documents(path)


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "id": [1, 2, 3]}), path)
    assert documents(path) == ["a", "b"]
    with pytest.raises(DataError, match="row 1: no field 'body', found text, id"):
        documents(path, text_field="body")
    with pytest.raises(DataError, match="row 1: 'id' holds int, not text"):
        documents(path, text_field="id")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="corrupt parquet"):
        documents(path)


def test_txt_splits(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\n\n \nthree\n".encode())
    assert documents(path) == ["one\r\ntwo\n\n \nthree\n"]
    assert documents(path, txt_split="line") == ["one", "two", "three"]
    assert documents(path, txt_split="blank") == ["one\r\ntwo", "three"]
    with pytest.raises(ConfigError, match="'page'"):
        documents(path, txt_split="page")


def test_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_bytes(jsonl("first"))
    (tmp_path / "sub/c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("no")
    assert documents(tmp_path) == ["first", "second", "third"]


def test_messages_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]}))
    template = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    tokenizer = byte_tokenizer(template=template)
    assert documents(path, tokenizer=tokenizer) == ["<s>user:hi;bot:ho;"]
    folder = prepare([parse_source(str(path))], tokenizer, tmp_path / "out")
    assert folder.tokens == 1 + len("user:hi;bot:ho;")
    assert folder.rows(16)[0].tolist() == [BOS, *ids("user:hi;bot:ho;")]  # one BOS, not two
    with pytest.raises(DataError, match="no chat template"):
        documents(path, tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: invalid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: a list, not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2: no field 'text', found body, id"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", b"a\nb\nc \xe9t\xe9\n", r"a\.txt, line 3: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.jsonl.bz2", bz2.compress(b"{}"), r"extension '\.bz2' is unknown"),
        ("a", b"text", r"extension '\(none\)' is unknown"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "new" / "out"
    with pytest.raises(DataError, match=message) as error:
        prepare([parse_source(str(tmp_path / name))], byte_tokenizer(), out)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "an error left something behind"


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}')
    assert documents(path) == ["a \ufffd b \U0001f600"]


def test_sources(tmp_path: Path) -> None:
    assert parse_source("org/name:config=0.3") == DataSource("org/name:config=0.3", "org/name:config", 0.3)
    assert parse_source("org/name").weight == 1
    odd = tmp_path / "a=2.txt"
    odd.write_text("hello")
    assert parse_source(str(odd)) == DataSource(str(odd), str(odd), 1.0)  # an existing path wins
    assert parse_source(f"{odd}=3").weight == 3
    for weight in ("0", "-1", "inf", "nan", "x", ""):
        with pytest.raises(ConfigError, match="finite number above 0"):
            parse_source(f"org/name={weight}")
    for missing in (str(tmp_path / "no"), "./no", "no.jsonl.zst", "a/b/c", ""):
        with pytest.raises(DataError, match=r"does not exist|no path or name"):
            parse_source(missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no"):
        documents(empty)


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientllm.data.documents import _hub_documents

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "train.jsonl").write_bytes(jsonl("a", "b"))
    (tmp_path / "test.jsonl").write_bytes(jsonl("c"))

    def texts(location: str) -> list[str | None]:
        return list(_hub_documents(DataSource(location, location), lambda row, where: f"{where}: {row['text']}"))

    here = str(tmp_path)  # the same loader takes a data set's folder
    assert texts(here) == [f"data {here}, row 1: a", f"data {here}, row 2: b"]
    assert texts(f"{here}:default:test") == [f"data {here}:default:test, row 1: c"]
    with pytest.raises(DataError, match="the hub returned no data set"):
        texts(f"{here}:default:nowhere")
    with pytest.raises(DataError, match="no such path, and the hub returned no data set") as error:
        list(read_documents(parse_source("efficientllm/no-such-set")))
    assert "\n" not in str(error.value)


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator, bos, eos", [("bos", 1, 0), ("eos", 0, 1), ("both", 1, 1), ("none", 0, 0)])
def test_rows_equal_an_independent_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, bos: int, eos: int
) -> None:
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 100)
    texts = [f"Text {n} " + "é" * (n % 13) for n in range(60)]
    stream = [token for text in texts for token in [BOS] * bos + ids(text) + [EOS] * eos]
    source = write_texts(tmp_path / "a.jsonl", texts)
    folder = prepare([source], byte_tokenizer(), tmp_path / "out", document_separator=separator, hold_out=False)
    assert (folder.separator, folder.dtype, folder.documents, folder.valid_tokens) == (separator, "uint16", 60, 0)
    assert folder.tokens == len(stream)
    parts = [stream[start : start + 100] for start in range(0, len(stream), 100)]
    expected = [part[i : i + 16] for part in parts for i in range(0, len(part) - 15, 16)]
    rows = folder.rows(16)
    assert [row.tolist() for row in rows] == expected
    assert rows[-1].dtype == np.int64 and rows[-1].tolist() == expected[-1]
    with pytest.raises(IndexError):
        rows[len(expected)]
    first = np.load(tmp_path / "out/train-00000.npy", mmap_mode="r", allow_pickle=False)
    assert first.tolist() == stream[:100] and first.dtype == np.uint16


def test_default_separator_and_missing_tokens(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["abc"])
    no_bos, none = byte_tokenizer(bos=False), byte_tokenizer(bos=False, eos=False)
    assert prepare([source], byte_tokenizer(), tmp_path / "1").rows(4)[0].tolist() == [BOS, *ids("abc")]
    assert prepare([source], no_bos, tmp_path / "2").rows(4)[0].tolist() == [*ids("abc"), EOS]
    assert prepare([source], none, tmp_path / "3", document_separator="none").rows(3)[0].tolist() == ids("abc")
    for tokenizer, separator in ((no_bos, "bos"), (no_bos, "both"), (none, None), (no_bos, "tab")):
        with pytest.raises(ConfigError, match="document separator"):
            prepare([source], tokenizer, tmp_path / "4", document_separator=separator)
    assert not (tmp_path / "4").exists()


def test_truncation_padding_and_post_processor_are_ignored(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["a long document", "b"])
    tokenizer = byte_tokenizer()
    inside = tokenizer.backend_tokenizer
    before = tokenizer_fingerprint(tokenizer, None)
    inside.enable_truncation(4)
    inside.enable_padding(length=9)
    inside.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    folder = prepare([source], tokenizer, tmp_path / "out", hold_out=False)
    assert folder.rows(18)[0].tolist() == [BOS, *ids("a long document"), BOS, *ids("b")]
    assert inside.truncation is not None and inside.padding is not None, "the user's tokenizer was changed"
    assert folder.fingerprint == before


def test_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(extra=65536 - 258)
    source = write_texts(tmp_path / "a.jsonl", ["abc"])
    assert prepare([source], tokenizer, tmp_path / "16").dtype == "uint16"
    folder = prepare([source], byte_tokenizer(extra=65537 - 258), tmp_path / "32")
    assert folder.dtype == "uint32" and folder.rows(4)[0].tolist() == [BOS, *ids("abc")]


def test_fingerprint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, other = byte_tokenizer(), byte_tokenizer(extra=1)
    source = write_texts(tmp_path / "a.jsonl", ["abc", "def"])
    prepare([source], tokenizer, tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert open_tokens(tmp_path / "out", reloaded).sources == (str(tmp_path / "a.jsonl"),)
    assert tokenizer_fingerprint(tokenizer, "bos") != tokenizer_fingerprint(tokenizer, "both")
    for wrong in (other, byte_tokenizer(bos=False)):
        with pytest.raises(DataError, match="made with another tokenizer"):
            open_tokens(tmp_path / "out", wrong)
    assert is_prepared(tmp_path / "out") and not is_prepared(tmp_path)


def test_held_out_documents(tmp_path: Path) -> None:
    texts = [f"{n:07d}" for n in range(4000)] * 2  # every text comes twice
    source = write_texts(tmp_path / "a.jsonl", texts)
    first = prepare([source], byte_tokenizer(), tmp_path / "1")
    again = prepare([source], byte_tokenizer(), tmp_path / "2")
    assert (first.sha256, first.tokens) == (again.sha256, again.tokens)
    train, valid = ({tuple(row.tolist()) for row in first.rows(8, name)} for name in ("train", "valid"))
    assert 8 <= len(valid) <= 40  # 0.5% of 4000 is 20
    assert not train & valid and len(train | valid) == 4000
    assert len(first.rows(8, "all")) == len(first.rows(8)) + len(first.rows(8, "valid"))
    # whether a text is held out depends on the text alone
    back = prepare([write_texts(tmp_path / "b.jsonl", texts[:4000][::-1])], byte_tokenizer(), tmp_path / "3")
    assert {tuple(row.tolist()) for row in back.rows(8, "valid")} == valid


def test_held_out_is_bounded_and_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = write_texts(tmp_path / "two.jsonl", ["first", "last"])
    folder = prepare([two], byte_tokenizer(), tmp_path / "two")
    assert folder.rows(5, "valid")[0].tolist() == [BOS, *ids("last")] and folder.tokens == 6
    one = prepare([write_texts(tmp_path / "one.jsonl", ["only"])], byte_tokenizer(), tmp_path / "one")
    assert (one.tokens, one.valid_tokens) == (5, 0) and len(one.rows(2, "valid")) == 0
    monkeypatch.setattr("efficientllm.data.token_folder.HELD_OUT_TOKENS", 50)
    many = prepare(
        [write_texts(tmp_path / "m.jsonl", [f"{n:07d}" for n in range(4000)])], byte_tokenizer(), tmp_path / "m"
    )
    assert many.valid_tokens == 48 and many.tokens == 32000 - 48


def test_prepare_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    good = write_texts(tmp_path / "good.jsonl", ["abc"] * 5000)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl(*["abc"] * 5000) + b"{")
    seen: list[tuple[int, int]] = []
    with pytest.raises(DataError, match="line 5001"):
        prepare([good, parse_source(str(bad))], byte_tokenizer(), tmp_path / "x/y", progress=lambda *n: seen.append(n))
    assert seen and sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]
    prepare([good], byte_tokenizer(), tmp_path / "x/y", hold_out=False, progress=lambda *n: seen.append(n))
    assert seen[-1] == (5000, 20000) and [path.name for path in (tmp_path / "x").iterdir()] == ["y"]
    with pytest.raises(DataError, match="exists"):
        prepare([good], byte_tokenizer(), tmp_path / "x/y")


def test_damaged_folders(tmp_path: Path) -> None:
    prepare([write_texts(tmp_path / "a.jsonl", ["abc"] * 500)], byte_tokenizer(), tmp_path / "out", hold_out=False)
    shard, index = tmp_path / "out/train-00000.npy", tmp_path / "out/index.json"
    whole, text = shard.read_bytes(), index.read_text()
    for content in (whole[:-2], whole[:40], b"", whole + b"x" * 10**6):
        shard.write_bytes(content)
        if len(content) > len(whole):
            open_tokens(tmp_path / "out")  # control: only what is missing matters
            continue
        with pytest.raises(DataError, match="truncated") as error:
            open_tokens(tmp_path / "out")
        assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        open_tokens(tmp_path / "out")
    shard.write_bytes(whole)
    for broken in (text[:50], "[]", "{}", text.replace('"version": 1', '"version": 9')):
        index.write_text(broken)
        with pytest.raises(DataError, match="prepare again"):
            open_tokens(tmp_path / "out")
    index.write_text(text)
    assert open_tokens(tmp_path / "out").tokens == 2000


# --- feed ---------------------------------------------------------------------------------------------------------


def take(iterator: Any, count: int) -> list[list[list[int]]]:
    return [next(iterator).tolist() for _ in range(count)]


def test_order_is_deterministic_and_resumable_from_any_row(tmp_path: Path) -> None:
    parts = [(folder_of(tmp_path, "a", "a", 50), 2.0), (folder_of(tmp_path, "b", "b", 30), 1.0)]

    def make(seed: int) -> Any:
        return mixture(parts, seq_len=8, seed=seed, include_valid=False)

    whole = take(batches(make(0), 0, 4), 60)
    assert np.shape(whole) == (60, 4, 8) and next(batches(make(0), 0, 4)).dtype == np.int64
    assert take(batches(make(0), 0, 4), 60) == whole
    rows = [row for batch in whole for row in batch]
    assert rows == [make(0)[n].tolist() for n in range(240)]  # read at random, without threads
    for start in (1, 4, 37, 200):
        assert take(batches(make(0), start, 5), 5) == [rows[start + 5 * n : start + 5 * n + 5] for n in range(5)]
    assert take(batches(make(1), 0, 4), 60) != whole


def test_every_epoch_is_a_new_permutation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", "a", 40)
    dataset = mixture([(folder, 1.0)], seq_len=8, seed=0, include_valid=False)
    passes = [[tuple(dataset[n].tolist()) for n in range(start, start + 40)] for start in (0, 40, 80)]
    everything = {tuple(row.tolist()) for row in folder.rows(8)}
    assert all(set(one) == everything for one in passes)
    assert len({tuple(one) for one in passes}) == 3 and passes[0] != [tuple(row.tolist()) for row in folder.rows(8)]


def test_weights_are_shares_of_tokens_whatever_the_sizes(tmp_path: Path) -> None:
    parts = [(folder_of(tmp_path, "a", "a", 20), 1.0), (folder_of(tmp_path, "b", "b", 200), 0.3)]
    dataset = mixture(parts, seq_len=8, seed=0, include_valid=False)
    share = np.mean([dataset[n][1] == ids("b")[0] for n in range(1300)])
    assert abs(share - 0.3 / 1.3) < 0.005
    counts = epochs([folder for folder, _ in parts], [1.0, 0.3], 8, 1300)
    assert counts == {parts[0][0].spec: pytest.approx(50), parts[1][0].spec: pytest.approx(1.5)}


def test_held_out_rows_train_only_when_asked(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", [f"a{n:06d}" for n in range(1000)])
    folder = prepare([source], byte_tokenizer(), tmp_path / "out")
    valid = {tuple(row.tolist()) for row in folder.rows(8, "valid")}
    for include in (False, True):
        dataset = mixture([(folder, 1.0)], seq_len=8, seed=0, include_valid=include)
        assert bool(valid & {tuple(dataset[n].tolist()) for n in range(1000)}) == include


def test_too_little_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a", "a", 4)
    with pytest.raises(DataError, match="32 training tokens, less than one row of 33"):
        mixture([(folder, 1.0)], seq_len=33, seed=0, include_valid=False)
    with pytest.raises(DataError, match="32 training tokens, less than one batch of 40"):
        require_batch([folder], 40)
    require_batch([folder, folder], 40)
    with pytest.raises(ConfigError):
        mixture([], seq_len=8, seed=0, include_valid=False)


def test_grain_does_not_warn_about_jax(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder_of(tmp_path, "a", "a", 4)
    code = (
        "import sys; from pathlib import Path; from efficientllm.data.loader import *; "
        "from efficientllm.data.token_folder import open_tokens; "
        "d = mixture([(open_tokens(Path(sys.argv[1])), 1.0)], seq_len=8, seed=0, include_valid=False); "
        "print(next(batches(d, 0, 2)).shape); assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 8)\n", "")
    assert logging.getLogger("absl").isEnabledFor(logging.WARNING)


@pytest.mark.skipif(not (SHARED / "models/stories260K").exists(), reason="no shared models")
def test_real_tokenizer_packs_like_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    path = SHARED / "data/tinystories/valid.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:50]]
    stream = [t for x in texts for t in [tokenizer.bos_token_id, *tokenizer(x, add_special_tokens=False)["input_ids"]]]
    folder = prepare([write_texts(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "out", hold_out=False)
    assert np.concatenate(list(folder.rows(256))).tolist() == stream[: len(stream) // 256 * 256]
