"""The command line: what it imports, how flags and YAML meet, what a mistake looks like, and the small verbs."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from efficientllm.cli import HANDLERS, main
from efficientllm.config.run_config import FIELDS, flag_name
from efficientllm.flags import build_parser

VERBS = ("inspect", "plan", "prepare", "prune", "report", "generate", "export", "bench", "eval", "compare", "push")


def run_cli(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "efficientllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["prune", *arguments, "--print_config"]) == 0
    return dict(yaml.safe_load(capsys.readouterr().out))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("efficientllm: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Mistral with random weights and a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 260}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inside = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*letters, "</s>"])}, []))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=inside, eos_token="</s>").save_pretrained(folder)
    return folder


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom efficientllm.cli import main\n"
        f"code = main({arguments})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'grain', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stderr == "[] 0\n"
    assert "efficientllm" in done.stdout


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_cli("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # what others do is not counted

    assert min(seconds() for _ in range(3)) < 0.5


def test_every_field_of_the_config_is_a_flag_of_prune() -> None:
    help_text = build_parser(HANDLERS)[1]["prune"].format_help()
    for name in FIELDS:
        assert re.search(rf"(?m)^  (.*, )?{flag_name(name)}\b", help_text), name


# Flags and YAML


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: A\nlr: 1e-3\nseed: 7\ncompensate: true\nbatch-tokens: 2Ki\nseq_len: 256\n")
    flags = ["--lr", "1e-4", "--no-compensate"]
    for arguments in ([*flags, "--config", str(file)], ["--config", str(file), *flags]):
        config = printed_config(capsys, *arguments)
        assert (config["lr"], config["compensate"]) == (1e-4, False)  # the flags'
        assert (config["model"], config["seed"], config["batch_tokens"]) == ("A", 7, 2048)  # the file's
        assert config["valid_tokens"] == 1_000_000  # the default
    assert printed_config(capsys, "--config", str(file), "--seed", "0")["seed"] == 0  # a default, but given


def test_a_list_flag_replaces_the_list_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: [a, b=0.5]\nsave_at: 3M\n")
    untouched = printed_config(capsys, "--config", str(file))
    assert (untouched["data"], untouched["save_at"]) == (["a", "b=0.5"], [3_000_000])
    replaced = printed_config(capsys, "--data", "c", "--config", str(file), "--save-at", "2M", "--save-at", "1M")
    assert (replaced["data"], replaced["save_at"]) == (["c"], [2_000_000, 1_000_000])


@pytest.mark.parametrize(
    "order", [["M", "--data", "x", "--resume"], ["--data", "x", "--resume", "M"], ["--data=x", "M"]]
)
def test_the_model_may_stand_anywhere(order: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, *order)
    assert (config["model"], config["data"]) == ("M", ["x"])


def test_what_print_config_prints_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "M",
        "--data",
        "x=0.3",
        "--target-params",
        "134M",
        "--tokens",
        "58.6B",
        "--prune-tokens",
        "8.6B",
        "--lr",
        "5e-4",
    ]
    first = printed_config(capsys, *flags, "--batch-tokens", "1Mi", "--log-to", "wandb", "--trust-remote-code")
    assert (first["tokens"], first["batch_tokens"], first["target_params"]) == (58_600_000_000, 2**20, 134_000_000)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "--config", str(file)) == first


def test_plan_takes_what_changes_shape_schedule_or_memory(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--target-params 1M --prune-tokens 1M --tokens 2M --seq-len 256 --batch-tokens 2048 --micro-batch-size 4 "
        "--compensate --saliency fisher --score all --round-to 8 --min-ffn 8 --min-hidden 8 --min-kv 2 --save-at 2M "
        "--activation-checkpointing --like RUN --print_config"
    )
    assert main(["plan", "M", *flags.split()]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["min_kv"], config["saliency"], config["data"]) == (2, "taylor2", [])
    assert config["activation_checkpointing"] == "full"
    for pace in ("--slot-steps", "--removals-per-step"):
        assert main(["plan", "M", "--target-params", "1M", pace, "0.5", "--print_config"]) == 0  # no tokens needed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--score", "all"], ["--scored-layers", "all"]),
        (["--saliency", "first"], ["--saliency", "taylor1"]),
        (["--saliency", "fisher"], ["--saliency", "taylor2"]),
    ],
)
def test_what_flags_were_called_still_works(
    old: list[str], new: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed_config(capsys, *new)
    assert printed_config(capsys, *old) == config
    file = tmp_path / "run.yaml"
    file.write_text(f"{old[0].removeprefix('--')}: {old[1]}\n")  # as old run folders have it
    assert printed_config(capsys, "--config", str(file)) == config
    assert main(["prune", "--print-config", *new]) == 0 and yaml.safe_load(capsys.readouterr().out) == config
    assert main(["prune", "--help"]) == 0
    assert not re.search(r"--score |first\||fisher|print_config", capsys.readouterr().out)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["no command given", "inspect"]),
        ("prun M", ["unknown command 'prun'", "did you mean prune?"]),
        ("--versio", ["unknown flag --versio", "did you mean --version?"]),
        ("prune M --gpus 8", ["--gpus is a flag of plan", "torchrun"]),
        (
            "inspect M --seq-len 8",
            ["--seq-len is a flag of plan, prune, not of efficientllm inspect", "inspect --help"],
        ),
        ("--resume", ["--resume is a flag of prune"]),
        ("plan M --target-params 1M --engine ddp --shards 2", ["--shards 2", "--engine fsdp"]),
        ("prune M --dta x", ["unknown flag --dta", "did you mean --data?"]),
        ("prune M --targetparams=1M", ["unknown flag --targetparams", "did you mean --target-params?"]),
        ("inspect M --data x", ["--data is a flag of plan, prune, not of efficientllm inspect"]),
        ("plan M --machines 4", ["unknown flag --machines; see efficientllm plan --help"]),
        ("prepare x --tokeniser M --out o", ["unknown flag --tokeniser", "did you mean --tokenizer?"]),
        ("prepare x --out o", ["--tokenizer is missing"]),
        ("prepare x --tokenizer M --out o --txt-split lines", ["--txt-split lines", "did you mean line?"]),
        ("inspect", ["MODEL is missing"]),
        ("plan --target-params 1M", ["MODEL is missing"]),
        ("plan M", ["--target-params is missing"]),
        ("generate M", ["PROMPT is missing"]),
        ("generate M hello --temperature cold", ["--temperature cold"]),
        ("generate M hello --temperature nan", ["--temperature nan"]),
        ("generate M hello --max-new-tokens 0", ["--max-new-tokens 0"]),
        ("push nowhere hub/name", ["push nowhere", "no such folder"]),
        ("prune M --data", ["--data: a value is missing"]),
        ("prune M --data a b", ["'b' is an unexpected argument"]),
        ("prune M --resume=yes", ["--resume takes no value"]),
        ("prune M --init pretraned", ["--init pretraned", "did you mean pretrained?"]),
        ("prune M --lr fast", ["--lr", "'fast'"]),
        ("prune M --target-params many", ["--target-params", "'many' is not a number"]),
        ("prune M --target-params 0 --data d --prune-tokens 1 --tokens 1 --out o", ["--target-params"]),
        ("prune M --target-params -5M", ["--target-params -5000000"]),
        ("prune M --target-params 1.5", ["--target-params", "not a whole number"]),
        ("prune --data d --target-params 1M --prune-tokens 1 --tokens 1 --out o", ["MODEL is missing"]),
        ("prune M --target-params 1M --prune-tokens 1M --tokens 2M --out o", ["--data is missing"]),
        ("prune M --data d --target-params 1M --tokens 2M --out o", ["--prune-tokens, --slot-steps", "none"]),
        ("prune M --data d --target-params 1M --tokens 2M --out o --prune-tokens 1 --slot-steps 2", ["exactly one"]),
        ("plan M --target-params 1M --prune-tokens 3M --tokens 2M", ["--prune-tokens", "--tokens", "lower"]),
        (
            "plan M --target-params 1M --seq-len 300 --batch-tokens 1000",
            ["--batch-tokens 1000", "--seq-len 300", "900"],
        ),
        ("prune M --config nowhere.yaml", ["--config nowhere.yaml", "cannot be read"]),
        ("prune M --config key.yaml", ["unknown key 'targt_params'", "did you mean target_params?"]),
        ("prune M --config list.yaml", ["--config list.yaml", "holds a list"]),
        ("prune M --config broken.yaml", ["--config broken.yaml", "not valid YAML"]),
    ],
)
def test_a_mistake_is_one_line(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"key.yaml": "targt_params: 1M\n", "list.yaml": "- a\n", "broken.yaml": "a: [\n"}
    for name, content in files.items():
        Path(name).write_text(content)
    line = refusal(capsys, *arguments.split())
    assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} == set(files)  # nothing written


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_cli("prune", "nowhere", "--targt-params", "1M", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "efficientllm: error: unknown flag --targt-params; did you mean --target-params?\n"


def test_control_c_leaves_with_130(tmp_path: Path) -> None:
    fifo = tmp_path / "run.yaml"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "efficientllm", "prune", "--config", str(fifo)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    with fifo.open("wb"):  # returns when the program has opened the other end, where it waits for us to write
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert (process.returncode, out, err) == (130, b"", b"")


# prepare and generate


def test_prepare_writes_the_tokens_it_names(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"story {n} of a {'very ' * n}long day" for n in range(50)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    flags = ["--tokenizer", str(tiny), "--out", str(tmp_path / "out"), "--text-field", "story"]
    assert main(["prepare", str(tmp_path / "text.jsonl"), *flags]) == 0
    tokens = sum(len(text) + 1 for text in texts)  # a token a letter, one for the end of each document
    found = re.search(r"50 documents, ([\d,]+) tokens, ([\d,]+) held out", capsys.readouterr().out)
    assert found and sum(int(count.replace(",", "")) for count in found.groups()) == tokens
    assert "exists" in refusal(capsys, "prepare", str(tmp_path / "text.jsonl"), *flags)


def test_generate_prints_what_transformers_generates(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor([list(tokenizer("- once")["input_ids"])])
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert main(["generate", str(tiny), "- once", "--temperature", "0", "--max-new-tokens", "12"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n") == expected and len(out) > len("- once")
