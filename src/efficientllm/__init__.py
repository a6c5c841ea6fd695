"""Pruning-aware pretraining: makes a pretrained decoder model smaller while it trains."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientllm.pruning.pruner import Pruner

__version__ = "0.1.0"
__all__ = ["Pruner", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `Pruner`, and torch with it, only when it is asked for."""
    if name == "Pruner":
        from efficientllm.pruning.pruner import Pruner

        return Pruner
    raise AttributeError(f"module 'efficientllm' has no attribute {name!r}")
