"""Settings of a search: what may vary, who judges, what it may cost, and who stops losers."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fifa_ray.config.sections import NAME_PATTERN, Section

Choice = bool | int | float | str | None


class DimensionConfig(Section):
    """The values that one setting may take: exactly one of these. Both ends are included."""

    uniform: tuple[float, float] | None = Field(None, description="Any number from low to high.")
    loguniform: tuple[float, float] | None = Field(
        None, description="Any number from low to high, as often in each octave; low is above 0."
    )
    integer: tuple[int, int] | None = Field(None, description="A whole number from low to high.")
    log_integer: tuple[int, int] | None = Field(
        None, description="A whole number from low to high, as often in each octave."
    )
    choice: tuple[Choice, ...] | None = Field(
        None, min_length=1, description="One of these values; null is one, too."
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(type(self).model_fields)}, got {given or 'none'}"
            )
        if self.choice is None:
            low, high = self.bounds
            lowest = 0 if given[0].startswith("log") else -math.inf
            if not lowest < low <= high < math.inf:
                raise ValueError(
                    f"{given[0]} needs low <= high, finite{' and above 0' if not lowest else ''}, "
                    f"got {low} and {high}"
                )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of a range."""
        found = self.uniform or self.loguniform or self.integer or self.log_integer
        assert found is not None
        return found

    @property
    def ends(self) -> tuple[Choice, ...]:
        """All choices, or low and high: what has to be a valid setting."""
        return self.choice if self.choice is not None else self.bounds

    def contains(self, value: Any) -> bool:
        """Whether the search could come upon this value."""
        if self.choice is not None:
            return value in self.choice
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds
        whole = self.integer is not None or self.log_integer is not None
        return low <= value <= high and (not whole or float(value).is_integer())


class BudgetConfig(Section):
    """What a search may cost in all, its last re-run included: exactly one of the first three.

    A device is a GPU where trials use GPUs, else a CPU core. It is paid for from when a trial takes
    it to when it gives it back, by the wall clock.
    """

    gpu_seconds: float | None = Field(None, gt=0, description="Seconds of one GPU.")
    cpu_seconds: float | None = Field(
        None, gt=0, description="Seconds of one core, for machines without a GPU."
    )
    money: float | None = Field(None, gt=0, description="Money, in the currency of the prices.")
    price_per_hour: float | None = Field(
        None,
        gt=0,
        description="Price of one device for an hour; null: the dearest GPU (or core) of "
        "cost.prices.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [n for n in ("gpu_seconds", "cpu_seconds", "money") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"takes one of gpu_seconds, cpu_seconds and money, got {given}")
        return self


class AshaConfig(Section):
    """Asynchronous successive halving: trials that lag behind others at a rung are stopped."""

    enabled: bool = Field(True, description="Off: every trial trains to its last step.")
    grace_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps of the first rung, where images are drawn and judged; null: "
        "the most steps that a trial may have, divided by reduction_factor twice.",
    )
    reduction_factor: float = Field(
        3.0,
        gt=1,
        description="A rung has so many times the steps of the one before; about one in so many "
        "trials goes on from it.",
    )


class TuneConfig(Section):
    """A search for the selection and training with the best win rate that a budget can buy."""

    name: str = Field(
        "search", pattern=NAME_PATTERN, description="Name of this search: tuning/<name>/."
    )
    space: dict[str, DimensionConfig] | None = Field(
        None,
        description="Settings of select.* and train.* by dotted name, e.g. {select.quality_weight: "
        "{uniform: [0, 2]}, select.selector: {choice: [top_k, greedy]}}; null: weights, K, margin "
        "rule, quality floor, selector, dpo_beta, learning rate and steps around those configured.",
    )
    budget: BudgetConfig = Field(
        default_factory=BudgetConfig, description="What the search may cost; it has to be set."
    )
    num_trials: int = Field(
        100, ge=1, description="Most trials, the configured settings among them as the first."
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="Trials at once; null: as many as the cluster has room for."
    )
    algorithm: Literal["optuna", "random", "hyperopt", "hebo", "ax", "nevergrad", "zoopt"] = Field(
        "optuna",
        description="Who proposes trials. optuna: TPE; random: Optuna's random sampler; the others "
        "need a package of that name.",
    )
    algorithm_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of Ray Tune's class for it, e.g. {n_initial_points: 5}.",
    )
    asha: AshaConfig = Field(default_factory=AshaConfig, description="Who stops losers early.")
    objective: str | None = Field(
        None,
        description="Name of the reward that judges the images; null: the first of rewards and "
        "evaluate.extra_rewards that took no part in filtering.",
    )
    search_prompts: int = Field(
        64, ge=2, description="Prompts that every trial draws at every rung, none of them trained."
    )
    final_prompts: int = Field(
        200, ge=2, description="Other prompts, for the re-run of the winner alone."
    )
    final_seeds: int = Field(
        3, ge=1, description="Seeds of the re-run, none of them used in the search."
    )
    final_share: float = Field(
        0.3, gt=0, lt=1, description="Share of the budget that is kept for the re-run."
    )
    safety: float = Field(
        1.3,
        ge=1,
        description="Times the longest measured time that is set aside before work starts; what is "
        "not used comes back.",
    )
    seed: int | None = Field(
        None, ge=0, description="Seed of proposals and of the trials' trainings; null: the run's."
    )
    keep_models: bool = Field(
        False, description="Keep the model of every trial; off: those of the re-run alone."
    )
