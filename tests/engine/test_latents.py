"""The latent cache: every distinct image and prompt encoded once, bad ones put aside, reused."""

import contextlib

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from engine.training_run import PROMPTS, prepare_run, train_config
from models.tiny_pipelines import save_tiny_sd

from fifa_ray.engine.latents import (
    EncodeItems,
    LatentLayout,
    pack_conditioning,
    run_latents,
    unpack_conditioning,
)
from fifa_ray.engine.train_model import describe_model, load_model, pixel_tensor
from fifa_ray.engine.train_pairs import PairTable
from fifa_ray.engine.train_readers import CachedReader
from fifa_ray.engine.training_data import prepare_training_data
from fifa_ray.models.training_image import TrainingImage, flipped
from fifa_ray.sources.images import decode_image

NUM_PAIRS = 11


@pytest.fixture(scope="module")
def cached(ray_session, tmp_path_factory):
    """A run, its configuration, its training data and its cache; row 4's rejected image is bad."""
    folder = tmp_path_factory.mktemp("latents")
    config = train_config(folder, save_tiny_sd(folder / "model"), data="pairs")
    run = prepare_run(folder, config, NUM_PAIRS, corrupt=(4,))
    data = prepare_training_data(run, config)
    return run, config, data, run_latents(run, config, data, describe_model(config.train))


def pixels_of(data, run) -> dict[int, np.ndarray]:
    """Decoded, cropped images by item_id, read straight from the source."""
    items = run.read_table(data.stage, "items")
    images = items.filter(pc.is_null(items.column("prompt")))
    transform, found = TrainingImage(16), {}
    for row in images.to_pylist():
        requests = items.slice(row["item_id"], 1).select(["source_row", "ref"])
        for batch in data.source.read_images(row["source_file"], row["source_group"], requests):
            with contextlib.suppress(ValueError):
                image = decode_image(batch.to_pylist()[0]["image"], 10**6)
                found[row["item_id"]] = transform(image)
    return found


def test_each_distinct_image_is_there_once_and_the_bad_one_is_quarantined(cached):
    run, _, data, cache = cached
    # 22 sides; three pairs share their chosen image with the pair before. Five prompts, and none.
    assert cache.rows_in == 19 + 6
    assert cache.rows_out == 18 + 6
    assert cache.quarantined == {"corrupt_image": 1}
    table = run.read_table(cache.stage)
    ids = table.column("item_id").to_pylist()
    assert len(set(ids)) == len(ids) == 24
    assert table.column("mean").null_count == 6
    bad = run.read_table("quarantine", cache.stage).to_pylist()
    assert [(row["reason"], row["source_row"]) for row in bad] == [("corrupt_image", 4)]
    pairs = run.read_table(data.stage, "pairs").to_pandas()
    assert pairs.loc[4, "rejected_item"] not in ids
    assert pairs.loc[1, "chosen_item"] == pairs.loc[2, "chosen_item"]
    items = run.read_table(data.stage, "items").to_pandas()
    texts = items.set_index("item_id")["prompt"]
    assert texts[data.manifest.details["empty_prompt_item"]] == ""
    assert texts[pairs["prompt_item"]].tolist() == [PROMPTS[i % 5] for i in range(11)]


def test_latents_are_the_models_own_and_mirrored_ones_those_of_the_mirror_image(cached):
    run, config, data, cache = cached
    model = load_model(config.train, "cpu", parts="encoders")
    layout = LatentLayout.of(cache)
    assert layout.latent_shape == tuple(model.latent_shape) == (4, 8, 8)
    pixels = pixels_of(data, run)
    rows = run.read_table(cache.stage).to_pylist()
    images = [row for row in rows if row["mean"] is not None]
    assert {row["item_id"] for row in images} == set(pixels)
    for row in images[:4]:
        image = pixels[row["item_id"]]
        for prefix, view in (("", image), ("flipped_", flipped(image))):
            mean, std = model.encode_images(pixel_tensor([view], "cpu"))
            for name, expected in (("mean", mean), ("std", std)):
                found = layout.array(row[prefix + name])
                np.testing.assert_allclose(found, expected[0].numpy(), rtol=2e-3, atol=2e-3)
        mirrored = layout.array(row["mean"])[:, :, ::-1]
        assert np.abs(mirrored - layout.array(row["flipped_mean"])).max() > 0.01
    texts = run.read_table(data.stage, "items").column("prompt").to_pylist()
    for row in rows[len(images) :]:
        expected = model.encode_prompts([texts[row["item_id"]]])
        found = unpack_conditioning(row["conditioning"])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.float(), expected[name][0], rtol=2e-3, atol=2e-3)


def test_the_same_inputs_find_their_latents_whatever_the_denoiser(cached):
    run, config, data, cache = cached
    weights = describe_model(config.train)
    other = {**weights, "sha256": {**weights["sha256"], "unet/x.safetensors": "another"}}
    assert run_latents(run, config, data, other) == cache


def test_rows_are_read_in_any_order_with_little_memory(cached):
    run, _, data, cache = cached
    table = run.read_table(data.stage, "pairs").to_pandas().drop(index=4)
    pairs = PairTable(
        table["pair_id"].to_numpy(),
        table["prompt_id"].to_numpy(),
        table[["chosen_item", "rejected_item"]].to_numpy(),
        table["prompt_item"].to_numpy(),
        np.zeros(len(table), np.float32),
        table["group"].to_numpy(),
    )
    layout = LatentLayout.of(cache)

    def reader(max_bytes: int) -> CachedReader:
        empty = data.manifest.details["empty_prompt_item"]
        return CachedReader(run, cache.stage, layout, pairs, empty, flips=True, max_bytes=max_bytes)

    order = np.random.default_rng(0).permutation(len(pairs))
    roomy, tight = reader(10**9), reader(3000)
    everything = roomy.read(order, [None] * len(order))
    assert roomy.memory.num_bytes > 20_000
    for at, pair in enumerate(order):
        alone = tight.read(np.array([pair]), [None])
        assert tight.memory.num_bytes < 5000
        both = [at, at + len(order)]  # chosen ones first, then the rejected
        torch.testing.assert_close(alone.mean, everything.mean[both], rtol=0, atol=0)
        torch.testing.assert_close(alone.std, everything.std[both], rtol=0, atol=0)
    with pytest.raises(KeyError, match="no row 9999"):
        roomy.rows.read(9999)


def test_a_value_that_half_precision_cannot_hold_is_an_error_with_the_remedy():
    tensors = {"text": torch.tensor([1e6]), "mask": torch.tensor([1, 0])}
    with pytest.raises(ValueError, match=r"train\.cache_dtype=float32"):
        pack_conditioning(tensors, torch.float16)
    packed = unpack_conditioning(pack_conditioning(tensors, torch.float32))
    assert packed["text"].item() == 1e6
    assert packed["mask"].dtype == torch.int64


def test_a_latent_that_is_not_finite_is_put_aside(cached, tmp_path):
    run, config, data, _ = cached
    encoder = EncodeItems(data.source, config.images, config.train, "cpu", run)
    with torch.no_grad():
        next(encoder.model.pipeline.vae.quant_conv.parameters()).fill_(float("nan"))
    images = run.read_table(data.stage, "items", "part-000000.parquet").slice(0, 2)
    blocks = [block.to_pydict() for block in encoder(images)]
    assert [reason for block in blocks for reason in block["error"]] == ["nan_latents"] * 2
    assert [value for block in blocks for value in block["mean"]] == [None, None]
