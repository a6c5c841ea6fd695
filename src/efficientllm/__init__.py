"""Pruning-aware pretraining: makes a pretrained decoder model smaller while it trains."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientllm.models.load import load_model as load
    from efficientllm.pruning.pruner import Pruner

__version__ = "0.2.0"
__all__ = ["Pruner", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports `Pruner` or `load`, and torch with them, only when they are asked for."""
    if name == "Pruner":
        from efficientllm.pruning.pruner import Pruner

        return Pruner
    if name == "load":
        from efficientllm.models.load import load_model

        return load_model
    raise AttributeError(f"module 'efficientllm' has no attribute {name!r}")
