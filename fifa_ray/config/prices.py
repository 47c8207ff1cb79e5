"""The price list that a configuration names."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from fifa_ray.config.cost import CostConfig, PricesConfig
from fifa_ray.config.loading import ConfigError, explain_errors


def read_prices(cost: CostConfig) -> PricesConfig | None:
    """`cost.prices`, or what `cost.prices_file` holds; None where neither is set.

    Raises ConfigError for a missing file, YAML that is not a mapping, and every bad key or value.
    """
    if cost.prices is not None or cost.prices_file is None:
        return cost.prices
    path = Path(cost.prices_file).expanduser()
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cost.prices_file {cost.prices_file!r} cannot be read ({error.strerror}): write one "
            "like `fifa plan --example-prices`, or leave it out to plan hours without money"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{cost.prices_file} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{cost.prices_file} must hold a mapping with groups, got {type(values).__name__}"
        )
    try:
        return PricesConfig.model_validate(values)
    except ValidationError as error:
        explained = explain_errors(error, PricesConfig)
        raise ConfigError(f"{cost.prices_file}: {explained}") from None
