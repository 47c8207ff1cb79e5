"""A small run that is ready to be trained on: dataset, pairs/, prompts/, selected/, a baseline."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import FifaConfig, load_config
from fifa_ray.engine.ingest import run_ingest
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name

PROMPTS = ["a red cat", "two blue dogs in the rain", "a piano", "a green boat", "the house"]


def picture(rng: np.random.Generator, brightness: int, width: int = 24, height: int = 20) -> bytes:
    """A noisy PNG, no square, so that resizing and cropping matter."""
    pixels = rng.integers(0, 120, (height, width, 3)) + brightness
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_dataset(
    folder: Path, num_pairs: int, *, shared_every: int = 3, corrupt: tuple[int, ...] = ()
) -> Path:
    """Generic parquet; every third pair shares its chosen image with the pair before.

    `corrupt`: rows whose rejected image is cut short.
    """
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_pairs):
        chosen, rejected = picture(rng, 120), picture(rng, 0)
        chosen_uid = f"chosen-{index}"
        if index % shared_every == shared_every - 1:
            chosen, chosen_uid = rows[-1]["chosen"], rows[-1]["chosen_uid"]
        if index in corrupt:
            rejected = rejected[: len(rejected) // 2]
        rows.append(
            {
                "prompt": PROMPTS[index % len(PROMPTS)],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_uid": chosen_uid,
                "rejected_uid": f"rejected-{index}",
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=4)
    return folder


def train_config(folder: Path, model: Path, *overrides: str, **train: object) -> FifaConfig:
    """A configuration of a tiny training in `folder`."""
    values = {
        "run_dir": str(folder / "run"),
        "ingest": {"source": str(folder / "data")},
        "evaluate": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "train": {
            "model": str(model),
            "resolution": 16,
            "precision": "float32",
            "global_batch_size": 4,
            "per_device_batch_size": 2,
            "max_steps": 4,
            "log_every": 1,
            "cache_actors": {"max_actors": 1},
            "optimizer": {"learning_rate": 1e-3},
            "loss": {"dpo_beta": 50.0},
            **train,
        },
    }
    return load_config(values, overrides)


def prepare_run(folder: Path, config: FifaConfig, num_pairs: int, **dataset: object) -> RunDir:
    """Dataset and ingest, and a selection of all pairs in shuffled ranks, with images."""
    write_dataset(folder / "data", num_pairs, **dataset)
    run = RunDir(config.run_dir)
    run_ingest(run, config)
    write_selection(run, folder / "data")
    return run


def write_selection(run: RunDir, data: Path) -> None:
    """selected/ with images in two parts, and baselines/random without."""
    pairs = run.read_table("pairs").combine_chunks()
    count = len(pairs)
    order = np.random.default_rng(1).permutation(count)
    taken = pairs.take(order)
    texts = run.read_table("prompts", columns=["prompt_id", "prompt"])
    text_of = dict(zip(*(column.to_pylist() for column in texts.columns), strict=True))
    ids = taken.column("prompt_id").to_pylist()
    nothing = np.zeros(count)
    columns = {
        "prompt": [text_of[i] for i in ids],
        "rank": np.arange(1, count + 1),
        "importance_score": nothing,
        "reward_margin": np.linspace(2, -1, count),
        **{name: nothing for name in ("prompt_quality", "log_kth_neighbor_distance")},
        **{name: nothing for name in ("margin_term", "quality_term", "diversity_term")},
        "source_file": taken.column("source_file").cast(pa.string()),
    }
    table = pa.table(
        [
            pa.array(columns[f.name], f.type)
            if isinstance(columns.get(f.name), list | np.ndarray)
            else columns.get(f.name)
            if f.name in columns
            else taken.column(f.name).cast(f.type)
            for f in schema.SELECTED_TERMS
        ],
        schema=pa.schema(schema.SELECTED_TERMS),
    )
    run.write_table(table.slice(0, count - 1), "baselines", "random", part_name(0))
    images = pq.read_table(data / "pairs.parquet").take(taken.column("source_row"))
    for side in ("chosen", "rejected"):
        table = table.append_column(f"{side}_image", images.column(side))
    half = count // 2
    run.write_table(table.slice(0, half), "selected", part_name(0), row_group_size=3)
    run.write_table(table.slice(half), "selected", part_name(1), row_group_size=3)
    run.publish(
        Manifest(
            stage="selected",
            fingerprint=fingerprint("selected", count),
            rows_in=count,
            rows_out=count,
            config={"strategy": "fifa", "selection_size": count, "margin_weight": 1.0},
        )
    )
