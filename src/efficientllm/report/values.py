"""The logged values behind the charts, as a table: for those who read numbers, and for those who do not see charts."""

from efficientllm.report import formats
from efficientllm.report.charts import picked
from efficientllm.report.history import History
from efficientllm.report.layer_plots import LABELS, sizes_text
from efficientllm.report.timeseries import SIZES, elapsed, lowest_saliencies, text_loss

MOST = 32  # rows of steps, and as many again of validations
MISSING = "–"


def values_table(run: History, most: int = MOST) -> list[list[str]]:
    """Returns a row for some of the steps, evenly, and for every validation or some of them; the heads come first."""
    saliencies = {kind: dict(points) for kind, points in lowest_saliencies(run.removals).items()}
    kinds = [kind for kind in (*LABELS, "layer") if kind in saliencies]
    heads = ["step", "tokens", "seconds", "parameters", *SIZES, "training loss", "held-out loss", "perplexity"]
    heads += ["learning rate", "gradient norm", "tokens a second", "memory"]
    heads += [f"lowest saliency: {LABELS.get(kind, kind)}" for kind in kinds]
    rows = list(zip(run.rows, elapsed(run.rows), strict=True))
    validated = [number for number, (row, _) in enumerate(rows) if "valid_loss" in row]
    shown = sorted({*picked(range(len(rows)), most - 1), *picked(validated, most - 1)})
    table = [heads]
    for row, seconds in (rows[number] for number in shown):
        valid, trained = row.get("valid_loss"), text_loss(row)
        table.append(
            [
                f"{row['step']:,}",
                f"{row['tokens']:,}",
                f"{seconds:,.1f}",
                f"{row['params']:,}",
                *(sizes_text(row[name]) for name in SIZES.values()),
                _or_missing(trained, formats.loss),
                _or_missing(valid, formats.loss),
                _or_missing(valid, formats.perplexity),
                _or_missing(row.get("lr"), formats.short),
                _or_missing(row.get("grad_norm"), formats.short),
                _or_missing(row.get("tokens_per_second"), formats.whole),
                _or_missing(row.get("memory_bytes"), formats.byte_size),
                *(_or_missing(saliencies[kind].get(row["tokens"]), formats.scientific) for kind in kinds),
            ]
        )
    return table


def _or_missing(value: float | None, written: formats.Format) -> str:
    return MISSING if value is None else written(value)
