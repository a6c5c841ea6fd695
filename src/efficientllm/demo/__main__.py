"""`make demo`: halves the small model that comes with the package, on text that every Python carries."""

import argparse
import sys
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

from efficientllm.config.command_line import program
from efficientllm.config.run_config import RunConfig
from efficientllm.demo.docstrings import write_corpus
from efficientllm.errors import EfficientLLMError

PROMPT = "Return a new"
TOKENS, PRUNE_TOKENS = 600 * 1024, 256 * 1024
NEW_TOKENS = 60


def main() -> int:
    """Runs the demo into a run folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m efficientllm.demo", description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="run folder to write (default: runs/demo)")
    out = Path(parser.parse_args().out)
    try:
        with as_file(files("efficientllm.demo") / "model") as source:
            return demo(source, free_name(out))
    except EfficientLLMError as error:
        print(f"efficientllm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run listens for it, or after
        return 130


def demo(source: Path, out: Path) -> int:
    """Prunes the model in `source` to half its parameters and shows both."""
    from efficientllm.models.load import load_model, load_tokenizer
    from efficientllm.report.page import report_finished
    from efficientllm.run.logs import read_rows
    from efficientllm.run.prune import prune

    params = sum(param.numel() for param in load_model(str(source)).parameters())
    with TemporaryDirectory() as folder:
        corpus = write_corpus(folder)
        print(f"text: {corpus.documents:,} docstrings and help topics of this Python, {corpus.characters:,} characters")
        code = prune(
            RunConfig(
                model=str(source),
                data=(str(corpus.train),),
                valid=str(corpus.valid),
                target_params=params // 2,
                prune_tokens=PRUNE_TOKENS,
                tokens=TOKENS,
                seq_len=256,
                batch_tokens=2048,
                out=str(out),
            ),
            resume=False,
        )
    if code:
        return code
    rows = [row for row in read_rows(out / "metrics.jsonl") if "valid_loss" in row]
    tokenizer = load_tokenizer(str(source))
    samples = {}
    for name, path in (("source", source), ("result", out / "model")):
        model = load_model(str(path))
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
        samples[name] = tokenizer.decode(made[0], skip_special_tokens=True)
    show(rows[0], rows[-1], samples, out)
    report_finished(str(out))
    return 0


def show(before: dict[str, float], after: dict[str, float], samples: dict[str, str], out: Path) -> None:
    """Prints sizes, losses and text of source and result side by side."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("")
    table.add_column("source", ratio=1)
    table.add_column("result", ratio=1)
    names = ("params", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for name in names:
        table.add_row(name, f"{before[name]:,}", f"{after[name]:,}")
    table.add_row("valid_loss", f"{before['valid_loss']:.4f}", f"{after['valid_loss']:.4f}", end_section=True)
    table.add_row("text", escape(samples["source"]), escape(samples["result"]))
    console = Console()
    console.print(table)
    print(f"run folder: {out} (config.yaml, metrics.jsonl, removals.jsonl, checkpoints/, model/)")
    print(f"try: {program()} generate {out / 'model'} 'Return a new'")


def free_name(path: Path) -> Path:
    """Returns the path, or the first of path-2, path-3, … that is not there yet."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


if __name__ == "__main__":
    sys.exit(main())
