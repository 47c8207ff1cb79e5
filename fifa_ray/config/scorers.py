"""Settings of what scores a pair: reward models, the judge, the text encoder, its neighbours."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from fifa_ray.config.sections import NAME_PATTERN, ActorsConfig, Section
from fifa_ray.config.suggestions import explain_options


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
    max_outage_seconds: float = Field(
        600.0,
        ge=0,
        description="How long prompts wait for an endpoint that answers nothing at all; then the "
        "run stops, and the same command goes on.",
    )
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
        if self.engine == "vllm" and self.actors.label_selector:
            raise ValueError(
                "engine vllm places its actors by resources alone: set actors.num_gpus and leave "
                "out actors.label_selector"
            )
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
