"""Bad models: each is refused in one line that names the trouble, with exit code 2, and nothing is written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from efficientllm.cli import main
from efficientllm.models.load import load_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that stock transformers made, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "good"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    inside = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "once": 2}, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=inside, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


# How to spoil a good folder, by what is wrong with it


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def not_a_model(folder: Path) -> None:
    (folder / "config.json").unlink()


def a_run_folder(folder: Path) -> None:
    inside = folder / "model"
    inside.mkdir()
    for name in ("config.json", WEIGHTS):
        (folder / name).rename(inside / name)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def typeless(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 32}')


def quantised(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def unknown_family(folder: Path) -> None:
    edit_config(folder, model_type="llamoid", architectures=["LlamoidForCausalLM"])


def encoder(folder: Path) -> None:
    edit_config(folder, model_type="bert", architectures=["BertForMaskedLM"])


def encoder_decoder(folder: Path) -> None:
    edit_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)


def impossible_sizes(folder: Path) -> None:
    edit_config(folder, hidden_size=33, head_dim=None)


class Booby:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.mark),))


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Booby(str(folder / "unpickled"))))


def weightless(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def truncated_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20])


def lost_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def lost_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.__delitem__("model.layers.1.mlp.up_proj.weight"))


def other_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)


UNREADABLE: list[tuple[Callable[[Path], None], str]] = [
    (missing, "no such folder"),
    (a_file, "is a file"),
    (not_a_model, "not a model folder (it has no config.json)"),
    (a_run_folder, "did you mean"),
    (broken_config, "broken config.json"),
    (typeless, "names no model_type"),
    (quantised, "quantised (gptq)"),
    (unknown_family, "llamoid"),
    (encoder, "BertForMaskedLM is not a decoder"),
    (encoder_decoder, "encoder-decoder"),
    (impossible_sizes, "cannot be "),
]
WITHOUT_GOOD_WEIGHTS: list[tuple[Callable[[Path], None], str]] = [
    (pickle_only, "are a pickle (pytorch_model.bin)"),
    (weightless, f"no {WEIGHTS}"),
    (truncated, f"{WEIGHTS} is truncated or corrupt"),
    (truncated_in_the_header, f"{WEIGHTS} is truncated or corrupt"),
    (lost_shard, "model-00001-of-00002.safetensors is missing"),
    (lost_tensor, "'model.layers.1.mlp.up_proj.weight' is missing"),
    (other_shape, "has shape (32, 48), config.json asks for (32, 40)"),
]


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    return folder


def command(verb: str, model: Path) -> list[str]:
    if verb == "inspect":
        return ["inspect", str(model)]
    if verb == "generate":
        return ["generate", str(model), "once", "--max-new-tokens", "2"]
    text = model.parent / "text.txt"
    text.write_text("once " * 2000)
    sizes = "--target-params 9k --prune-tokens 128 --tokens 128 --seq-len 16 --batch-tokens 64 --txt-split file"
    return [
        "prune",
        str(model),
        "--data",
        str(text),
        "--valid",
        str(text),
        "--out",
        str(model.parent / "out"),
        *sizes.split(),
    ]


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refusal(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must fail with exit code 2 and leave every file as it is."""
    before = files(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("efficientllm: error: ") and err.count("\n") == 1
    assert files(folder) == before
    return err


@pytest.mark.parametrize("verb", ["inspect", "generate", "prune"])
@pytest.mark.parametrize(("spoil", "words"), UNREADABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_config_that_cannot_be_used(
    spoil: Callable[[Path], None], words: str, verb: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    line = refusal(command(verb, model), model.parent, capsys)
    assert words in line and (str(model) in line), line


@pytest.mark.parametrize("verb", ["generate", "prune"])
@pytest.mark.parametrize(("spoil", "words"), WITHOUT_GOOD_WEIGHTS, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_cannot_be_used(
    spoil: Callable[[Path], None], words: str, verb: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    line = refusal(command(verb, model), model.parent, capsys)
    assert words in line and (str(model) in line), line
    assert not (model / "unpickled").exists()


def test_the_pickle_would_have_left_its_mark(tmp_path: Path) -> None:
    """The control of the test above."""
    pickle.loads(pickle.dumps(Booby(str(tmp_path / "unpickled"))))
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("verb", ["inspect", "prune"])
def test_a_family_that_cannot_be_pruned(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "model")
    line = refusal(command(verb, tmp_path / "model"), tmp_path, capsys)
    assert "gpt2: cannot be pruned (LayerNorm" in line and "llama" in line


def test_remote_code_does_not_run_unasked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, model_type="remote", auto_map={"AutoConfig": "remote.RemoteConfig"}, architectures=["Remote"])
    mark = model.parent / "ran"
    (model / "remote.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig\nclass RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n"
    )
    assert "--trust-remote-code" in refusal(command("inspect", model), model.parent, capsys)
    assert not mark.exists()
    assert main([*command("inspect", model), "--trust-remote-code"]) == 2  # asked for, it runs; still no known family
    assert mark.exists()


@pytest.mark.parametrize("verb", ["inspect", "generate"])
def test_the_unspoilt_model_is_taken(verb: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control of every refusal here."""
    assert main(command(verb, model)) == 0
    assert capsys.readouterr().err == ""


def test_weights_too_many_are_left_out_with_a_warning(model: Path) -> None:
    edit_weights(model, lambda weights: weights.update(extra=torch.zeros(2)))
    with pytest.warns(UserWarning, match="ignored 1 weight .* 'extra'"):
        loaded = load_model(str(model))
    assert "extra" not in loaded.state_dict()


def test_weights_arrive_as_they_were_saved(model: Path) -> None:
    saved = load_file(model / WEIGHTS)
    loaded = load_model(str(model)).state_dict()
    assert saved and all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
