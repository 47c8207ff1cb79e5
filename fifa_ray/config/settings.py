"""A whole configuration: every setting with its unit, range, default and meaning."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fifa_ray.config.cost import CostConfig
from fifa_ray.config.dataset import ImagesConfig, IngestConfig
from fifa_ray.config.evaluation import EvaluateConfig
from fifa_ray.config.scorers import EmbedConfig, JudgeConfig, NeighborsConfig, RewardConfig
from fifa_ray.config.sections import Section
from fifa_ray.config.training import TrainConfig
from fifa_ray.config.tuning import TuneConfig

Strategy = Literal["fifa", "random", "margin_only", "quality_only", "diversity_only"]


class SelectConfig(Section):
    """Hard filters, the importance score and the choice of the K pairs."""

    selection_size: int = Field(5000, ge=1, description="K: pairs to keep.")
    strategy: Strategy = Field("fifa", description="fifa, or a baseline by the same code path.")
    selector: Literal["top_k", "greedy"] = Field(
        "top_k", description="top_k by importance, or greedy for the set-level objective."
    )
    greedy_pool: float = Field(
        20.0, ge=1, description="Candidates of greedy: the best pool x K pairs by importance."
    )
    standardization: Literal["zscore", "rank", "none"] = Field(
        "zscore", description="How terms are made comparable; none is the paper's raw sum."
    )
    margin_weight: float = Field(1.0, ge=0, description="Weight of the reward margin.")
    quality_weight: float = Field(0.5, ge=0, description="Weight of the prompt quality (assumed).")
    diversity_weight: float = Field(
        0.5, ge=0, description="Weight of the log neighbour distance (assumed)."
    )
    margin_rule: Literal["signed", "absolute", "clipped"] = Field(
        "signed", description="signed: contradicting the people scores low; clipped: to a band."
    )
    margin_clip: tuple[float, float] = Field(
        (-2.0, 2.0), description="Band of the clipped rule, in standard deviations of the margin."
    )
    min_quality: float | None = Field(
        None, ge=0, le=10, description="Prompts rated below are dropped (0..10); null: no floor."
    )
    exclude_harmful: bool = Field(True, description="Drop pairs whose prompt is flagged harmful.")
    quality_error_policy: Literal["drop", "neutral"] = Field(
        "drop", description="Pairs whose prompt has no rating: drop them, or give the mean."
    )
    max_pairs_per_prompt: int | None = Field(
        None, ge=1, description="At most this many pairs of one prompt; null: no limit."
    )
    images: bool = Field(True, description="Fetch both images of each kept pair into the table.")
    column_names: Literal["fifa", "pickapic"] = Field(
        "fifa", description="pickapic adds Pick-a-Pic v2's columns, for other trainers."
    )
    compare: tuple[Strategy, ...] = Field(
        ("random", "margin_only", "quality_only", "diversity_only"),
        description="Baselines of the same size, kept beside the selection for the report.",
    )

    @model_validator(mode="after")
    def _band(self) -> "SelectConfig":
        if self.margin_clip[0] >= self.margin_clip[1]:
            raise ValueError(f"margin_clip {self.margin_clip} must be (low, high) with low < high")
        return self


class ReportConfig(Section):
    """The HTML page."""

    enabled: bool = Field(True, description="Write report.html at the end of a run.")
    gallery_size: int = Field(12, ge=0, le=200, description="Pairs in each gallery.")
    map_points: int = Field(3000, ge=0, description="Prompts on the map; a sample beyond.")


class RayConfig(Section):
    """Which Ray cluster does the work."""

    address: str | None = Field(
        None, description="Cluster address; null: RAY_ADDRESS, else a local one is started."
    )
    num_cpus: int | None = Field(None, ge=1, description="Cores of a local cluster; null: all.")
    object_store_memory: int | None = Field(
        None, ge=80_000_000, description="Object store of a local cluster in bytes; null: Ray's."
    )
    runtime_env: dict[str, Any] | None = Field(None, description="runtime_env of the whole job.")
    wait_seconds: float = Field(
        3600.0,
        ge=0,
        description="Longest wait of a stage for nodes that the cluster can add, or for room on "
        "those it has, seconds.",
    )


class FifaConfig(Section):
    """A whole run."""

    run_dir: str = Field(description="Folder or URI of the run: every table and the report.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    max_quarantine_fraction: float = Field(
        0.2, ge=0, le=1, description="A stage that puts aside a larger share of its rows stops."
    )
    ingest: IngestConfig
    images: ImagesConfig = Field(default_factory=ImagesConfig)
    rewards: tuple[RewardConfig, ...] = Field((RewardConfig(),), min_length=1)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    neighbors: NeighborsConfig = Field(default_factory=NeighborsConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    cost: CostConfig = Field(default_factory=CostConfig)

    @model_validator(mode="after")
    def _judge_or_no_quality(self) -> "FifaConfig":
        needs_judge = [
            f"select.{name}={off}"
            for name, off, used in (
                ("quality_weight", "0", self.select.quality_weight > 0),
                ("exclude_harmful", "false", self.select.exclude_harmful),
                ("min_quality", "null", self.select.min_quality is not None),
            )
            if used
        ]
        if not self.judge.enabled and needs_judge:
            raise ValueError(
                "with judge.enabled=false there is no quality and no harmful flag: "
                f"also set {' '.join(needs_judge)}"
            )
        return self

    @model_validator(mode="after")
    def _unique_rewards(self) -> "FifaConfig":
        names = [reward.name for reward in (*self.rewards, *self.evaluate.extra_rewards)]
        if len(set(names)) < len(names):
            raise ValueError(f"reward names must differ, got {names}")
        return self
