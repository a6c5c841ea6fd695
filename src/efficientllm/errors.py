"""Errors that a user can cause and fix. Each message says what was asked, what was found and what to do.

EfficientLLMError
  ConfigError             a flag, key or value that does not fit
  BudgetError             a size that the model cannot take
  UnsupportedModelError   a model that cannot be read or pruned
  DataError               text or token shards that cannot be used
  CheckpointError         a run folder that cannot be resumed
  TrainingError           a run that cannot continue
"""


class EfficientLLMError(Exception):
    """Anything the command line reports as one line with exit code 2."""


class ConfigError(EfficientLLMError):
    """A flag, key or value that does not fit."""


class BudgetError(EfficientLLMError):
    """A target size that the model cannot take."""


class UnsupportedModelError(EfficientLLMError):
    """A model that cannot be read or pruned."""


class DataError(EfficientLLMError):
    """Text or token shards that cannot be used."""


class CheckpointError(EfficientLLMError):
    """A run folder that cannot be resumed."""


class TrainingError(EfficientLLMError):
    """A run that cannot continue; `one_rank`: for a reason of this rank alone, so that it must report it."""

    def __init__(self, message: str, *, one_rank: bool = False) -> None:
        super().__init__(message)
        self.one_rank = one_rank
