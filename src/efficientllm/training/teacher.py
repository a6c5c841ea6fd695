"""The frozen teacher of `--distill`: found and checked before a run, asked once per micro-batch during it."""

from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from efficientllm.config.run_config import SOURCE, RunConfig
from efficientllm.data.tokenizing import backend_copy, tokenizer_fingerprint
from efficientllm.distributed.engine import Engine
from efficientllm.errors import ConfigError
from efficientllm.models.load import load_config, load_model, load_tokenizer, open_space
from efficientllm.space import Space
from efficientllm.training.distillation import DistillationTargets, Kept, distillation_loss_and_grad_
from efficientllm.training.loss import logit_form, whole_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTS = ("ce", "kl", "hidden_distance")  # of the loss, as metrics.jsonl has them beside it


class Teacher:
    """A frozen model in eval mode, whole or sharded as the engine has it.

    Args:
        model: on the CPU; where it is sharded it may be mapped from a file.
    """

    def __init__(self, model: "PreTrainedModel", config: RunConfig, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.scale, self.cap = logit_form(model.config)
        self.loss_and_grad_ = engine.compiled(distillation_loss_and_grad_)
        returns_states_(model)
        self.model = engine.frozen(model)
        self._units: Sequence[int | None] = ()
        self._kept: Kept | None = None

    @torch.no_grad()
    def targets(self, tokens: Tensor) -> DistillationTargets:
        """Returns what the teacher makes of a micro-batch of token ids (rows, seq_len): one forward pass."""
        with self.engine.autocast(), whole_rows():
            states, head = self.model(input_ids=tokens)
        return DistillationTargets(
            states[:, :-1].flatten(0, 1),
            head,
            self.scale,
            self.cap,
            self.config.distill_weight,
            self.config.distill_temperature,
            self.loss_and_grad_,
            self.config.distill_hidden,
            self._kept,
        )

    def follow(self, units: Sequence[int | None]) -> None:
        """Takes note of the student's hidden dimensions, each by its index in the source, None for a retired one."""
        if units == self._units:
            return
        self._units = units
        index = torch.tensor([unit or 0 for unit in units], device=self.engine.device)
        live = torch.tensor([unit is not None for unit in units], device=self.engine.device)
        self._kept = Kept(index, live)


def returns_states_(model: nn.Module) -> None:
    """Makes a decoder's forward pass return what its head reads, and the head's weights as they are in the pass."""

    def forward(self: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(input_ids=input_ids, use_cache=False).last_hidden_state, self.lm_head.weight

    model.__dict__["forward"] = MethodType(forward, model)


def teacher_name(config: RunConfig) -> str:
    """Returns the folder or hub id of the teacher."""
    assert config.distill is not None
    return config.model if config.distill == SOURCE else config.distill


def open_teacher(config: RunConfig, space: Space, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Space | None:
    """Returns the teacher's space, at its own shape, or None without `--distill`; reads no weights.

    Args:
        space: the source's.
        tokenizer: the source's; without it the tokenizers are not compared.

    Raises:
        ConfigError: a teacher of another vocabulary, of shorter rows, or of another hidden size under
            `--distill-hidden`.
        UnsupportedModelError: as `load_config`, `find_space` and `load_tokenizer`.
    """
    if config.distill is None or config.distill == SOURCE:
        return space if config.distill else None
    asked = f"--distill {config.distill}"
    model_config = load_config(config.distill, config.trust_remote_code)
    found = open_space(model_config, config.distill)
    if found.vocab_size != space.vocab_size:
        raise ConfigError(
            f"{asked}: its vocabulary has {found.vocab_size:,} entries and that of {config.model} has "
            f"{space.vocab_size:,}; a teacher must have the model's own tokenizer and vocabulary"
        )
    if tokenizer is not None:
        _check_tokenizer(config, tokenizer)
    longest = getattr(model_config, "max_position_embeddings", config.seq_len)
    if config.seq_len > longest:
        raise ConfigError(
            f"{asked}: its max_position_embeddings {longest} is below --seq-len {config.seq_len}; lower --seq-len"
        )
    if config.distill_hidden is not None and found.shape["hidden"] != space.shape["hidden"]:
        raise ConfigError(
            f"--distill-hidden compares hidden dimensions one by one, and {asked} has {found.shape['hidden']} where "
            f"{config.model} has {space.shape['hidden']}; remove it, or use the source as the teacher"
        )
    return found


def pass_flops(teacher: Space | None, seq_len: int) -> float:
    """Returns the FLOPs of a token in the teacher's forward pass, a third of a training token's; 0 without one."""
    return teacher.flops_per_token(teacher.shape, seq_len) / 3 if teacher else 0.0


def load_teacher(config: RunConfig, engine: Engine) -> "PreTrainedModel | None":
    """Returns the teacher with its weights, on the CPU; None without `--distill`.

    Raises:
        UnsupportedModelError: as `load_model`.
    """
    if config.distill is None:
        return None
    # a frozen model needs no float32 beside bf16 products, and under FSDP stays mapped from its file
    dtype = torch.float32 if engine.name != "fsdp" and engine.precision == "float32" else None
    return load_model(teacher_name(config), dtype=dtype, trust_remote_code=config.trust_remote_code)


def _check_tokenizer(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    assert config.distill is not None
    other = load_tokenizer(config.distill, config.trust_remote_code)
    mine, theirs = (backend_copy(each).get_vocab(with_added_tokens=True) for each in (tokenizer, other))
    differing = next((token for token in mine | theirs if mine.get(token) != theirs.get(token)), None)
    if differing is not None:
        found = f"token {differing!r} is {theirs.get(differing)} there and {mine.get(differing)} here"
    elif tokenizer_fingerprint(other, "none") != tokenizer_fingerprint(tokenizer, "none"):
        found = "it splits text by different rules"
    else:
        return
    raise ConfigError(
        f"--distill {config.distill}: its tokenizer is not that of {config.model} ({found}); "
        "a teacher must have the model's own tokenizer and vocabulary"
    )
