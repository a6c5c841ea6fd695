"""DDP, FSDP and HSDP on gloo ranks against one process: one torchrun launch per number of ranks runs all its cases."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from efficientllm.run.logs import read_rows
from helpers.families import FAMILIES
from helpers.paths import DEMO_MODEL, ROOT


def torchrun_command(num_ranks: int, *words: str, restarts: int = 0) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*launch, "--max-restarts", str(restarts), *words]


def torchrun(num_ranks: int, *words: str) -> "subprocess.CompletedProcess[str]":
    found = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)}
    command = torchrun_command(num_ranks, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env, check=False)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_ranks", "engines", "families"),
    [
        (2, "ddp,fsdp", "llama-tied,qwen2"),
        pytest.param(2, "ddp,fsdp", "llama-bias,phi3,gemma2", marks=pytest.mark.slow),
        pytest.param(4, "ddp,fsdp,hsdp", "llama-tied,olmo2,qwen2", marks=pytest.mark.slow),
    ],
)
def test_every_engine_prunes_as_one_process_does(num_ranks: int, engines: str, families: str, tmp_path: Path) -> None:
    """In float64, over 60 steps with compactions, variants A and B; and begun on one engine, ended on another."""
    out = tmp_path / "results.json"
    done = torchrun(num_ranks, "-m", "helpers.ranks", str(out), engines, families)
    assert done.returncode == 0, errors_of(done.stderr)
    results: dict[str, dict[str, Any]] = json.loads(out.read_text())
    told, half, taught = (results.pop(case) for case in ("disagreement", "bf16", "bf16 taught"))
    assert "ranks 0 and 1 chose different units" in told["error"] and "nothing was removed" in told["error"]
    assert half["gathered"] == ["torch.bfloat16"] and half["kept"] == ["torch.float32"]
    for each in (half, taught):
        assert each["losses"] == pytest.approx(each["exact"], rel=1e-2) and each["losses"] != each["exact"]
    frozen = taught["frozen"]  # each rank has its part of the teacher's layers, in bf16
    assert frozen["dtypes"] == ["torch.bfloat16"] and frozen["share"] == pytest.approx(1 / num_ranks, rel=0.1)
    check_room(results.pop("room"), num_ranks)
    # A and B of every family; the first one moved there and back, taught, with Fisher, an average, checkpointing,
    # with layers that shrink each on its own, and by four methods that remove before the first step
    assert len(results) == len(engines.split(",")) * (2 * len(families.split(",")) + 10)
    for case, found in results.items():
        assert found["removals"] > 25 and found["same_removals"], case
        # norms compute in float32 whatever the weights are: a sum in another order may flip a rounding there
        name = next(word for word in case.split() if word in FAMILIES)
        flips = FAMILIES[name].half_gelu or (FAMILIES[name].norms == "heads" and " B" in case)
        assert found["loss"] < 1e-5 and found["weights"] < (1e-5 if flips else 1e-10), case
    kinds = {kind for found in results.values() for kind in found["kinds"]}
    assert kinds == {"ffn", "hidden", "kv", "query"}


def check_room(room: dict[str, dict[str, int]], num_ranks: int) -> None:
    """A compaction takes one matrix more in one process, a few under FSDP, and DDP's buffers of gradients anew."""
    assert room["one"]["peak"] <= 1.1 * room["one"]["largest"]
    assert room["ddp"]["peak"] <= 0.25 * room["ddp"]["all"]
    for kind, ranks in {"fsdp": num_ranks, "hsdp": 2}.items():
        if kind in room:
            # four matrices (0.04), and those that gloo's threads have not let go of yet, 25 at the most seen
            assert room[kind]["peak"] <= 0.4 * room[kind]["all"]
            # the rank's own rows and a buffer: what is left of the source would take another 0.25
            assert room[kind]["before"] <= (1 / ranks + 0.12) * room[kind]["all"]


def errors_of(stderr: str) -> str:
    """The ranks' own last lines, without what torchrun says after them."""
    return stderr.partition("torch/distributed/run.py")[0][-4000:]


# --- whole runs ------------------------------------------------------------------------------------------------------

STEPS = 36


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    texts = [f"def area_{n}(a, b):\n    return a * {n} + b ** {n % 7}\n" * 12 for n in range(400)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def words_of(corpus: Path, out: Path) -> list[str]:
    words = ["prune", str(DEMO_MODEL), "--data", str(corpus), "--target-params", "300000", "--prune-tokens", "24576"]
    words += ["--tokens", "36864", "--seq-len", "128", "--batch-tokens", "1024", "--micro-batch-size", "2"]
    return [*words, "--checkpoint-every", "6", "--out", str(out)]


def alone(*words: str, **settings: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "efficientllm", *words]
    found = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False, **settings)


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def removals_of(out: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["kind"]) for row in rows_of(out, "removals")]


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    done = alone(*words_of(corpus, out))
    assert done.returncode == 0, done.stderr
    return out


