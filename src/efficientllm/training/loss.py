"""The loss of a model's forward pass: next tokens, or what a teacher adds, in chunks (cross_entropy.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from efficientllm.training.cross_entropy import CrossEntropy, next_token_loss
from efficientllm.training.distillation import DistillationTargets


def chunked_loss_(model: nn.Module, cross_entropy_: CrossEntropy | None = None) -> None:
    """Makes a decoder's forward pass with `labels` return the loss alone, computed in chunks.

    The labels are the input's own tokens, every one but the first of a row a target. Without `labels` nothing changes.
    With `targets`, what a teacher makes of the same tokens, the loss is theirs.

    Args:
        cross_entropy_: `cross_entropy_and_grad_` (default), or it, compiled.
    """
    stock = type(model).forward

    def forward(
        self: Any,
        input_ids: Tensor,
        labels: Tensor | None = None,
        targets: DistillationTargets | None = None,
        **more: Any,
    ) -> Any:
        if labels is None:
            return stock(self, input_ids=input_ids, **more)
        with whole_rows():
            h = self.model(input_ids=input_ids, **more).last_hidden_state
        states, tokens = h[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        scale, cap = logit_form(self.config)
        if targets is not None:
            return targets.loss(states, self.lm_head.weight, tokens, scale=scale, cap=cap)
        loss = next_token_loss(states, self.lm_head.weight, tokens, scale=scale, cap=cap, cross_entropy_=cross_entropy_)
        return CausalLMOutputWithPast(loss=loss)

    # a bound method, not a closure over the model: a deep copy then calls itself
    model.__dict__["forward"] = MethodType(forward, model)


def logit_form(config: Any) -> tuple[float, float | None]:
    """Returns what a model's logits are multiplied by (Granite), and what they are soft-capped at (Gemma 2)."""
    return 1 / getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Spares passes the question whether a row is packed of several sequences.

    transformers puts it to the device, and waits for the answer, in every pass without a mask; ours are never packed.
    """
    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked
