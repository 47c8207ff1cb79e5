"""Every setting, typed once: the YAML files, the command line and the reference come from here.

A configuration is a YAML file (or the name of a packaged preset) plus dotted overrides such as
`select.selection_size=1000` or `rewards.0.batch_size=64`. Unknown keys are errors.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9_.-]*$"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and what to write instead."""


class Section(BaseModel):
    """A group of settings: immutable, and it refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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


class ActorsConfig(Section):
    """Size and resources of one stage's actor pool."""

    min_actors: int = Field(1, ge=1, description="Actors that the pool never goes below.")
    max_actors: int | None = Field(
        None, ge=1, description="Actors that the pool may grow to; null: as many as there is room."
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs per actor, fractions allowed; null: 1 where the cluster has a GPU, "
        "else 0.",
    )
    num_cpus: float = Field(1.0, gt=0, description="CPU cores per actor, also its torch threads.")
    runtime_env: dict[str, Any] | None = Field(
        None, description="Ray runtime_env of these actors alone, e.g. {pip: [...]}."
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ActorsConfig":
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


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
                raise ValueError(_explain_options(error, "fitted", known)) from None
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


def preset_names() -> list[str]:
    """Names of the packaged configurations."""
    folder = resources.files("fifa_ray") / "presets"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_config(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> FifaConfig:
    """Read a YAML file, a preset's name or a mapping, apply `a.b=value` overrides, check all.

    Raises ConfigError for a missing file, YAML that is not a mapping, and every bad key or value,
    each with its dotted place and, for an unknown key, the nearest known one.
    """
    given = config if isinstance(config, Mapping) else _read_yaml(str(config))
    values = copy.deepcopy(dict(given))
    for override in overrides:
        _apply_override(values, override)
    try:
        return FifaConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_config(config: BaseModel) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_fields(
    section: type[BaseModel] = FifaConfig, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every setting: the source of the reference."""
    for name, info in section.model_fields.items():
        inner = _section_of(info.annotation)
        place = f"{prefix}{name}"
        if inner is not None:
            many = inner is not info.annotation
            yield from describe_fields(inner, f"{place}.{'N.' if many else ''}")
            continue
        default = (
            "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        )
        kind = getattr(info.annotation, "__name__", None) or str(info.annotation)
        if not isinstance(info.annotation, type):
            kind = str(info.annotation).replace("typing.", "")
        yield place, kind, default, info.description or ""


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _read_yaml(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.is_file():
        text = path.read_text()
    elif name in preset_names():
        text = (resources.files("fifa_ray") / "presets" / f"{name}.yaml").read_text()
    else:
        raise ConfigError(
            f"no configuration file {name!r}, and no preset of that name; "
            f"presets: {', '.join(preset_names())}{_suggest(name, preset_names())}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold a mapping of settings, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must look like select.selection_size=1000")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of override {override!r} is not valid YAML: {error}"
        ) from None
    *path, last = key.split(".")
    here: Any = values
    for step in path:
        here = _descend(here, step, override)
    if isinstance(here, list):
        here[_list_index(here, last, override)] = value
    else:
        here[last] = value


def _descend(here: Any, step: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_list_index(here, step, override)]
    if step == "rewards":
        # The default is one reward model; an override of rewards.0.x refines it.
        here.setdefault(step, [{}])
    below = here.setdefault(step, {})
    if below is None:
        below = here[step] = {}
    if not isinstance(below, dict | list):
        raise ConfigError(f"override {override!r}: {step} is a value, not a group of settings")
    return below


def _list_index(here: list[Any], step: str, override: str) -> int:
    if not step.isdigit() or int(step) >= len(here):
        raise ConfigError(
            f"override {override!r}: expected an index from 0 to {len(here) - 1}, got {step!r}"
        )
    return int(step)


def _explain(error: ValidationError) -> str:
    lines = []
    problems = error.errors()
    for problem in problems:
        depth = len(problem["loc"])
        inside = (
            p for p in problems if len(p["loc"]) > depth and p["loc"][:depth] == problem["loc"]
        )
        if problem["type"] == "too_short" and any(inside):
            continue  # pydantic counts only good items; the bad ones are named on their own
        place = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            section = _section_at(problem["loc"][:-1])
            known = list(section.model_fields) if section else []
            hint = _suggest(str(problem["loc"][-1]), known, place.rpartition(".")[0])
            if not hint and known:
                hint = f"; known here: {', '.join(known)}"
            lines.append(f"unknown key {place}{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{place} is required: set it in the file or as {place}=VALUE")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            lines.append(f"{place or 'configuration'}: {message}{got}")
    return "\n".join(lines)


def _explain_options(error: ValidationError, kind: str, known: Sequence[str]) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = _suggest(name, known) or f"; known: {', '.join(known)}"
            lines.append(f"unknown option {name!r} of kind {kind}{hint}")
        else:
            lines.append(f"option {name}: {problem['msg']}, got {problem['input']!r}")
    return "; ".join(lines)


def _section_at(location: Sequence[int | str]) -> type[Section] | None:
    section: type[Section] | None = FifaConfig
    for step in location:
        if isinstance(step, int) or section is None:
            continue
        info = section.model_fields.get(step)
        section = _section_of(info.annotation) if info else None
    return section


def _suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""
