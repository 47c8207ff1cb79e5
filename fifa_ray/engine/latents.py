"""training_data/ -> latents/<key>/: every distinct image and prompt of a training encoded once.

    images  ─ read, decode, crop ─ VAE encoder  ─►  images/   posterior mean and std, mirrored too
    prompts ─ text encoders                     ─►  prompts/  the denoiser's conditioning

The posterior is kept rather than a draw from it, so that every step takes a fresh sample for
nothing. A mirrored image is encoded for itself: the encoder does not commute with mirroring. A row
is a row group of its own, so a worker reads any pair in any order. The key comes from weights,
resolution and data, so another training on the same of them finds its latents here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from fifa_ray import schema
from fifa_ray.config import FifaConfig, ImagesConfig, TrainConfig
from fifa_ray.engine.cluster import actor_pool, gpus_per_actor
from fifa_ray.engine.map_stage import (
    MapStage,
    first_by_key,
    partial_folder,
    quarantine_rows,
    run_map_stage,
)
from fifa_ray.engine.train_model import load_model, model_settings, pixel_tensor
from fifa_ray.engine.training_data import TrainingData
from fifa_ray.models.training_image import TrainingImage, flipped
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources import Source
from fifa_ray.sources.images import BadImage, decode_image

if TYPE_CHECKING:
    import torch

# Images of one read, rounded up to whole groups of the source, and of one encoder batch, which
# halves where it does not fit.
IMAGES_PER_ITEM = 256
IMAGES_PER_BATCH = 16
PROMPTS_PER_ITEM = 64

_IMAGE_COLUMNS = ("mean", "std", "flipped_mean", "flipped_std")
_PARTIAL_IMAGES = pa.schema([*schema.LATENT_IMAGES, pa.field("error", pa.string())])
_MODEL_FILE = "model.json"


@dataclass(frozen=True)
class LatentCache:
    """A complete `latents/<key>`."""

    images: Manifest
    prompts: Manifest

    @property
    def folder(self) -> str:
        """Folder of images/ and prompts/ in the run."""
        return self.images.stage.rpartition("/")[0]


def run_latents(
    run: RunDir, config: FifaConfig, data: TrainingData, weights: dict[str, Any]
) -> LatentCache:
    """Encode what `data` names, or the rest of it; at once if all is there already.

    `weights` identifies the model's files. Raises RuntimeError when more images are quarantined
    than `max_quarantine_fraction` allows.
    """
    settings = config.train
    identity = fingerprint(
        "latents",
        encoder_digests(weights),
        settings.resolution,
        settings.precision,
        settings.cache_dtype,
        settings.random_flip,
        data.fingerprint,
        config.images.model_dump(),
    )
    folder = f"latents/{data.stage.partition('/')[2].rpartition('-')[0]}-{identity[:12]}"
    device = "cuda" if gpus_per_actor(settings.cache_actors) else "cpu"
    images = _run_images(run, config, data, folder, identity, device)
    prompts = _run_prompts(run, config, data, folder, identity, device)
    return LatentCache(images, prompts)


def encoder_digests(weights: dict[str, Any]) -> dict[str, str]:
    """Digests of what encodes, so that models that share their encoders share their latents."""
    others = ("unet/", "transformer/", "scheduler/", "safety_checker/", "model_index.json")
    digests: dict[str, str] = weights["sha256"]
    return {name: digest for name, digest in digests.items() if not name.startswith(others)}


def _run_images(
    run: RunDir, config: FifaConfig, data: TrainingData, folder: str, identity: str, device: str
) -> Manifest:
    name = f"{folder}/images"
    stage = MapStage(
        name=name,
        fingerprint=fingerprint(name, identity),
        input_table=f"{data.stage}/images",
        key="image_id",
        input_columns=tuple(schema.TRAINING_IMAGES.names),
        partial_schema=_PARTIAL_IMAGES,
        assemble=AssembleImages(name),
        rows_per_item=IMAGES_PER_ITEM,
        boundary="source_group",
        row_group_size=1,
    )
    pool: dict[str, Any] = {}
    info = partial_folder(run, stage)

    def transform(rows: "ray.data.Dataset") -> "ray.data.Dataset":
        pool.update(actor_pool(config.train.cache_actors))
        return rows.map_batches(
            EncodeImages,
            fn_constructor_args=(data.source, config.images, config.train, device, info),
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )

    return run_map_stage(
        run,
        stage,
        transform,
        config=model_settings(config.train),
        max_quarantine_fraction=config.max_quarantine_fraction,
        details=lambda: json.loads(info.read_text(_MODEL_FILE)),
        pool=pool,
    )


def _run_prompts(
    run: RunDir, config: FifaConfig, data: TrainingData, folder: str, identity: str, device: str
) -> Manifest:
    name = f"{folder}/prompts"
    stage = MapStage(
        name=name,
        fingerprint=fingerprint(name, identity),
        input_table=f"{data.stage}/prompts",
        key=schema.PROMPT_ID,
        input_columns=tuple(schema.TRAINING_PROMPTS.names),
        partial_schema=schema.LATENT_PROMPTS,
        assemble=AssemblePrompts(name),
        rows_per_item=PROMPTS_PER_ITEM,
        row_group_size=1,
    )
    pool: dict[str, Any] = {}

    def transform(rows: "ray.data.Dataset") -> "ray.data.Dataset":
        pool.update(actor_pool(config.train.cache_actors))
        return rows.map_batches(
            EncodePrompts,
            fn_constructor_args=(config.train, device),
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )

    return run_map_stage(
        run,
        stage,
        transform,
        config=model_settings(config.train),
        max_quarantine_fraction=0.0,
        pool=pool,
    )


class _Encoder:
    """A model in an actor."""

    def __init__(self, settings: TrainConfig, device: str) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(max(1, int(settings.cache_actors.num_cpus)))
        self.settings, self.device = settings, device
        self.dtype = torch.float16 if settings.cache_dtype == "float16" else torch.float32
        self.model = load_model(settings, device, parts="encoders")


class EncodeImages(_Encoder):
    """Rows of images/ -> their posteriors, or the reason why an image cannot be used."""

    def __init__(
        self,
        source: Source,
        images: ImagesConfig,
        settings: TrainConfig,
        device: str,
        info: RunDir,
    ) -> None:
        from fifa_ray.models.batching import LargestBatch

        super().__init__(settings, device)
        self.source, self.images = source, images
        self.transform = TrainingImage(settings.resolution)
        self.batches = LargestBatch(IMAGES_PER_BATCH, "images")
        described = {
            "family": self.model.family,
            "latent_shape": list(self.model.latent_shape),
            "dtype": settings.cache_dtype,
            "flips": settings.random_flip,
        }
        info.write_text(json.dumps(described), _MODEL_FILE)

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Blocks of partial rows, one for each batch that the source reads."""
        for place, of_place in _by_place(rows):
            ids = of_place.column("image_id").to_numpy()
            requests = of_place.select(["source_row", "ref"])
            for batch in self.source.read_images(*place, requests):
                yield self._encode_batch(ids, batch.to_pylist())

    def _encode_batch(self, ids: np.ndarray, answers: list[dict[str, Any]]) -> pa.Table:
        good: list[np.ndarray] = []
        good_ids: list[int] = []
        bad: list[tuple[int, str]] = []
        for answer in answers:
            image_id = int(ids[answer["request"]])
            try:
                good.append(self._pixels(answer["image"], answer["error"]))
                good_ids.append(image_id)
            except BadImage as error:
                bad.append((image_id, error.reason))
        encoded = self._encode(good) if good else np.empty((0, 4, 0), np.float16)
        finite = [bool(np.isfinite(values).all()) for values in encoded]
        columns: dict[str, Any] = {"image_id": [*good_ids, *(image_id for image_id, _ in bad)]}
        for index, name in enumerate(_IMAGE_COLUMNS):
            values = [
                row[index].tobytes() if ok and index < len(row) else None
                for row, ok in zip(encoded, finite, strict=True)
            ]
            columns[name] = [*values, *[None] * len(bad)]
        columns["error"] = [None if ok else "nan_latents" for ok in finite] + [r for _, r in bad]
        return pa.table(columns, schema=_PARTIAL_IMAGES)

    def _pixels(self, data: bytes | None, error: str | None) -> np.ndarray:
        if data is None or error:
            raise BadImage(error or "missing_image", "")
        return self.transform(decode_image(data, self.images.max_pixels))

    def _encode(self, images: list[np.ndarray]) -> np.ndarray:
        """(N, 2 or 4, values): mean and std, then those of the mirrored image."""
        import torch

        def forward(batch: "Any") -> "torch.Tensor":
            mean, std = self.model.encode_images(pixel_tensor(list(batch), self.model.device))
            return torch.stack([mean.flatten(1), std.flatten(1)], 1).to(self.dtype).cpu()

        views = images + ([flipped(image) for image in images] if self.settings.random_flip else [])
        with torch.inference_mode():
            encoded = torch.cat(self.batches.run(views, forward))
        count = len(images)
        parts = [encoded[start : start + count] for start in range(0, len(views), count)]
        return np.asarray(torch.cat(parts, 1).numpy())


