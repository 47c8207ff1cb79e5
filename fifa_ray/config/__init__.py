"""Every setting, typed once: the YAML files, the command line and the reference come from here.

A configuration is a YAML file (or the name of a packaged preset) plus dotted overrides such as
`select.selection_size=1000` or `rewards.0.batch_size=64`. Unknown keys are errors.
"""

from fifa_ray.config.cost import CostConfig, NodeGroup, PricesConfig
from fifa_ray.config.dataset import ImagesConfig, IngestConfig
from fifa_ray.config.evaluation import EvaluateConfig
from fifa_ray.config.loading import (
    ConfigError,
    describe_fields,
    dump_config,
    load_config,
    preset_names,
)
from fifa_ray.config.prices import read_prices
from fifa_ray.config.scorers import (
    EmbedConfig,
    FittedOptions,
    JudgeConfig,
    NeighborsConfig,
    RewardConfig,
)
from fifa_ray.config.sections import ActorsConfig
from fifa_ray.config.settings import (
    FifaConfig,
    RayConfig,
    ReportConfig,
    SelectConfig,
    Strategy,
)
from fifa_ray.config.training import LoraConfig, LossConfig, OptimizerConfig, TrainConfig
from fifa_ray.config.tuning import AshaConfig, BudgetConfig, DimensionConfig, TuneConfig

__all__ = [
    "ActorsConfig",
    "AshaConfig",
    "BudgetConfig",
    "ConfigError",
    "CostConfig",
    "DimensionConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FifaConfig",
    "FittedOptions",
    "ImagesConfig",
    "IngestConfig",
    "JudgeConfig",
    "LoraConfig",
    "LossConfig",
    "NeighborsConfig",
    "NodeGroup",
    "OptimizerConfig",
    "PricesConfig",
    "RayConfig",
    "ReportConfig",
    "RewardConfig",
    "SelectConfig",
    "Strategy",
    "TrainConfig",
    "TuneConfig",
    "describe_fields",
    "dump_config",
    "load_config",
    "preset_names",
    "read_prices",
]
