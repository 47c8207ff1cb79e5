"""A configuration of a small filter without a judge, over a drawn world, as a file."""

from pathlib import Path
from typing import Any

import yaml

from fifa_ray.demo.packaged import text_encoder_folder
from fifa_ray.demo.run import REWARD_WEIGHTS


def write_config(folder: Path, world: Path, **sections: dict[str, Any]) -> str:
    """Write it into `folder`, the run's too; `embed` and `select` add to what is set here."""
    values = sections | {
        "run_dir": str(folder / "run"),
        "ingest": {"source": str(world / "data")},
        "rewards": [{"name": "tiny", "weights": str(REWARD_WEIGHTS)}],
        "judge": {"enabled": False},
        "embed": {"model": str(text_encoder_folder())} | sections.get("embed", {}),
        "select": {"quality_weight": 0, "exclude_harmful": False} | sections.get("select", {}),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)
