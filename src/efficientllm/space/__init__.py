"""What can be removed: a model as a table of named dims."""

from efficientllm.space.cost import Polynomial
from efficientllm.space.dims import Bundle, Dim, Slot, Space
from efficientllm.space.find import find_space
from efficientllm.space.limits import Limits, find_limits

__all__ = ["Bundle", "Dim", "Limits", "Polynomial", "Slot", "Space", "find_limits", "find_space"]
