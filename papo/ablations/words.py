"""Figures as a person reads them: shares in points of a hundred, lengths in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

SHARES = ("_share", "accuracy")


def percent(share: float, decimals: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%"


def unit(measure: str) -> str:
    """` points` of a hundred, ` tokens`, or nothing."""
    kind, _, rest = measure.partition("/")
    if kind in ("accuracy", "gain", "fall") or rest.endswith(SHARES):
        return " points"
    return " tokens" if kind == "length" or rest.startswith(("length_m", "length_p9")) else ""


def level(value: float, measure: str) -> str:
    """A level of a measure."""
    if unit(measure) == " points":
        return f"{100 * value:.1f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if unit(measure) else f"{value:.3g}"


def difference(value: float, measure: str) -> str:
    """A difference of a measure, with its sign."""
    size = level(abs(value), measure)
    sign = "" if float(size.replace(",", "")) == 0 else "+" if value > 0 else "\N{MINUS SIGN}"
    return f"{sign}{size}"


def listed(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def ticked(text: str) -> Markup:
    """Text for a page, where what stands between backticks is code."""
    parts = text.split("`")
    return Markup().join(
        Markup("<code>{}</code>" if number % 2 else "{}").format(part) for number, part in enumerate(parts)
    )
