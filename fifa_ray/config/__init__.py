"""Every setting, typed once: the YAML files, the command line and the reference come from here.

A configuration is a YAML file (or the name of a packaged preset) plus dotted overrides such as
`select.selection_size=1000` or `rewards.0.batch_size=64`. Unknown keys are errors.
"""

from fifa_ray.config.loading import (
    ConfigError,
    describe_fields,
    dump_config,
    load_config,
    preset_names,
)
from fifa_ray.config.settings import (
    ActorsConfig,
    EmbedConfig,
    FifaConfig,
    FittedOptions,
    ImagesConfig,
    IngestConfig,
    JudgeConfig,
    NeighborsConfig,
    RayConfig,
    ReportConfig,
    RewardConfig,
    SelectConfig,
    Strategy,
)

__all__ = [
    "ActorsConfig",
    "ConfigError",
    "EmbedConfig",
    "FifaConfig",
    "FittedOptions",
    "ImagesConfig",
    "IngestConfig",
    "JudgeConfig",
    "NeighborsConfig",
    "RayConfig",
    "ReportConfig",
    "RewardConfig",
    "SelectConfig",
    "Strategy",
    "describe_fields",
    "dump_config",
    "load_config",
    "preset_names",
]
