"""What a run came to, in a sentence or two: its loss against the source's, and against other runs of that source."""

from collections.abc import Sequence
from math import exp, isclose

from efficientllm.report.formats import loss, percent, perplexity
from efficientllm.report.history import History
from efficientllm.report.timeseries import text_loss

HELD_OUT = ("model", "valid", "valid_tokens", "seq_len", "text_field", "txt_split", "document_separator")  # settings
SAME = 1e-4  # of a loss: what two machines differ by on the same model and text


def verdict(run: History) -> str:
    """Returns what one run came to: how much smaller, and its loss and perplexity against the source's."""
    words = [_smaller(run), _against_source(run)]
    return ("" if run.finished else "So far: ") + " ".join(words)


def verdicts(runs: Sequence[tuple[str, History]]) -> list[str]:
    """Returns for runs that compare which one ends lowest, and by how much; or that none compare."""
    groups = [group for group in _comparable(runs) if len(group) > 1]
    left = [name for name, _ in runs if not any(name == each for group in groups for each, _ in group)]
    found = [_ranked(group) for group in groups]
    if left:
        verb = "does" if len(left) == 1 else "do"
        found.append(
            f"{', '.join(left)} {verb} not compare in loss with {'the others' if groups else 'each other'}: another "
            "source, other held-out text, or no loss on it yet."
        )
    return found


def last_loss(run: History) -> float | None:
    """Returns the last held-out loss after the source's own; None without one."""
    found = [each for tokens, each in run.valid_losses if tokens > 0]
    return found[-1] if found else None


def source_loss(run: History) -> float | None:
    """Returns the held-out loss that training began with: the source's, or that of fresh weights."""
    return next((each for tokens, each in run.valid_losses if tokens == 0), None)


def difference(after: float, before: float) -> str:
    """Returns a difference of losses with its sign, as the losses written beside it differ."""
    return f"{round(after, 3) - round(before, 3):+.3f}".replace("-", "−")


def _smaller(run: History) -> str:
    less = 1 - run.params / run.source_params
    if less == 0:
        return f"All of the source's {run.params:,} parameters."
    return f"{percent(less)} smaller: {run.params:,} of {run.source_params:,} parameters."


def _against_source(run: History) -> str:
    first, last = source_loss(run), last_loss(run)
    begun = "fresh weights’" if run.config["method"] == "scratch" else "source’s"
    removed = run.rows[0].get("removed_valid_loss")
    at_once = f" Right after the removal it was {loss(removed)}." if removed is not None else ""
    if last is None and first is not None:
        return f"Held-out loss not measured since the {begun} {loss(first)}.{at_once}"
    if last is None or first is None:
        seen = [each for row in run.rows if (each := text_loss(row)) is not None]
        trained = f" The training loss went from {loss(seen[0])} to {loss(seen[-1])}." if seen else ""
        return f"No text is held out, so that its loss against the source is not known.{trained}"
    apart = round(last, 3) - round(first, 3)
    where = "equal to" if apart == 0 else f"{abs(apart):.3f} nats per token {'above' if apart > 0 else 'below'}"
    return (
        f"Held-out loss {loss(last)}, {where} the {begun} {loss(first)}; perplexity {perplexity(last)} against "
        f"{perplexity(first)}.{at_once}"
    )


def _ranked(group: Sequence[tuple[str, History]]) -> str:
    """Returns the order of runs that compare, the lowest loss first."""
    ordered = sorted(((last_loss(run) or 0.0, name, run) for name, run in group), key=lambda each: each[:2])
    best, name, run = ordered[0]
    first = source_loss(run)
    against = f", {difference(best, first)} against the source’s {loss(first)}" if first is not None else ""
    others = ", ".join(
        f"{name} {difference(each, best)} (× {exp(each - best):.2f})".replace(" ", "\N{NO-BREAK SPACE}")
        for each, name, _ in ordered[1:]
    )
    return (
        f"{name} ends lowest: held-out loss {loss(best)}{against}; perplexity {perplexity(best)}. "
        f"Above it, in nats per token and in times its perplexity: {others}."
    )


def _comparable(runs: Sequence[tuple[str, History]]) -> list[list[tuple[str, History]]]:
    """Returns the runs that have a held-out loss, together with those of the same source and held-out text."""
    groups: list[list[tuple[str, History]]] = []
    for name, run in runs:
        if last_loss(run) is None:
            continue
        group = next((each for each in groups if _same(each[0][1], run)), None)
        if group is None:
            groups.append([(name, run)])
        else:
            group.append((name, run))
    return groups


def _same(one: History, other: History) -> bool:
    """Whether two runs began with the same source and validate on the same text: by their settings, or by its loss."""
    names = HELD_OUT if one.config["valid"] else (*HELD_OUT, "data")
    if all(one.config.get(name) == other.config.get(name) for name in names):
        return True
    first, second = source_loss(one), source_loss(other)
    alike = first is not None and second is not None and isclose(first, second, rel_tol=SAME)
    return alike and one.rows[0]["params"] == other.rows[0]["params"]
