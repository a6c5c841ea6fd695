"""Runs of `prune` on the shipped model: what they leave, how they go on, how they end badly."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from efficientllm.cli import main
from efficientllm.config.command_line import program
from efficientllm.data.corpus import open_corpus
from efficientllm.data.loader import batches, mixture
from efficientllm.distributed.host import physical_cores
from efficientllm.run.folder import continued, new_folder, stored_config
from efficientllm.run.signals import Interruption, exit_on_sigterm
from helpers.paths import DEMO_MODEL
from helpers.runs import PRUNE_STEPS, STEPS, TARGET, arguments, num_rows, result_bytes, rows, start, wait_for


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start([*arguments(data, out), "--save-at", "590000", "--checkpoint-every", "4", "--eval-every", "5"])
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "validation loss: source" in output
    return out


def test_run_folder(finished: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["lr"] == 1e-3
    metrics, removals = rows(finished / "metrics.jsonl"), rows(finished / "removals.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["phase"] for row in metrics[1:]] == ["prune"] * PRUNE_STEPS + ["train"] * (STEPS - PRUNE_STEPS)
    assert [row["step"] for row in metrics if "valid_loss" in row] == [0, 5, PRUNE_STEPS, 15, STEPS]
    assert metrics[-1]["tokens"] == STEPS * 512 and metrics[0]["params"] == 602_976
    sizes = [row["params"] for row in metrics]
    assert sizes == sorted(sizes, reverse=True)
    assert removals[-1]["params_after"] == sizes[-1] <= TARGET
    ffn_tile = 4 * 3 * metrics[-1]["hidden_size"]
    assert sizes[-1] > TARGET - ffn_tile
    for row in removals:
        layers = {name.split(".")[1] for name in row["units"] if name.startswith("layers")}
        assert row["kind"] == "hidden" or len(layers) == 4
        assert row["params_before"] > row["params_after"]
    files = {file.suffix for file in (finished / "checkpoints").rglob("*") if file.is_file()}
    assert files == {".json", ".safetensors"}


def test_result_loads_without_efficientllm(finished: Path) -> None:
    """In a process that cannot import efficientllm, without remote code."""
    code = (
        "import sys; sys.modules['efficientllm'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(finished / 'model')!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n"
        "ids = tokenizer('Return the', return_tensors='pt')['input_ids']\n"
        "print(model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] - ids.shape[1])\n"
        "print(sum(param.numel() for param in model.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, params = map(int, done.stdout.split())
    assert made == 4
    assert params == rows(finished / "metrics.jsonl")[-1]["params"]
    files = {file.name for file in (finished / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    front = yaml.safe_load((finished / "model/README.md").read_text().split("---")[1])
    assert front["library_name"] == "transformers"


def test_rung_is_a_model_of_its_own(finished: Path, data: Path, tmp_path: Path) -> None:
    saved_size = finished / "models/590k"
    params = sum(param.numel() for param in AutoModelForCausalLM.from_pretrained(saved_size).parameters())
    assert 590_000 - 4 * 3 * 96 < params <= 590_000
    assert "not annealed" in (saved_size / "README.md").read_text()
    words = arguments(data, tmp_path / "further", prune_tokens="1024", tokens="1024")
    words[1] = str(saved_size)
    assert main(words) == 0


def test_signal_saves_and_resume_ends_with_the_same_bytes(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    words = [*arguments(data, out), "--save-at", "590000", "--checkpoint-every", "4", "--eval-every", "5"]
    process = start(words)
    wait_for(lambda: num_rows(out) > 6, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert f"continue with: {program()} prune --resume --out {out}" in output
    assert not (out / "model").exists()
    process = start(["prune", "--resume", "--out", str(out)])
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "resuming" in output and "at step 0" not in output
    assert result_bytes(out) == result_bytes(finished)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(STEPS + 1))


def test_sigterm_twice_still_saves_and_a_ctrl_c_after_it_stops_at_once() -> None:
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_twice_lets_the_stack_unwind_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, exit_on_sigterm(), new_folder(tmp_path / "run") as staging:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            unwound = staging.exists()  # not reached if the second one raises too
    assert left.value.code == 143 and unwound and not any(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_damaged_checkpoint_falls_back(finished: Path, tmp_path: Path) -> None:
    out = unfinished(finished, tmp_path)
    last = max((out / "checkpoints").glob("step-*"))
    (shard,) = (last / "shards").iterdir()
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    process = start(["prune", "--resume", "--out", str(out)])
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert f"{last.name} is damaged" in output
    assert f"resuming {out} at step {int(last.name[5:]) - 4}" in output
    assert result_bytes(out) == result_bytes(finished)


def unfinished(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run as it was before its result was written."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    return out


def test_resume_of_a_finished_run_and_of_none(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prune", "--resume", "--out", str(finished)]) == 0
    assert "is finished" in capsys.readouterr().out
    with monkeypatch.context() as second:
        second.setenv("RANK", "1")
        assert main(["prune", "--resume", "--out", str(finished)]) == 0
    assert not capsys.readouterr().out  # the first rank has said it
    assert main(["prune", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--target-params", "550k"), ("--data", "other.jsonl"), ("--seed", "3"), ("--tokens", "6000")]
)
def test_resume_refuses_another_run(
    finished: Path, tmp_path: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    assert main(["prune", "--resume", "--out", str(moved), flag, value]) == 2
    error = capsys.readouterr().err
    assert flag in error and error.count("\n") == 1
    assert f"the run in {moved} has" in error or flag == "--tokens"
    assert result_bytes(moved) == result_bytes(finished)


def test_without_its_first_row_a_run_still_gives_its_result(finished: Path, tmp_path: Path) -> None:
    out = unfinished(finished, tmp_path)
    metrics = out / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[1:]))
    assert main(["prune", "--resume", "--out", str(out)]) == 0
    assert result_bytes(out)[0] == result_bytes(finished)[0]


def test_more_tokens_go_on_from_before_the_decay(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "longer"
    shutil.copytree(finished, out)
    assert main(["prune", "--resume", "--out", str(out), "--tokens", str(24 * 512)]) == 0
    assert "at step 11" in capsys.readouterr().out  # 16 steps, the last 5 of them decaying
    metrics = rows(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(25))
    assert metrics[14]["lr"] > rows(finished / "metrics.jsonl")[14]["lr"]
    assert (out / "model-8.19k/model.safetensors").read_bytes() == result_bytes(finished)[0]
    assert (out / "model").exists()


def test_shards_belong_to_fsdp(finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(data, tmp_path / "run", shards="2")
    assert main([*words, "--engine", "ddp"]) == 2
    assert "--shards 2 needs --engine fsdp" in capsys.readouterr().err and not (tmp_path / "run").exists()
    was = replace(stored_config(finished), engine="fsdp", shards=2)
    assert continued(replace(was, engine="ddp"), was).shards is None  # given for the engine that the run leaves
    assert continued(replace(was, threads=1), was).shards == 2


def test_what_has_no_effect_here_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"tokens": "1024", "prune_tokens": "1024", "target_params": "602976", "valid_tokens": "64"}
    before, threads = torch.get_num_threads(), physical_cores() + 1
    assert main(arguments(data, tmp_path / "run", shards="2", threads=str(threads), **few)) == 0
    torch.set_num_threads(before)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--shards 2 is ignored in a single process" in said
        and f"--threads {threads}: this process may use only" in said
    )


def test_target_equal_to_the_source_is_plain_training(data: Path, tmp_path: Path) -> None:
    """Oracle: a hand-written loop over torch's AdamW on the stock model and the same batches."""
    out = tmp_path / "plain"
    words = arguments(data, out, target_params="602976", prune_tokens=str(STEPS * 512), valid_tokens="64")
    assert main(words) == 0
    config = stored_config(out)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).train()
    corpus = open_corpus(config, AutoTokenizer.from_pretrained(DEMO_MODEL), out / "data")
    feed = batches(mixture(corpus.parts, seq_len=64, seed=0, include_valid=False), 0, 8)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    for row in rows(out / "metrics.jsonl")[1:]:
        ids = torch.from_numpy(next(feed))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert float(loss.detach()) == pytest.approx(row["loss"], rel=1e-5)
        assert float(norm) == pytest.approx(row["grad_norm"], rel=1e-4)
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()
        optimizer.zero_grad()
    trained = load_file(out / "model/model.safetensors")
    for name, param in model.named_parameters():
        # as a whole: Adam blows up the rounding of an entry that has hardly had a gradient yet
        assert float((trained[name] - param.detach()).norm()) < 1e-6 * float(param.detach().norm()), name


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "broken"
    assert main(arguments(data, out, lr="1e30", target_params="602976")) == 2
    error = capsys.readouterr().err
    assert "not finite in 5 steps in a row" in error and "--resume" in error
    skipped = [row["skipped"] for row in rows(out / "metrics.jsonl")]
    assert max(skipped) >= 4
    assert not (out / "model").exists()
    assert "no checkpoint has been written yet; start again" in error


