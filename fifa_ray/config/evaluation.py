"""Settings of the evaluation: images of base and tuned models, scored and compared."""

from typing import Literal

from pydantic import Field

from fifa_ray.config.scorers import RewardConfig
from fifa_ray.config.sections import ActorsConfig, Section
from fifa_ray.config.training import Precision


class EvaluateConfig(Section):
    """Draw the same prompts with the same seeds by several models, and count who wins."""

    trainings: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="What to compare with the base and with each other: names of this run's "
        "trainings, and folders or URIs of others' (RUN/training/NAME, a pipeline or LoRA folder), "
        "as LABEL=FOLDER to name them; null: train.name.",
    )
    prompts: str = Field(
        "held_out",
        description="held_out (prompts of the dataset that no selection and no evaluated training "
        "has), general (a packaged list with categories), or a file: .txt with a prompt a line, "
        ".jsonl, .json, .csv, .tsv or .parquet with a column prompt and, where there is one, "
        "category.",
    )
    num_prompts: int | None = Field(
        200, ge=1, description="At most this many prompts, a seeded sample; null: all."
    )
    images_per_prompt: int = Field(1, ge=1, description="Images, that is seeds, per prompt.")
    rewards: tuple[str, ...] | None = Field(
        None,
        description="Names of rewards and extra_rewards that score the images; null: all. May be "
        "empty where scorers are given in Python.",
    )
    extra_rewards: tuple[RewardConfig, ...] = Field(
        (), description="Reward models that take no part in filtering: independent judges."
    )
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps of the sampler.")
    guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance.")
    resolution: int | None = Field(
        None, ge=8, description="Side of the images, pixels; null: train.resolution."
    )
    batch_size: int = Field(4, ge=1, description="Images drawn at once by one actor.")
    precision: Precision = Field(
        "auto", description="Compute type; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the intervals.")
    num_resamples: int = Field(
        2000, ge=100, description="Bootstrap resamples, of prompts, for the intervals."
    )
    image_format: Literal["png", "jpeg"] = Field("png", description="How images are kept.")
    gallery_size: int = Field(8, ge=0, description="Prompts shown side by side in the report.")
    actors: ActorsConfig = Field(
        default_factory=ActorsConfig, description="Actor pool that draws the images."
    )
