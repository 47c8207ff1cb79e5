"""fifa-ray: keep the few preference pairs that matter, then align a diffusion model with them.

    import fifa_ray
    run = fifa_ray.run_filter({"run_dir": "runs/mine", "select": {"selection_size": 500}}, data=df)
    selected = run.read_table("selected").to_pandas()

Names are imported when first used, so that `fifa_ray.scoring` loads neither torch nor Ray.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "fifa_ray.config",
    "FifaConfig": "fifa_ray.config",
    "load_config": "fifa_ray.config",
    "RunDir": "fifa_ray.run_dir",
    "open_run": "fifa_ray.pipeline",
    "reselect": "fifa_ray.pipeline",
    "run_filter": "fifa_ray.pipeline",
    "write_report": "fifa_ray.report",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fifa_ray' has no attribute {name!r}")
