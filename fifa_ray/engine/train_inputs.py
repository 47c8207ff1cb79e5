"""What a worker of a training is told, and the stream of batches it works through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from fifa_ray.config import ImagesConfig, TrainConfig
from fifa_ray.dpo.noising import PairAugmentation, pair_augmentation
from fifa_ray.engine.latents import LatentLayout
from fifa_ray.engine.train_batch import PairBatch, make_batch
from fifa_ray.engine.train_order import PairOrder, positions_of_step, split_batches
from fifa_ray.engine.train_pairs import PairTable
from fifa_ray.engine.train_readers import CachedReader, PairReader, StreamedReader
from fifa_ray.models.diffusion import DiffusionModel
from fifa_ray.models.training_image import TrainingImage
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import Source


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that a worker needs to know. Picklable; paths are absolute."""

    run: RunDir
    # training/<name>, and the fingerprint of this training.
    stage: str
    identity: str
    settings: TrainConfig
    images: ImagesConfig
    seed: int
    data_stage: str
    empty_prompt_item: int
    source: Source
    # latents/<key> and the form of its rows; None: images are encoded on the fly.
    latents: tuple[str, LatentLayout] | None
    # Denoising steps and guidance of validation's sample images.
    sampler: tuple[int, float]
    # A checkpoint from which a run without one of Ray's begins: its path on the run's filesystem.
    resume_from: str | None = None
    # Optimizer steps after which to stop for now, with a checkpoint; None: the last one.
    pause_at: int | None = None
    # Without Ray's workers a checkpoint is written only where the training pauses.
    keeps_own_checkpoints: bool = False
    # Asked before each step by the first worker; None: always.
    may_go_on: Callable[[], bool] | None = None


@dataclass(frozen=True)
class StepInputs:
    """One worker's part of one optimizer step."""

    batches: list[PairBatch]
    # Reason by pair_id of pairs that could not be read.
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        """Pairs that can be learned from."""
        return sum(len(batch) for batch in self.batches)


def open_reader(job: TrainJob, pairs: PairTable, model: DiffusionModel) -> PairReader:
    """The reader of these pairs that the job asks for."""
    settings = job.settings
    if job.latents is not None:
        folder, layout = job.latents
        return CachedReader(
            job.run,
            folder,
            layout,
            pairs,
            job.empty_prompt_item,
            flips=settings.random_flip,
            max_bytes=settings.loader_memory,
        )
    return StreamedReader(
        job.source,
        job.run.read_table(f"{job.data_stage}/items"),
        pairs,
        job.empty_prompt_item,
        model,
        TrainingImage(settings.resolution, settings.random_crop),
        job.images,
        max_bytes=settings.loader_memory,
    )


class PairStream:
    """Batches of one worker, step by step; equal inputs for any number of workers."""

    def __init__(
        self,
        job: TrainJob,
        pairs: PairTable,
        reader: PairReader,
        model: DiffusionModel,
        worker: int,
        num_workers: int,
    ) -> None:
        self.job, self.pairs, self.reader, self.model = job, pairs, reader, model
        self.worker, self.num_workers = worker, num_workers
        groups = None if job.latents is not None else _dense(pairs.group)
        self.order = PairOrder(len(pairs), job.seed, groups)

    def steps(self, first: int, last: int) -> Iterator[StepInputs]:
        """Inputs of the optimizer steps from `first` to before `last`."""
        for step in range(first, last):
            yield self.step(step)

    def step(self, step: int) -> StepInputs:
        """Inputs of one step; positions are shared out among the workers."""
        settings = self.job.settings
        positions = positions_of_step(
            step, settings.global_batch_size, self.worker, self.num_workers
        )
        pairs = self.order.pairs_at(positions)
        batches = []
        bad: dict[int, str] = {}
        for part in split_batches(len(positions), settings.per_device_batch_size):
            found = self._read(pairs[part], positions[part])
            batches += found.batches
            bad |= found.bad
        return StepInputs(batches, bad)

    def _read(self, pairs: np.ndarray, positions: np.ndarray) -> StepInputs:
        settings, seed = self.job.settings, self.job.seed
        at = [int(position) for position in positions]
        augmentations: list[PairAugmentation | None] = [
            pair_augmentation(
                seed,
                position,
                random_flip=settings.random_flip,
                prompt_dropout=settings.prompt_dropout,
            )
            for position in at
        ]
        inputs = self.reader.read(pairs, augmentations)
        bad = {int(self.pairs.pair_id[pairs[i]]): reason for i, reason in inputs.bad}
        if not inputs.usable:
            return StepInputs([], bad)
        batch = make_batch(inputs, at, self.model, seed)
        return StepInputs([batch.pinned(self.model.device)], bad)


def weightless_batch(model: DiffusionModel) -> PairBatch:
    """One made-up pair, to be given the weight 0 by a worker that has no pair of its own."""
    with torch.no_grad():
        conditioning = {name: t.detach().cpu() for name, t in model.encode_prompts([""]).items()}
    shape = model.latent_shape
    return PairBatch(
        mean=torch.zeros(2, *shape),
        std=torch.zeros(2, *shape),
        pixels=None,
        conditioning=conditioning,
        reward_margin=torch.zeros(1),
        noise=torch.zeros(1, *shape),
        posterior_noise=torch.zeros(2, *shape),
        timesteps=model.sample_timesteps(1, torch.Generator().manual_seed(0)),
    )


def _dense(groups: np.ndarray) -> np.ndarray:
    return np.unique(groups, return_inverse=True)[1].reshape(-1)
