"""What follows from a config and a model: steps, warm-up, pace and learning rate. Imports no torch."""

from dataclasses import dataclass
from math import ceil

from efficientllm.config.methods import METHODS
from efficientllm.config.run_config import RunConfig
from efficientllm.errors import ConfigError
from efficientllm.numbers import format_count
from efficientllm.pruning.schedule import LinearPace, Pace, SlotPace
from efficientllm.pruning.trajectory import pruning_steps
from efficientllm.space.dims import Space
from efficientllm.space.limits import Limits
from efficientllm.training.size_target import Budget, params_budget

LEARNING_RATES = ((1_000_000, 3e-3), (50_000_000, 1e-3), (500_000_000, 5e-4))  # below this many parameters
LARGE_LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
NO_DECAY_BELOW = 10_000_000  # parameters
WARMUP_STEPS, WARMUP_SHARE = 500, 0.07
DECAY_SHARE, FINAL_LR = 0.3, 0.05


@dataclass(frozen=True)
class Recipe:
    """The derived numbers of one run.

    Attributes:
        total_steps: optimizer steps of the whole run.
        prune_steps: steps of the pruning phase; with a slot pace the planner's estimate.
        warmup_steps: steps before the first removal, over which the learning rate rises.
        decay_steps: the last steps, over which it falls in a line to 5%.
        lr_reason: why the peak learning rate is what it is, for the terminal.
        batch_rows: rows of an optimizer step.
        remarks: what a person should know before the run starts.
    """

    total_steps: int
    prune_steps: int
    warmup_steps: int
    decay_steps: int
    pace: Pace
    lr: float
    lr_reason: str
    weight_decay: float
    batch_rows: int
    remarks: tuple[str, ...]

    @property
    def decay_start(self) -> int:
        """The last step before the decay."""
        return self.total_steps - self.decay_steps


def make_recipe(
    config: RunConfig, space: Space, limits: Limits, budget: Budget | None = None, source_params: int | None = None
) -> Recipe:
    """Returns the derived numbers of a run; without a budget it is `--target-params`.

    Args:
        source_params: of the model that is named, where training starts with another one, of `space`.

    Raises:
        ConfigError: if the slots of the pace need more steps than `--tokens` gives.
    """
    params = source_params or space.num_params(limits.source)
    budget = budget or params_budget(config, space, limits)
    tokens = config.tokens or config.prune_tokens or 0
    total_steps = ceil(tokens / config.batch_tokens)
    method = METHODS[config.method]
    pace: Pace
    if method.when != "gradual":
        # the learning rate rises as in the run that this one is compared with
        warmup_steps = warm_up(ceil((config.prune_tokens or tokens) / config.batch_tokens))
        prune_steps, pace = 0, LinearPace(method.rounds)
    elif config.prune_tokens is not None:
        prune_steps = ceil(config.prune_tokens / config.batch_tokens)
        warmup_steps = warm_up(prune_steps)
        pace = LinearPace(prune_steps, warmup_steps)
    else:
        equal = config.removals_per_step is not None
        slot_steps = 1 / config.removals_per_step if config.removals_per_step is not None else config.slot_steps or 1.0
        removing = pruning_steps(
            budget.measure, limits, budget.target, SlotPace(slot_steps, equal=equal), space.head_dim
        )
        warmup_steps = warm_up(ceil(removing / (1 - WARMUP_SHARE)))
        prune_steps = warmup_steps + removing
        pace = SlotPace(slot_steps, warmup_steps, equal)
        if config.tokens and prune_steps > total_steps:
            raise ConfigError(
                f"--tokens {format_count(config.tokens)} gives {total_steps} steps, and at this pace the pruning phase "
                f"takes about {prune_steps}; prune faster, or raise --tokens to "
                f"{format_count(prune_steps * config.batch_tokens)} or more"
            )
        total_steps = max(total_steps, prune_steps)
    decay_steps = round(DECAY_SHARE * total_steps)
    remarks = [*budget.remarks]
    if budget.target < budget.measure(limits.source) and prune_steps > total_steps - decay_steps:
        remarks.append(
            f"the pruning phase ({prune_steps} steps) reaches into the decay of the learning rate (from step "
            f"{total_steps - decay_steps + 1}); the model hardly recovers from late removals: raise --tokens to "
            f"{format_count(ceil(prune_steps / (1 - DECAY_SHARE)) * config.batch_tokens)} or lower --prune-tokens"
        )
    lr, reason = (config.lr, "as given") if config.lr is not None else default_lr(params)
    return Recipe(
        total_steps=total_steps,
        prune_steps=prune_steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        pace=pace,
        lr=lr,
        lr_reason=reason,
        weight_decay=0.0 if params < NO_DECAY_BELOW else WEIGHT_DECAY,
        batch_rows=config.batch_tokens // config.seq_len,
        remarks=tuple(remarks),
    )


def rank_rows(config: RunConfig, num_ranks: int) -> int:
    """Returns the rows of an optimizer step that each rank gets.

    Raises:
        ConfigError: if the ranks cannot share the rows evenly.
    """
    rows = config.batch_tokens // config.seq_len
    if rows % num_ranks:
        raise ConfigError(
            f"--batch-tokens {config.batch_tokens} makes {rows} rows of {config.seq_len}, which {num_ranks} ranks "
            f"cannot share evenly; give a multiple of {config.seq_len * num_ranks}"
        )
    return rows // num_ranks


def warm_up(prune_steps: int) -> int:
    """Returns the steps before the first removal: 7% of the pruning phase, 500 at most."""
    return min(WARMUP_STEPS, int(WARMUP_SHARE * prune_steps))


def default_lr(params: int) -> tuple[float, str]:
    """Returns the peak learning rate for a source with that many parameters, and the reason in words."""
    for bound, lr in LEARNING_RATES:
        if params < bound:
            return lr, f"the default for a source below {format_count(bound)} parameters"
    return LARGE_LEARNING_RATE, f"the default for a source of {format_count(LEARNING_RATES[-1][0])} parameters or more"
