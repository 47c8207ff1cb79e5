"""What a search may spend, in seconds of a device, and what that is in money."""

from dataclasses import dataclass

from fifa_ray.config import ConfigError, FifaConfig
from fifa_ray.config.prices import read_prices


@dataclass(frozen=True)
class Money:
    """A budget: `unit` is GPU or core; prices are for an hour of one, None where not known."""

    unit: str
    device_seconds: float
    price_per_hour: float | None
    currency: str | None

    def cost(self, device_seconds: float) -> float | None:
        """What so many device-seconds cost."""
        return None if self.price_per_hour is None else device_seconds * self.price_per_hour / 3600


def budget_of(config: FifaConfig, *, use_gpu: bool) -> Money:
    """`tune.budget` in device-seconds.

    Raises ConfigError where there is none, it is of the other device, or money has no price.
    """
    budget = config.tune.budget
    prices = read_prices(config.cost)
    currency = prices.currency if prices is not None else None
    price = budget.price_per_hour
    if price is None and prices is not None:
        price = max(
            (
                group.price_per_hour / (group.gpus if use_gpu else group.cpus)
                for group in prices.groups
                if group.price_per_hour is not None and (group.gpus > 0) == use_gpu
            ),
            default=None,
        )
    unit = "GPU" if use_gpu else "core"
    other = budget.cpu_seconds if use_gpu else budget.gpu_seconds
    if other is not None:
        raise ConfigError(
            f"trials run on {'GPUs' if use_gpu else 'CPU cores'} here: set tune.budget."
            f"{'gpu' if use_gpu else 'cpu'}_seconds, or train.use_gpu to what you mean"
        )
    seconds = budget.gpu_seconds if use_gpu else budget.cpu_seconds
    if budget.money is not None:
        if price is None:
            raise ConfigError(
                f"tune.budget.money needs the price of a {unit} for an hour: set "
                "tune.budget.price_per_hour, or cost.prices"
            )
        seconds = budget.money / price * 3600
    if seconds is None:
        raise ConfigError(
            "a search needs a budget: set tune.budget.gpu_seconds (or cpu_seconds on machines "
            "without a GPU, or money)"
        )
    return Money(unit, seconds, price, currency)
