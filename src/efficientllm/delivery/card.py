"""The model card of a result: where it comes from, what it learnt from, how it was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllm.numbers import format_count


@dataclass(frozen=True)
class Facts:
    """What the card of one model says.

    Attributes:
        model, data: as the command names them.
        how: a sentence on what was done to it.
        params, source_params, tokens: parameters of result and source; tokens of training up to here.
        shape: in a config's words; a list, layer by layer, where layers differ.
        losses: validation losses in nats per token, by what they are of ("source", "result").
        annealed: whether the learning rate has been brought down; a rung of a ladder is not annealed.
    """

    model: str
    data: Sequence[str]
    how: str
    params: int
    source_params: int
    shape: dict[str, int | list[int]]
    tokens: int
    losses: dict[str, float]
    command: str
    annealed: bool


def model_card(facts: Facts, source: Path) -> str:
    """Returns README.md; licence and languages come from the source's card, if it has one."""
    from huggingface_hub import ModelCardData

    inherited = _source_metadata(source)
    hub_id = not Path(facts.model).expanduser().exists()
    data = ModelCardData(
        base_model=facts.model if hub_id else inherited.get("base_model"),
        license=inherited.get("license"),
        language=inherited.get("language"),
        datasets=[spec for spec in facts.data if not Path(spec).expanduser().exists() and "/" in spec] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["efficientllm", "pruning"],
    )
    name = facts.model.rstrip("/").rpartition("/")[2]
    shape = ", ".join(f"{key} {value}" for key, value in facts.shape.items())
    losses = "".join(f"| validation loss of the {what} | {loss:.4f} |\n" for what, loss in facts.losses.items())
    differ = any(isinstance(size, list) for size in facts.shape.values())
    trust = ", trust_remote_code=True" if differ else ""
    note = (
        "\nIts layers differ in width, which transformers' stock classes cannot build: `modeling_per_layer.py`, next "
        "to the weights, does. `efficientllm.load(folder)` needs no remote code.\n"
        if differ
        else ""
    )
    state = (
        ""
        if facts.annealed
        else "\n**An intermediate size, saved on the way to a smaller one; its learning rate was not annealed.** "
        "Train it further (`efficientllm prune` with this folder as MODEL and its own size as the target) before use.\n"
    )
    return f"""---
{data.to_yaml()}
---

# {name}, {format_count(facts.params)} parameters

Made from `{facts.model}` {facts.how}
{state}
| | |
|---|---|
| parameters | {facts.params:,} (source: {facts.source_params:,}) |
| shape | {shape} |
| data | {", ".join(f"`{spec}`" for spec in facts.data)} |
| tokens | {facts.tokens:,} |
{losses}
Validation losses are in nats per token on the run's held-out rows.
{note}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

Made with:

    {facts.command}
"""


def _source_metadata(source: Path) -> dict[str, Any]:
    """Returns the YAML front matter of a source's README.md; empty if there is none, or it is broken."""
    import yaml

    try:
        _, front, _ = (source / "README.md").read_text(encoding="utf-8").split("---", 2)
        content = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
