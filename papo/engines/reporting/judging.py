"""What the page tells of the cost of judging: a table where a model was asked, a sentence where the judge costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from papo.core.costs import model_asked, money
from papo.engines.reporting.results import Run

EXPLAINED = (
    "Calls and tokens are all that were paid for the round, those of a try that was cut short, too; a failed call gave no verdict. "
    "Asked: share of the responses. From the store: share of the verdicts that an earlier call had paid for. Not asking: the responses "
    "whose score the variant does not use, at the mean of the round's verdicts, an estimate."
)
MONEY = " Cost and savings are in the unit of score_prm.prices."


@dataclass(frozen=True)
class Table:
    """Cells as text, an empty one where a round says nothing."""

    labels: list[str]
    rows: list[tuple[str, list[str]]]
    total: list[str]
    caption: str


def judging_table(shown: Run) -> Table | None:
    """A row a round and their total; None if no model was asked."""
    if not any(map(model_asked, shown.judging)):
        return None
    rows = [row for row in shown.judging if model_asked(row)]
    present = {name for row in rows for name in row}
    columns = {name: column for name, column in _columns(present).items() if name in present}
    return Table(
        labels=[label for label, _ in columns.values()],
        rows=[(f"{row['round']:.0f}", _cells(row, columns)) for row in rows],
        total=_cells(shown.judging_total, columns),
        caption=EXPLAINED + (MONEY if "cost" in present else ""),
    )


def asked_sentence(shown: Run) -> str | None:
    """Of a judge that costs nothing, how many responses it was asked about; None of a model, or where no judge is used."""
    if any(map(model_asked, shown.judging)) or shown.params.get("advantage.variant") == "orm":
        return None
    share = shown.judging_total.get("asked_share")
    return None if share is None else f"The judge was asked about {_percent(share)} of the responses of the run."


def _columns(present: set[str]) -> dict[str, tuple[str, Callable[[float], str]]]:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "asked_share": ("Asked", _percent),
        "calls": ("Calls", _count),
        "calls_failed": ("Failed", _count),
        "prompt_tokens": ("Tokens in", _count),
        "completion_tokens": ("Tokens out", _count),
        "cost": ("Cost", money),
        "cached_share": ("From the store", _percent),
    }
    for name, way in (("cache", "by the store"), ("not_asked", "by not asking")):
        if f"{name}_saved" in present:
            columns[f"{name}_saved"] = (f"Saved {way}", money)
        else:  # the model has no price
            columns[f"{name}_tokens"] = (f"Tokens saved {way}", _count)
    return columns | {"vote_agreement": ("Votes agree", _percent)}


def _cells(row: Mapping[str, float], columns: Mapping[str, tuple[str, Callable[[float], str]]]) -> list[str]:
    return [shown(row[name]) if name in row else "" for name, (_, shown) in columns.items()]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