class EncodePrompts(_Encoder):
    """Rows of prompts/ -> their conditioning, each as the bytes of a safetensors file."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One block of prompts to one of results."""
        import torch

        with torch.inference_mode():
            found = self.model.encode_prompts(rows.column("prompt").to_pylist())
        packed = [
            pack_conditioning({name: values[i] for name, values in found.items()}, self.dtype)
            for i in range(len(rows))
        ]
        columns = [rows.column(schema.PROMPT_ID), pa.array(packed, pa.binary())]
        return pa.table(columns, schema=schema.LATENT_PROMPTS)


def pack_conditioning(tensors: "dict[str, torch.Tensor]", dtype: "torch.dtype") -> bytes:
    """One prompt's tensors as safetensors, floating ones in `dtype`.

    Raises ValueError where a value does not fit into the type.
    """
    from safetensors.torch import save

    cast = {
        name: (t.to(dtype) if t.is_floating_point() else t).cpu().contiguous()
        for name, t in tensors.items()
    }
    for name, tensor in cast.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"the prompt's {name} does not fit into {str(dtype).removeprefix('torch.')} (or "
                "is not finite to begin with); set train.cache_dtype=float32"
            )
    return bytes(save(cast))


def unpack_conditioning(data: bytes) -> "dict[str, torch.Tensor]":
    """What `pack_conditioning` packed, in its stored types, on the CPU."""
    from safetensors.torch import load

    return dict(load(data))


