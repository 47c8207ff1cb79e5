"""What a section of the report is, and how it says that it has nothing to show.

A section is a function `build(tables) -> Section`. It raises `Absent` with the reason where the
run lacks what it shows; the page then prints that reason in its place, or leaves the section out if
it is `NotPlanned`.
"""

from dataclasses import dataclass, field
from typing import Any


class Absent(Exception):
    """A section has nothing to show; the message says what is missing and who writes it."""


class NotPlanned(Absent):
    """The run never set out to make what a section shows: the page has no such section."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The template of a section, the values it prints and the charts it places by name."""

    template: str
    values: dict[str, Any] = field(default_factory=dict)
    # Vega-Lite specifications by name, unique on the page.
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Parts that are missing though the section is there.
    notes: tuple[str, ...] = ()