def test_a_full_disk_is_one_line(data: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 1.5 MB here: the shards fit, the first checkpoint does not."""
    limit = 1_500_000
    process = start(
        arguments(data, tmp_path / "full"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "free up space" in errors and "Traceback" not in errors
    assert not list((tmp_path / "full/checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"target_params": "700k"}, ["700", "602,976"]),
        ({"target_params": "1k"}, ["smallest reachable"]),
        ({"target_params": "0"}, ["--target-params"]),
        ({"target_params": "half"}, ["half", "not a number"]),
        ({"tokens": "1024"}, ["--prune-tokens", "above --tokens"]),
        ({"batch_tokens": "500"}, ["--batch-tokens", "multiple"]),
        ({"batch_tokens": "64Mi", "tokens": "64Mi", "prune_tokens": "64Mi"}, ["less than one batch"]),
        ({"text_field": "body"}, ["body"]),
        ({"valid": "missing.jsonl"}, ["missing.jsonl"]),
        ({"seq_len": "1024", "batch_tokens": "2048"}, ["max_position_embeddings"]),
        ({"save_at": "700k"}, ["--save-at"]),
        pytest.param(
            {"log_to": "wandb"},
            ["--log-to wandb", "not installed"],
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here"),
        ),
    ],
)
def test_bad_input_writes_nothing(
    data: Path, tmp_path: Path, changed: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(data, tmp_path / "out", **changed)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(arguments(data, tmp_path / "out")) == 2
    assert "--resume" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 1.5, 3.0, 5.0, 7.0, 9.0])
def test_kill_at_any_moment(finished: Path, data: Path, tmp_path: Path, delay: float) -> None:
    out = tmp_path / "killed"
    words = [*arguments(data, out), "--save-at", "590000", "--checkpoint-every", "4", "--eval-every", "5"]
    process = start(words)
    wait_for(lambda: out.exists(), process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    for _ in range(3):  # and again while it resumes
        process = start(["prune", "--resume", "--out", str(out)])
        time.sleep(delay + 4)
        process.kill()
        process.communicate()
    process = start(["prune", "--resume", "--out", str(out)])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert result_bytes(out) == result_bytes(finished)


def test_a_run_goes_on_when_its_text_is_gone(finished: Path, data: Path, tmp_path: Path) -> None:
    """Its tokens are in its folder: after Ctrl-C in the demo, whose text is in a temporary one, it can go on."""
    text, out = tmp_path / "text.jsonl", tmp_path / "stopped"
    shutil.copy(data, text)
    process = start([*arguments(text, out), "--save-at", "590000", "--checkpoint-every", "4", "--eval-every", "5"])
    wait_for(lambda: num_rows(out) > 6, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    text.unlink()
    command = output.splitlines()[-1].partition("continue with: ")[2]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert result_bytes(out) == result_bytes(finished)
