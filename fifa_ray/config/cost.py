"""Settings of what a run may cost: prices, the shape of the cluster, and rates to plan with."""

from typing import Self

from pydantic import Field, model_validator

from fifa_ray.config.sections import NAME_PATTERN, Section
from fifa_ray.config.suggestions import suggest

# First words of the names of stages.
STAGES = (
    "pairs", "rewards", "quality", "embeddings", "neighbors", "selected", "latents", "training",
    "evaluation",
)  # fmt: skip


class NodeGroup(Section):
    """Nodes of one kind. A group's name is its label `ray.io/node-group` in the cluster."""

    name: str = Field(pattern=NAME_PATTERN, description="Name of the group in the cluster.")
    max_nodes: int = Field(1, ge=1, description="Nodes that the group may grow to.")
    cpus: float = Field(gt=0, description="CPU cores of a node.")
    gpus: float = Field(0.0, ge=0, description="GPUs of a node.")
    memory_gb: float | None = Field(
        None, gt=0, description="Memory of a node, GB; null: not checked."
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="Price of a node for an hour, in `currency`; null: not known."
    )
    spot: bool = Field(
        False, description="The provider may take such nodes back: marked in plan and report."
    )
    stages: tuple[str, ...] | None = Field(
        None,
        description="Stages that run here, by name or first word (rewards/pickscore, rewards); a "
        "stage takes the first group that lists it and has room for its workers, and of the others "
        "that list it the cores for decoding. null: all. []: none, but its nodes are paid for "
        "throughout (the head).",
    )
    overhead_seconds: float = Field(
        0.0,
        ge=0,
        description="Seconds that a node is paid for without work each time it joins: start and "
        "idling before it is taken away.",
    )

    @model_validator(mode="after")
    def _known_stages(self) -> Self:
        for stage in self.stages or ():
            word = stage.partition("/")[0]
            if word not in STAGES:
                hint = suggest(word, STAGES) or f"; there are {', '.join(STAGES)}"
                raise ValueError(f"group {self.name} lists the unknown stage {stage!r}{hint}")
        return self


class PricesConfig(Section):
    """A price list and a cluster's shape: inline as cost.prices, or a YAML file of these keys."""

    currency: str = Field("USD", min_length=1, max_length=8, description="Of all prices.")
    storage_per_gb_month: float | None = Field(
        None, ge=0, description="Price of a GB stored for a month; null: not known."
    )
    groups: tuple[NodeGroup, ...] = Field(min_length=1, description="Node groups; order counts.")

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"names of groups must differ, got {names}")
        return self


class CostConfig(Section):
    """What `fifa plan` reckons with; no stage depends on it."""

    prices: PricesConfig | None = Field(
        None, description="Node groups and their prices; null: those of prices_file."
    )
    prices_file: str | None = Field(
        None,
        description="YAML file with currency, storage_per_gb_month and groups; null: no prices, "
        "and the cluster as it is now.",
    )
    storage_months: float = Field(1.0, ge=0, description="Months that the run's tables are kept.")
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="Rates that are known and not measured, by stage: rows a second of one actor "
        "(rewards/NAME pairs; quality, embeddings prompts; latents images and prompts; "
        "evaluation/images, evaluation/rewards/NAME images), of one worker (training pairs) or of "
        "one core (pairs, selected pairs; neighbors prompts, where there are 60,000).",
    )
    start_seconds: float = Field(
        60.0, ge=0, description="Start-up of each stage whose rate is given: actors and models."
    )
    num_pairs: int | None = Field(
        None, ge=1, description="Pairs of the dataset, where they need no counting; null: count."
    )
    num_prompts: int | None = Field(
        None, ge=1, description="Distinct prompts, where they are known; null: count or estimate."
    )
    sample_pairs: int = Field(
        512, ge=64, description="Source rows, spread over the dataset, that every stage measures."
    )
    sample_prompts: int = Field(
        256, ge=8, description="Distinct prompts, at least, that judge and text encoder measure."
    )
    sample_rows: int = Field(
        50_000,
        ge=64,
        description="Source rows, spread likewise, whose metadata alone is read: for the number "
        "of distinct prompts.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prices is not None and self.prices_file is not None:
            raise ValueError("set either prices or prices_file")
        wrong = {stage: rate for stage, rate in self.rates.items() if not rate > 0}
        if wrong:
            raise ValueError(f"rates are rows a second, above 0, got {wrong}")
        return self