def check_equal(out: Path, expected: Path) -> None:
    """In float32: as many removals, 98% of the same kinds at the same steps, losses within 5e-3."""
    found, wanted = removals_of(out), removals_of(expected)
    assert len(found) == len(wanted) > 100
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 0.98 * len(wanted)
    for mine, theirs in zip(rows_of(out, "metrics"), rows_of(expected, "metrics"), strict=True):
        assert mine["step"] == theirs["step"]
        for key in ("loss", "valid_loss"):
            if theirs.get(key) is not None:
                assert mine[key] == pytest.approx(theirs[key], rel=5e-3), mine["step"]
    mine, theirs = (json.loads((run / "model/config.json").read_text()) for run in (out, expected))
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert mine[key] == pytest.approx(theirs[key], abs=1), key  # a tile of a model this small


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_goes_on_alone_and_on_four(
    engine: str, corpus: Path, one_process: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launch = ["-m", "efficientllm"]
    kill_at(12, out, torchrun_command(2, *launch, *words_of(corpus, out), "--engine", engine), signal.SIGTERM)
    assert (out / "checkpoints").exists() and not (out / "model").exists()
    resume = [sys.executable, *launch, "prune", "--resume", "--out", str(out)]
    assert kill_at(20, out, resume, signal.SIGTERM) == 128 + signal.SIGTERM and not (out / "model").exists()
    done = torchrun(4, *launch, "prune", "--resume", "--out", str(out), "--engine", "fsdp", "--shards", "2")
    assert done.returncode == 0, errors_of(done.stderr)
    check_equal(out, one_process)


@pytest.mark.slow
def test_layers_go_on_shards_as_in_one_process(corpus: Path, tmp_path: Path) -> None:
    outs = []
    for number, engine in ((0, "one"), (2, "ddp"), (2, "fsdp")):
        outs.append(tmp_path / engine)
        words = [*words_of(corpus, outs[-1]), "--method", "depth"]
        done = torchrun(2, "-m", "efficientllm", *words, "--engine", engine) if number else alone(*words)
        assert done.returncode == 0, errors_of(done.stderr)
    for out in outs[1:]:
        for mine, theirs in zip(rows_of(out, "removals"), rows_of(outs[0], "removals"), strict=True):
            assert [mine[key] for key in ("kind", "units", "params_before", "params_after")] == [
                theirs[key] for key in ("kind", "units", "params_before", "params_after")
            ]
        found, wanted = ([row["loss"] for row in rows_of(each, "metrics")][1:] for each in (out, outs[0]))
        assert found == pytest.approx(wanted, rel=5e-3) and len(found) > 10


@pytest.mark.slow
def test_compiled_on_two_ranks(corpus: Path, one_process: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun(2, "-m", "efficientllm", *words_of(corpus, out), "--engine", "fsdp", "--compile")
    assert done.returncode == 0, errors_of(done.stderr)
    assert re.search(r"compiled \d+ graphs", done.stdout)
    check_equal(out, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_killed_worker_is_started_again_and_changes_nothing(engine: str, corpus: Path, tmp_path: Path) -> None:
    unhurt, hurt = tmp_path / "unhurt", tmp_path / "hurt"
    done = torchrun(2, "-m", "efficientllm", *words_of(corpus, unhurt), "--engine", engine)
    assert done.returncode == 0, errors_of(done.stderr)
    command = torchrun_command(2, "-m", "efficientllm", *words_of(corpus, hurt), "--engine", engine, restarts=1)
    assert kill_at(14, hurt, command, signal.SIGKILL, worker=True) == 0
    assert (hurt / "model/model.safetensors").read_bytes() == (unhurt / "model/model.safetensors").read_bytes()
    assert rows_of(hurt, "removals") == rows_of(unhurt, "removals")


@pytest.mark.slow
def test_what_the_first_rank_alone_finds_is_told_in_one_line(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("no json\n" * 9)
    done = torchrun(2, "-m", "efficientllm", *words_of(data, tmp_path / "run"))
    said = [line for line in errors_of(done.stderr).splitlines() if "efficientllm:" in line or "[rank" in line]
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert len(said) == 1 and "text.jsonl" in said[0], said


@pytest.mark.slow
def test_a_restart_does_not_take_over_a_folder_that_was_refused(corpus: Path, one_process: Path) -> None:
    before = {file: file.read_bytes() for file in one_process.rglob("*") if file.is_file()}
    command = torchrun_command(2, "-m", "efficientllm", *words_of(corpus, one_process), restarts=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0 and done.stderr.count("exists; add --resume to continue it") == 2  # both attempts
    assert {file: file.read_bytes() for file in one_process.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_worker_killed_on_each_of_two_machines_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    """A torchrun a machine, both on this one.

    Each counts its restarts by itself: a death costs the other machine one too, if its worker has met the broken
    connection before its torchrun hears of the restart.
    """
    unhurt, hurt = tmp_path / "unhurt", tmp_path / "hurt"
    done = torchrun(2, "-m", "efficientllm", *words_of(corpus, unhurt))
    assert done.returncode == 0, errors_of(done.stderr)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-id", "two", "--rdzv-endpoint", endpoint]
    found = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)}
    command = [*launch, "-m", "efficientllm", *words_of(corpus, hurt)]
    machines = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) for _ in "ab"
    ]
    try:
        for machine, step in zip(machines, (10, 22), strict=True):
            wait_for_step(step, hurt, machine)
            os.kill(last_worker(machine), signal.SIGKILL)
        errors = [machine.communicate(timeout=600)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(errors)[-4000:]
    assert (hurt / "model/model.safetensors").read_bytes() == (unhurt / "model/model.safetensors").read_bytes()
    assert rows_of(hurt, "removals") == rows_of(unhurt, "removals")


def kill_at(step: int, out: Path, command: list[str], number: int, worker: bool = False) -> int:
    """Starts a run, sends a signal to it (or to its last worker) once it has logged a step, and returns its code."""
    found = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_step(step, out, process)
    os.kill(last_worker(process) if worker else process.pid, number)
    _, errors = process.communicate(timeout=600)
    assert out.exists(), errors[-3000:]
    return process.returncode


def wait_for_step(step: int, out: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600
    log = out / "metrics.jsonl"
    while not (log.exists() and any(row["step"] >= step for row in read_rows(log))):
        assert process.poll() is None and time.monotonic() < deadline, f"ended, or is slow, before step {step}"
        time.sleep(0.05)


def last_worker(process: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])
