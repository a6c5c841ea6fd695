"""The result of a run, or a saved_size of its ladder: an ordinary model folder with tokenizer and model card."""

from pathlib import Path

import torch

from efficientllm.config.command_line import command_line
from efficientllm.config.methods import card_words
from efficientllm.delivery.card import Facts, model_card
from efficientllm.delivery.huggingface import save_model
from efficientllm.run.source import SourceModel
from efficientllm.space.dims import widths
from efficientllm.training.trainer import Trainer


def save_result(
    folder: Path, trainer: Trainer, source: SourceModel, *, tokens: int, losses: dict[str, float], annealed: bool
) -> None:
    """Writes the model as it is now; all ranks come here, and the first one writes.

    Args:
        tokens: that it has been trained on.
        losses: on held-out text, by what they are of.
        annealed: whether the learning rate has come down to its end.
    """
    config, pruner, engine = trainer.config, trainer.pruner, trainer.engine
    facts = Facts(
        model=config.model,
        data=config.data,
        params=pruner.num_params,
        source_params=source.num_params,
        how=card_words(config.method),
        shape=widths(pruner.shape),
        tokens=tokens,
        losses=losses,
        command=command_line(config),
        annealed=annealed,
    )
    model = engine.gather(trainer.model)
    if engine.is_main:
        with torch.compiler.set_stance("force_eager"):  # its proof is one pass
            save_model(
                model,
                folder,
                tokenizer=source.tokenizer,
                source=source.path,
                dtype=source.dtype,
                card=model_card(facts, source.path),
            )
    engine.barrier()
