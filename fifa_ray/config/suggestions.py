"""What to say of a key that is not known."""

import difflib
from collections.abc import Sequence

from pydantic import ValidationError


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean x?` for the nearest known word, or nothing where none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""


def explain_options(error: ValidationError, kind: str, known: Sequence[str]) -> str:
    """One line for every bad setting in the `options` of a kind of model."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = suggest(name, known) or f"; known: {', '.join(known)}"
            lines.append(f"unknown option {name!r} of kind {kind}{hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = f", got {problem['input']!r}" if name else ""
            lines.append(f"option{'s' if not name else ' ' + name}: {message}{got}")
    return "; ".join(lines)
