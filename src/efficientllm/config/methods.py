"""The methods of `prune`: EfficientLLM, and the ways that it is compared with (docs/methods.md). Imports no torch."""

from dataclasses import dataclass
from typing import Literal

OBS_ROUNDS = 16  # blocks of removals, each with inputs of its own: 8,192 of the default calibration tokens
WIDTHS = ("round_to", "min_ffn", "min_hidden", "min_kv")
SIZE = ("target_params", "target_bytes", "prune_tokens", *WIDTHS)
GRADUAL = (
    *SIZE,
    "slot_steps",
    "removals_per_step",
    "saliency",
    "scored_layers",
    "score_ema",
    "compensate",
    "layout",
    "save_at",
    "distill_hidden",
)
ONE_SHOT = (*SIZE, "allocation", "shape_of", "distill_hidden")


@dataclass(frozen=True)
class Method:
    """How one method removes.

    Attributes:
        when: "gradual", while it trains; "one-shot", before the first step; "initial" small, with nothing to remove.
        does: what a run does, after "which" or "by".
        takes: the flags, by field, that mean something to it, of those that do not mean something to all.
        rounds: times that units are scored and removed before the first step.
        compensates: whether the weights that stay are always updated.
        compacts: whether retired units go before the target is reached.
    """

    when: Literal["gradual", "one-shot", "initial"]
    does: str
    takes: tuple[str, ...]
    rounds: int = 1
    compensates: bool = False
    compacts: bool = True


METHODS = {
    "efficientllm": Method("gradual", "removes the least salient minimal group of parameters while it trains", GRADUAL),
    "mask-only": Method(
        "gradual",
        "removes as efficientllm does, but computes at the source's shape until the target is reached",
        GRADUAL,
        compacts=False,
    ),
    "one-shot": Method(
        "one-shot",
        "removes everything before the first step, by first-order saliency over calibration batches",
        (*ONE_SHOT, "calibration_tokens", "saliency", "scored_layers", "compensate"),
    ),
    "one-shot-obs": Method(
        "one-shot",
        "removes everything before the first step, by structured OBS that updates the remaining weights",
        (*ONE_SHOT, "calibration_tokens"),
        rounds=OBS_ROUNDS,
        compensates=True,
    ),
    "magnitude": Method(
        "one-shot",
        "removes everything before the first step, by the mean square of the weights",
        (*ONE_SHOT, "scored_layers"),
    ),
    "activation": Method(
        "one-shot",
        "removes everything before the first step, by the fluctuation of inputs, times the weights that read them",
        (*ONE_SHOT, "calibration_tokens"),
    ),
    "random": Method("one-shot", "removes random units before the first step", ONE_SHOT),
    "scratch": Method("initial", "trains fresh weights of another run's shape", ("shape_of", "layout")),
    "depth": Method(
        "initial",
        "removes the whole layers with the least block influence before the first step",
        ("target_params", "prune_tokens", "calibration_tokens", "distill_hidden"),
    ),
}
LIMITED = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.takes))  # flags that not all take


def card_words(name: str) -> str:
    """Returns a model card's words for a method, after "Made from MODEL"."""
    if name == "efficientllm":
        return (
            "by pruning-aware pretraining ([EfficientLLM](https://arxiv.org/abs/2502.06663)): while the\n"
            "model kept training, it lost one minimal group of parameters at a time, each time the one whose removal "
            "raised the loss least."
        )
    return f"as a baseline for pruning-aware pretraining, by the method `{name}`, which {METHODS[name].does}."