@dataclass(frozen=True)
class LatentLayout:
    """How the bytes of `latents/<key>/images/` become tensors."""

    latent_shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(manifest: Manifest) -> "LatentLayout":
        """The layout that a stage's manifest states."""
        return LatentLayout(tuple(manifest.details["latent_shape"]), manifest.details["dtype"])

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def array(self, data: bytes) -> np.ndarray:
        """float32 latent_shape."""
        values = np.frombuffer(data, self.numpy_dtype).reshape(self.latent_shape)
        return values.astype(np.float32)


@dataclass(frozen=True)
class AssembleImages:
    """Partial rows -> rows of images/; a bad image goes to quarantine with its reason."""

    stage: str

    def __call__(self, images: pa.Table, answers: pa.Table) -> tuple[pa.Table, pa.Table]:
        rows = first_by_key(answers, "image_id")
        bad = pc.is_valid(rows.column("error"))
        ids = rows.filter(bad).column("image_id").to_numpy()
        first = int(images.column("image_id")[0].as_py()) if len(images) else 0
        of_image = images.take(ids - first)
        quarantined = quarantine_rows(
            self.stage,
            rows.filter(bad).column("error").to_pylist(),
            detail=of_image.column("ref"),
            pair_id=of_image.column(schema.PAIR_ID),
            prompt_id=of_image.column(schema.PROMPT_ID),
            source_file=of_image.column("source_file"),
            source_row=of_image.column("source_row"),
        )
        good = rows.filter(pc.invert(bad)).select(schema.LATENT_IMAGES.names)
        return good.cast(schema.LATENT_IMAGES), quarantined


@dataclass(frozen=True)
class AssemblePrompts:
    """Partial rows -> rows of prompts/."""

    stage: str

    def __call__(self, prompts: pa.Table, answers: pa.Table) -> tuple[pa.Table, pa.Table]:
        rows = first_by_key(answers, schema.PROMPT_ID)
        return rows.cast(schema.LATENT_PROMPTS), quarantine_rows(self.stage, [])


def _by_place(rows: pa.Table) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """((source_file, source_group), its rows), in order of appearance."""
    files = rows.column("source_file").to_pylist()
    groups = rows.column("source_group").to_pylist()
    at: dict[tuple[str, int], list[int]] = {}
    for index, place in enumerate(zip(files, groups, strict=True)):
        at.setdefault(place, []).append(index)
    for place, indices in at.items():
        yield place, rows.take(indices)
