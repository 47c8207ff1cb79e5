"""prompts/ -> embeddings/: a unit vector for each distinct prompt, by a pool of encoders."""

import logging
from typing import Any

import pyarrow as pa
import ray
import ray.data

from fifa_ray import schema
from fifa_ray.config import EmbedConfig, FifaConfig
from fifa_ray.engine.cluster import actor_need, actor_pool, device_of, require_device
from fifa_ray.engine.nodes import wait_for_nodes
from fifa_ray.engine.prompt_stage import run_prompt_stage
from fifa_ray.models.text_encoder import TextEncoder, build_text_encoder
from fifa_ray.run_dir import Manifest, RunDir, fingerprint

logger = logging.getLogger(__name__)

STAGE = "embeddings"
# Rows of one block: enough to sort by length, so that a batch has texts of like length.
ROWS_PER_ITEM = 2048


def run_embed(run: RunDir, config: FifaConfig) -> Manifest:
    """Embed every distinct prompt, or those that are left; at once if the stage is complete.

    Raises ValueError before `prompts/` is complete, where the model cannot be loaded, and where it
    gives a prompt no direction (NaN or zero).
    """
    settings = config.embed
    prompts = run.manifest("prompts") or run.manifest("pairs")
    if prompts is None:
        raise ValueError(f"{run.uri} has no complete prompts/ table; run the ingest stage first")
    stage_fingerprint = fingerprint(
        STAGE,
        prompts.fingerprint,
        settings.model_dump(mode="json", exclude={"actors", "batch_size"}),
    )
    found = run.manifest(STAGE)
    if found is not None and found.fingerprint == stage_fingerprint:
        logger.info("%s: already complete, %s rows", STAGE, f"{found.rows_out:,}")
        return found
    info = _encoder_info(settings, config.ray.wait_seconds)
    pool: dict[str, Any] = {}

    def transform(rows: "ray.data.Dataset") -> "ray.data.Dataset":
        pool.update(actor_pool(STAGE, settings.actors, wait_seconds=config.ray.wait_seconds))
        return rows.map_batches(
            _Embed,
            fn_constructor_args=(settings, device_of(pool), info["dimension"]),
            batch_size=None,
            batch_format="pyarrow",
            **pool,
        )

    return run_prompt_stage(
        run,
        stage=STAGE,
        fingerprint=stage_fingerprint,
        transform=transform,
        output_schema=schema.embeddings_schema(info["dimension"]),
        config=settings.model_dump(mode="json"),
        details=lambda: {"encoder": info},
        pool=pool,
        rows_per_item=ROWS_PER_ITEM,
        # The last bits of a vector depend on its batch: each item is one, also when it is redone.
        whole_items=True,
    )


class _Embed:
    """(prompt_id, prompt) -> (prompt_id, embedding)."""

    def __init__(self, settings: EmbedConfig, device: str, dimension: int) -> None:
        self.encoder = _load(settings, device)
        self.schema = schema.embeddings_schema(dimension)

    def __call__(self, rows: pa.Table) -> pa.Table:
        vectors = self.encoder.encode(rows.column("prompt").to_pylist())
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return pa.table([rows.column(schema.PROMPT_ID), lists], schema=self.schema)


def _load(settings: EmbedConfig, device: str) -> TextEncoder:
    import torch

    require_device(device)
    torch.set_num_threads(max(1, int(settings.actors.num_cpus)))
    return build_text_encoder(
        settings.kind,
        settings.model,
        device=device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        trust_remote_code=settings.trust_remote_code,
    )


def _encoder_info(settings: EmbedConfig, wait_seconds: float) -> dict[str, Any]:
    """What a worker says of the model once it has loaded it: the driver loads no weights."""
    need = actor_need(settings.actors, wait_seconds=wait_seconds)
    wait_for_nodes(STAGE, need, wait_seconds=wait_seconds)
    gpus = need.resources.get("GPU", 0.0)
    task = _load_info.options(
        num_cpus=settings.actors.num_cpus,
        num_gpus=gpus,
        label_selector=settings.actors.label_selector,
        runtime_env=settings.actors.runtime_env,
    )
    try:
        info: dict[str, Any] = ray.get(task.remote(settings, "cuda" if gpus else "cpu"))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    return info


@ray.remote(max_calls=1)
def _load_info(settings: EmbedConfig, device: str) -> dict[str, Any]:
    return _load(settings, device).info
