"""Settings of fine-tuning: the model, the loss, the optimiser, the loop and its checkpoints."""

from typing import Literal

from pydantic import Field, model_validator

from fifa_ray.config.sections import NAME_PATTERN, ActorsConfig, Section

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class LoraConfig(Section):
    """Low-rank adapters: the base weights stay frozen and are the reference."""

    rank: int = Field(8, ge=1, description="Rank of each adapter's matrices.")
    alpha: float | None = Field(
        None, gt=0, description="Scale numerator of the adapters; null: the rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the adapters.")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Module name endings that get one; null: the family's attention layers."
    )


class LossConfig(Section):
    """The preference loss over one pair's denoising errors."""

    kind: Literal["dpo", "ipo", "margin_weighted", "sft"] = Field(
        "dpo",
        description="dpo; ipo: squared distance to a target logit; margin_weighted: a pair pushes "
        "the harder the larger its reward margin; sft: denoise the chosen image alone.",
    )
    dpo_beta: float = Field(
        2500.0,
        gt=0,
        description="Strength of the tie to the reference, on errors averaged over an image's "
        "values and without a half: the original script's 5000.",
    )
    anchor_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen image's own policy error, added to the loss: keeps both "
        "errors from growing together; 0: off.",
    )


class OptimizerConfig(Section):
    """How gradients change the weights. Steps are optimizer steps, whatever the worker count."""

    kind: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw", description="adamw_8bit needs the package bitsandbytes and a GPU."
    )
    learning_rate: float = Field(1e-5, gt=0, description="Learning rate as it is, never scaled.")
    scale_lr: bool = Field(
        False,
        description="Multiply the learning rate by global_batch_size, as the original launchers "
        "do; only to repeat their runs.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Moment decays of AdamW.")
    eps: float = Field(1e-8, gt=0, description="Denominator's floor of AdamW.")
    weight_decay: float = Field(1e-2, ge=0, description="Decoupled weight decay.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After the warm-up: constant, or decay to 0 at the last step."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are clipped to this norm; null: never."
    )


class TrainConfig(Section):
    """Diffusion-DPO on the selected pairs, or on another table of pairs."""

    name: str = Field(
        "dpo", pattern=NAME_PATTERN, description="Name of this training: training/<name>/."
    )
    data: str = Field(
        "selected",
        pattern=r"^(selected|pairs|baselines/[a-z0-9_]+)$",
        description="Pairs to learn from: selected, baselines/<strategy>, or pairs (the whole "
        "dataset).",
    )
    max_pairs: int | None = Field(
        None, ge=1, description="Only this many pairs, the best ranked or the first; null: all."
    )
    model: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="Hub name or local folder of a diffusers pipeline: SD 1.x, 2.x, SDXL, SD3 or "
        "FLUX.",
    )
    revision: str | None = Field(None, description="Hub commit of the model.")
    variant: str | None = Field(None, description="Hub variant of the weights, e.g. fp16.")
    lora: LoraConfig | None = Field(
        None, description="Train low-rank adapters; null: all weights of the denoiser."
    )
    loss: LossConfig = Field(default_factory=LossConfig, description="The preference loss.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimiser.")
    resolution: int = Field(512, ge=8, description="Side of the square training images, pixels.")
    random_crop: bool = Field(
        False, description="Crop at random, both images of a pair alike; off: the centre."
    )
    random_flip: bool = Field(
        True, description="Mirror half of the pairs, both images of a pair alike."
    )
    prompt_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of pairs that train the empty prompt instead."
    )
    cache_latents: bool = Field(
        True,
        description="Encode images and prompts once into latents/; off: on the fly, at each step.",
    )
    cache_dtype: Literal["float16", "float32"] = Field(
        "float16", description="Type of the cached latents and prompt embeddings."
    )
    loader_memory: int = Field(
        2_000_000_000,
        ge=1_000_000,
        description="Bytes of latents or images that a worker keeps to read them once.",
    )
    max_steps: int = Field(2000, ge=1, description="Optimizer steps.")
    global_batch_size: int = Field(
        64, ge=1, description="Pairs per optimizer step over all workers."
    )
    per_device_batch_size: int = Field(
        1, ge=1, description="Pairs per forward pass of one worker; the rest is accumulated."
    )
    num_workers: int = Field(1, ge=1, description="Workers, one device each.")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="Elastic: go on with as few as this many workers when nodes leave; null: "
        "exactly num_workers.",
    )
    num_cpus_per_worker: float = Field(
        1.0, gt=0, description="CPU cores of a worker, also its torch threads on CPUs."
    )
    use_gpu: bool | None = Field(
        None, description="One GPU per worker; null: where the cluster has or can add GPUs."
    )
    label_selector: dict[str, str] | None = Field(
        None,
        description="Labels of the nodes that may hold workers, e.g. {fifa-ray/work: train}; null: "
        "any node that has the resources.",
    )
    precision: Precision = Field(
        "auto", description="Compute type; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Decay of the averaged weights that are saved; null: none."
    )
    validation_pairs: int = Field(
        0, ge=0, description="Pairs held out, by whole prompts, to measure implicit accuracy."
    )
    validation_every: int = Field(100, ge=1, description="Optimizer steps between validations.")
    validation_draws: int = Field(
        4, ge=1, description="Noises and timesteps per held-out pair, the same at each validation."
    )
    early_stop_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many validations without a better implicit accuracy; null: "
        "never.",
    )
    sample_prompts: tuple[str, ...] = Field(
        (), description="Prompts whose images are drawn every validation_every, same seeds."
    )
    checkpoint_every: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept, and the best.")
    max_failures: int = Field(
        3, ge=-1, description="Worker failures survived from the newest checkpoint; -1: any number."
    )
    log_every: int = Field(10, ge=1, description="Optimizer steps between lines of metrics.")
    loggers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="Where metrics also go; TensorBoard files are always written."
    )
    seed: int | None = Field(
        None, ge=0, description="Seed of order, noise and adapters; null: the run's."
    )
    cache_actors: ActorsConfig = Field(
        default_factory=ActorsConfig, description="Actor pool of the latent cache."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.global_batch_size < self.num_workers:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is below num_workers "
                f"{self.num_workers}: every worker needs a pair at each step"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is above num_workers {self.num_workers}"
            )
        if self.early_stop_patience is not None and not self.validation_pairs:
            raise ValueError("early_stop_patience needs held-out pairs: set validation_pairs")
        if self.random_crop and self.cache_latents:
            raise ValueError("random_crop needs cache_latents=false: a cached image has one crop")
        return self
