"""How parameters are removed while a model trains."""

from efficientllm.pruning.pruner import Pruner
from efficientllm.pruning.schedule import LinearPace, SlotPace
from efficientllm.pruning.selection import Removal

__all__ = ["LinearPace", "Pruner", "Removal", "SlotPace"]
