"""evaluation/prompts/ -> evaluation/images/<model>/: every image drawn once by a pool of actors.

Each block of the stage is one batch of the generator, so a killed driver costs the batches in
flight. A model's images depend on its own weights, the prompts and the sampler alone: evaluating
another model draws nothing of this one again.
"""

import io
import json
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import EvaluateConfig, FifaConfig
from fifa_ray.engine.cluster import actor_pool, gpus_per_actor
from fifa_ray.engine.evaluate_models import EvaluatedModel
from fifa_ray.engine.map_stage import (
    MapStage,
    first_by_key,
    partial_folder,
    quarantine_rows,
    run_map_stage,
)
from fifa_ray.models.image_generator import ImageGenerator, Sampling
from fifa_ray.run_dir import Manifest, RunDir, fingerprint

if TYPE_CHECKING:
    import ray.data

PROMPTS = "evaluation/prompts"
JPEG_QUALITY = 95
_PARTIAL = pa.schema(
    [
        pa.field("image_id", pa.int64()),
        pa.field("image", pa.binary()),
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def images_stage(model: EvaluatedModel) -> str:
    """Name of the stage and folder of a model's images."""
    return f"evaluation/images/{model.name}"


def run_images(run: RunDir, config: FifaConfig, model: EvaluatedModel, resolution: int) -> Manifest:
    """Draw the images of `evaluation/prompts/` with one model, or those that are left.

    Raises RuntimeError when more images fail than `max_quarantine_fraction` allows.
    """
    settings = config.evaluate
    prompts = run.manifest(PROMPTS)
    assert prompts is not None
    sampling = Sampling(resolution, settings.num_inference_steps, settings.guidance_scale)
    name = images_stage(model)
    stage = MapStage(
        name=name,
        fingerprint=fingerprint(
            name, prompts.fingerprint, model.identity, asdict(sampling), settings.precision,
            settings.image_format,
        ),
        input_table=PROMPTS,
        key="image_id",
        input_columns=("image_id", "prompt", "image_seed"),
        partial_schema=_PARTIAL,
        assemble=AssembleImages(name, model.name),
        rows_per_item=settings.batch_size,
        # The same batches again after a crash: the last bits of an image depend on its batch.
        whole_items=True,
    )  # fmt: skip
    pool: dict[str, Any] = {}
    info = partial_folder(run, stage)

    def transform(rows: "ray.data.Dataset") -> "ray.data.Dataset":
        pool.update(actor_pool(settings.actors))
        device = "cuda" if gpus_per_actor(settings.actors) else "cpu"
        return rows.map_batches(
            DrawImages,
            fn_constructor_args=(model, sampling, settings, device, info),
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )

    def details() -> dict[str, Any]:
        found = json.loads(info.read_text("model.json")) if info.exists("model.json") else {}
        return {"model": found, "kind": model.kind, "source": model.source}

    return run_map_stage(
        run,
        stage,
        transform,
        config=settings.model_dump(mode="json"),
        max_quarantine_fraction=config.max_quarantine_fraction,
        details=details,
        pool=pool,
    )


class DrawImages:
    """(image_id, prompt, image_seed) -> partial rows with encoded images."""

    def __init__(
        self,
        model: EvaluatedModel,
        sampling: Sampling,
        settings: EvaluateConfig,
        device: str,
        info: RunDir,
    ) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(max(1, int(settings.actors.num_cpus)))
        self.image_format = settings.image_format
        # Lives as long as the actor: loaded weights may be mapped from there.
        self.copies = tempfile.TemporaryDirectory(prefix="evaluated-model-")
        self.generator = ImageGenerator(
            model.weights(self.copies.name),
            sampling,
            device=device,
            precision=settings.precision,
            batch_size=settings.batch_size,
        )
        info.write_text(json.dumps(self.generator.info, default=str), "model.json")

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One batch to its partial rows."""
        drawings = self.generator.draw(
            rows.column("prompt").to_pylist(), rows.column("image_seed").to_pylist()
        )
        images = [
            None if drawing.pixels is None else encode_image(drawing.pixels, self.image_format)
            for drawing in drawings
        ]
        return pa.table(
            [
                rows.column("image_id"),
                images,
                [drawing.error for drawing in drawings],
                [drawing.detail for drawing in drawings],
            ],
            schema=_PARTIAL,
        )


def encode_image(pixels: np.ndarray, image_format: str) -> bytes:
    """A uint8 (height, width, 3) array as PNG, or as JPEG of high quality."""
    stream = io.BytesIO()
    options = {"quality": JPEG_QUALITY, "subsampling": 0} if image_format == "jpeg" else {}
    Image.fromarray(pixels).save(stream, image_format.upper(), **options)
    return stream.getvalue()


@dataclass(frozen=True)
class AssembleImages:
    """Partial rows -> EVALUATION_IMAGES; images that could not be drawn go to quarantine."""

    stage: str
    model: str

    def __call__(self, rows: pa.Table, answers: pa.Table) -> tuple[pa.Table, pa.Table]:
        found = in_order(self.stage, rows, answers)
        bad = pc.is_valid(found.column("error"))
        drawn = rows.append_column("model", pa.array([self.model] * len(rows), pa.string()))
        drawn = drawn.append_column("image", found.column("image"))
        return (
            drawn.filter(pc.invert(bad)).select(schema.EVALUATION_IMAGES.names),
            failed_images(self.stage, rows.filter(bad), found.filter(bad)),
        )


def in_order(stage: str, rows: pa.Table, answers: pa.Table) -> pa.Table:
    """One answer for each row's image_id, in the rows' order. RuntimeError where one is missing."""
    found = first_by_key(answers, "image_id")
    if not np.array_equal(found.column("image_id").to_numpy(), rows.column("image_id").to_numpy()):
        raise RuntimeError(
            f"stage {stage}: {len(rows) - len(found):,} images have no answer; run the same "
            "command again to redo them"
        )
    return found


def failed_images(stage: str, rows: pa.Table, answers: pa.Table) -> pa.Table:
    """Quarantine rows of images whose answers have an error."""
    details = [
        f"image {image_id}: {detail or 'no detail'}"
        for image_id, detail in zip(
            rows.column("image_id").to_pylist(), answers.column("detail").to_pylist(), strict=True
        )
    ]
    return quarantine_rows(
        stage,
        answers.column("error"),
        detail=details,
        prompt_id=rows.column(schema.PROMPT_ID),
    )
