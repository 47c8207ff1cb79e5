"""The sections of a configuration: every setting with its unit, range, default and meaning."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from fifa_ray.config.evaluation import EvaluateConfig
from fifa_ray.config.sections import NAME_PATTERN, ActorsConfig, Section
from fifa_ray.config.suggestions import explain_options
from fifa_ray.config.training import TrainConfig


class IngestConfig(Section):
    """Where the preference dataset is and how its rows become pairs."""

    source: str = Field(
        description="Folder, file or glob with the dataset: a local path or a URI (s3://, gs://, "
        "hf://datasets/OWNER/NAME, ...)."
    )
    format: Literal[
        "auto", "pickapic", "hpdv2", "hpdv3", "imagereward", "generic", "webdataset"
    ] = Field("auto", description="Layout of the dataset; auto recognises it by names and columns.")
    image_root: str | None = Field(
        None, description="Folder that image paths are relative to; null means the dataset's own."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="For the generic format: your column for each of prompt, chosen, rejected, "
        "chosen_uid, rejected_uid, source_id.",
    )
    max_prompt_chars: int = Field(
        2000, ge=1, description="Longer prompts are quarantined (characters)."
    )
    drop_duplicates: bool = Field(
        True, description="Quarantine a row that repeats another's prompt, images and choice."
    )
    max_pairs: int | None = Field(
        None, ge=1, description="Stop after about this many source rows; null reads everything."
    )
    rows_per_part: int = Field(
        100_000, ge=100, description="Source rows per part of pairs/: the unit of work and resume."
    )


class ImagesConfig(Section):
    """How images are fetched and decoded, and what is refused."""

    max_pixels: int = Field(
        64_000_000, ge=1, description="Larger images are quarantined before decoding (pixels)."
    )
    max_bytes: int = Field(
        64_000_000, ge=1, description="Larger files are quarantined before reading (bytes)."
    )
    allow_urls: bool = Field(
        False, description="Fetch images that are http(s) URLs; never from private addresses."
    )
    url_timeout_seconds: float = Field(10.0, gt=0, description="Time limit of one URL fetch.")


class FittedOptions(Section):
    """`options` of a reward of kind fitted."""

    folds: int = Field(5, ge=2, le=100, description="Folds of prompts for cross-fitting.")
    l2: float | None = Field(
        None, gt=0, description="Penalty on standardised weights; null: by inner cross-validation."
    )
    text: Literal["none", "cosine", "products"] = Field(
        "cosine",
        description="What the text tower of the encoder adds: its cosine with the image, or that "
        "and the elementwise products; encoders without one add nothing.",
    )
    revision: str | None = Field(None, description="Hub commit of the encoder.")

    @model_validator(mode="after")
    def _enough_folds(self) -> "FittedOptions":
        if self.l2 is None and self.folds < 3:
            raise ValueError("l2 is chosen on the folds that are left: set folds=3 or more, or l2")
        return self


class RewardConfig(Section):
    """One proxy reward model. Several may vote; each leaves its own table and columns."""

    name: str = Field(
        "pickscore", pattern=NAME_PATTERN, description="Name of the table rewards/<name>/."
    )
    kind: Literal[
        "pickscore",
        "hpsv2",
        "hpsv2.1",
        "clip_score",
        "aesthetic",
        "imagereward",
        "hpsv3",
        "fitted",
    ] = Field(
        "pickscore",
        description="Which authors' model and formula; fitted: Bradley-Terry on "
        "this dataset's own labels, cross-fitted by prompt.",
    )
    weights: str | None = Field(
        None,
        description="Hub name, local folder or file; null: the authors' hub name. For fitted: an "
        "image encoder's folder, null: image statistics.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute type; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    batch_size: int = Field(
        64, ge=1, description="Images per forward pass; halves itself when memory runs out."
    )
    vote_weight: float = Field(
        1.0, ge=0, description="Weight of this model's standardised margin in the average."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the weights.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Settings of this kind of model, see its adapter."
    )
    actors: ActorsConfig = Field(default_factory=ActorsConfig, description="Its actor pool.")

    @model_validator(mode="after")
    def _fitted_options(self) -> "RewardConfig":
        if self.kind == "fitted":
            try:
                FittedOptions.model_validate(self.options)
            except ValidationError as error:
                known = list(FittedOptions.model_fields)
                raise ValueError(explain_options(error, "fitted", known)) from None
        return self


class JudgeConfig(Section):
    """The LLM that rates each distinct prompt and flags harmful ones."""

    enabled: bool = Field(True, description="Off: no quality term and no harmful flag.")
    engine: Literal["vllm", "openai", "transformers"] = Field(
        "vllm",
        description="vllm: actors in the cluster; openai: any compatible endpoint; transformers: "
        "in process, for small models.",
    )
    model: str = Field(
        "Qwen/Qwen2.5-7B-Instruct",
        description="Hub name, local folder, or the endpoint's model name.",
    )
    endpoint: str | None = Field(
        None, description="Base URL of an OpenAI-compatible server, e.g. http://host:8000/v1."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the endpoint's key."
    )
    batch_size: int = Field(32, ge=1, description="Prompts per batch of one actor.")
    max_concurrency: int = Field(32, ge=1, description="Requests in flight to an endpoint.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Rate limit of an endpoint; null: none."
    )
    max_retries: int = Field(3, ge=0, description="Further tries after an unusable answer.")
    timeout_seconds: float = Field(60.0, gt=0, description="Time limit of one answer.")
    max_prompt_chars: int = Field(
        2000, ge=16, description="The judge reads at most this many characters of a prompt."
    )
    check_parts: bool = Field(
        True,
        description="Also judge each sentence, line, quoted and bracketed part of a prompt alone, "
        "and flag the prompt if one is harmful: no wrapping talks the judge out of it.",
    )
    harmful_threshold: float = Field(
        0.5, ge=0, le=1, description="Probability from which a prompt counts as harmful."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute type of vllm and transformers."
    )
    max_model_len: int | None = Field(
        None, ge=64, description="Context length in tokens; null: the model's."
    )
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the vLLM engine."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the engine, see models/judge.py."
    )
    cache_dir: str | None = Field(
        None,
        description="Folder or URI shared by runs where answers are kept by prompt, rubric and "
        "model; null: inside the run.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the weights.")
    actors: ActorsConfig = Field(default_factory=ActorsConfig, description="Its actor pool.")

    @model_validator(mode="after")
    def _endpoint(self) -> "JudgeConfig":
        if self.enabled and self.engine == "openai" and not self.endpoint:
            raise ValueError("engine openai needs an endpoint, e.g. http://localhost:8000/v1")
        return self


class EmbedConfig(Section):
    """The text encoder whose space measures the diversity of prompts."""

    kind: Literal["auto", "sentence_transformer", "clip"] = Field(
        "auto", description="auto: by the files in the folder."
    )
    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="Hub name or local folder."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute type; vectors are stored as float32."
    )
    batch_size: int = Field(128, ge=1, description="Prompts per forward pass.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the weights.")
    actors: ActorsConfig = Field(default_factory=ActorsConfig, description="Its actor pool.")


class NeighborsConfig(Section):
    """The k-th nearest neighbour distance of each distinct prompt."""

    num_neighbors: int = Field(
        5, ge=1, le=1024, description="k: other prompts counted, never the prompt itself."
    )
    method: Literal["auto", "exact", "approximate"] = Field(
        "auto", description="auto: exact below exact_below prompts."
    )
    exact_below: int = Field(50_000, ge=0, description="Prompts under which auto is exact.")
    num_lists: int | None = Field(
        None, ge=1, description="Cells of the coarse quantizer; null: about 8 sqrt(prompts)."
    )
    num_probes: int | None = Field(
        None, ge=1, description="Cells searched per query; null: raised until target_recall."
    )
    target_recall: float = Field(
        0.99, gt=0, le=1, description="Recall at k wanted of the approximate join, on a sample."
    )
    recall_sample: int = Field(
        1000, ge=10, description="Prompts whose neighbours are also searched exactly."
    )
    distance_floor: float = Field(
        1e-3, gt=0, description="Smallest distance before the logarithm: keeps duplicates finite."
    )
    num_gpus: float = Field(0.0, ge=0, description="GPUs per task; needs the gpu extra.")


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
    report: ReportConfig = Field(default_factory=ReportConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

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
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"reward names must differ, got {names}")
        return self
