"""Numbers, durations and names as the page shows them: the filters of its templates."""

from collections.abc import Callable
from typing import Any

MINUS = "\N{MINUS SIGN}"
NO_VALUE = "\N{EN DASH}"
# How a trial of a search ended, by its status.
TRIAL_ENDS = {
    "complete": "trained to the end",
    "stopped": "stopped early",
    "budget": "cut short by the budget",
    "failed": "failed",
    "crashed": "crashed",
    "running": "interrupted",
}
SET_NAMES = {"all": "all pairs", "kept": "kept"}


def format_number(value: Any, digits: int = 4) -> str:
    """A number for reading: integers with separators, floats with `digits` significant ones."""
    if value is None:
        return NO_VALUE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", MINUS)
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def format_fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, to stand in a column."""
    return NO_VALUE if value is None else f"{value:,.{decimals}f}".replace("-", MINUS)


def format_signed(value: float | None) -> str:
    """A number with its sign and two decimals."""
    return NO_VALUE if value is None else f"{value:+.2f}".replace("-", MINUS)


def format_percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return NO_VALUE if value is None else f"{value:.1%}"


def format_proof(value: Any, unit: str | None) -> str:
    """A value of the proof: a percentage where its unit is "share", else a number with its unit."""
    if unit == "share" and isinstance(value, int | float):
        return format_percent(value)
    return format_number(value) + (f" {unit}" if unit else "")


def format_seconds(value: float | None) -> str:
    """A duration for reading, e.g. 1 h 02 min, 3 min 05 s, 12.3 s."""
    if value is None:
        return NO_VALUE
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def words(name: str) -> str:
    """A name of the tables, such as prompt_too_long, as words."""
    return name.replace("_", " ")


FILTERS: dict[str, Callable[..., Any]] = {
    "count": format_number,
    "number": format_number,
    "fixed": format_fixed,
    "signed": format_signed,
    "percent": format_percent,
    "seconds": format_seconds,
    "proof_value": format_proof,
    "words": words,
    "set_name": lambda name: SET_NAMES.get(name, words(name)),
    "combine": lambda first, second: {**first, **second},
}
