"""How it is removed: saliency, selection, schedule, compensation, removal, and the Pruner that ties them to a loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficientllm.pruning.pruner import Pruner as Pruner
    from efficientllm.pruning.schedule import LinearPace as LinearPace
    from efficientllm.pruning.schedule import SlotPace as SlotPace
    from efficientllm.pruning.selection import Removal as Removal

_HOMES = {"Pruner": "pruner", "LinearPace": "schedule", "SlotPace": "schedule", "Removal": "selection"}
__all__ = ["LinearPace", "Pruner", "Removal", "SlotPace"]


def __getattr__(name: str) -> Any:
    """Imports at first use: the paces need no torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
