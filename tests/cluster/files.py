"""Where the cluster files lie, and reading them."""

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
RAY_UP = ("aws", "gcp")


def read(name: str) -> dict[str, Any]:
    """A file of `cluster/` that holds one mapping."""
    values: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return values
