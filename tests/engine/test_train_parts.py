"""The pieces of a training without Ray: pairs, batches, gradients, optimiser, files."""

import json
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine.training_run import train_config, write_dataset
from models.tiny_pipelines import save_tiny_sd
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import ConfigError, ImagesConfig, LossConfig, OptimizerConfig
from fifa_ray.dpo.noising import pair_augmentation
from fifa_ray.engine.prefetch import Prefetcher
from fifa_ray.engine.train_batch import PairBatch, PairInputs, make_batch
from fifa_ray.engine.train_checkpoint import TrainState, load_checkpoint, save_checkpoint
from fifa_ray.engine.train_inputs import weightless_batch
from fifa_ray.engine.train_metrics import MetricLog, read_metrics
from fifa_ray.engine.train_optimizer import (
    AveragedWeights,
    build_optimizer,
    build_schedule,
    check_optimizer,
    learning_rate_factor,
)
from fifa_ray.engine.train_pairs import (
    PairTable,
    hold_out,
    in_deviations,
    read_trained_pairs,
    write_trained_pairs,
)
from fifa_ray.engine.train_readers import StreamedReader
from fifa_ray.engine.train_step import GradientStep, OutOfDeviceMemory, PairLoss
from fifa_ray.engine.train_storage import SNAPSHOT, mend_snapshot
from fifa_ray.engine.training_items import distinct_images
from fifa_ray.models.diffusion import build_diffusion_model
from fifa_ray.models.training_image import TrainingImage, flipped
from fifa_ray.run_dir import RunDir
from fifa_ray.sources import open_source


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_sd(tmp_path_factory.mktemp("parts") / "model")


@pytest.fixture
def model(base):
    return build_diffusion_model(str(base), resolution=16)


# Pairs


def test_whole_prompts_are_held_out_by_seed():
    prompt_id = np.random.default_rng(0).integers(-(2**62), 2**62, 40)[np.arange(200) // 5]
    held = hold_out(prompt_id, 12, seed=1)
    assert held.sum() == 15  # three prompts of five pairs
    assert len(np.unique(prompt_id[held])) == 3
    assert not np.isin(prompt_id[~held], prompt_id[held]).any()
    assert np.array_equal(held, hold_out(prompt_id, 12, seed=1))
    assert not np.array_equal(held, hold_out(prompt_id, 12, seed=2))
    assert not hold_out(prompt_id, 0, seed=1).any()
    # More pairs of the same prompts change no prompt's side.
    more = hold_out(np.concatenate([prompt_id, prompt_id]), 24, seed=1)
    assert np.array_equal(more[:200], held)


def test_margins_are_in_standard_deviations_and_unknown_ones_are_nothing():
    scaled = in_deviations(np.array([1.0, -1.0, np.nan, 3.0], np.float32))
    assert np.std(scaled[[0, 1, 3]]) == pytest.approx(1)
    assert scaled[2] == 0
    assert in_deviations(np.full(3, np.nan, np.float32)).tolist() == [0, 0, 0]


def test_pairs_of_a_training_are_written_with_their_split(tmp_path):
    run = RunDir(str(tmp_path))
    count = 6
    table = pa.table(
        {
            "pair_id": np.arange(count) * 10,
            "prompt_id": np.array([1, 1, 2, 2, 3, 3]),
            "chosen_item": np.arange(count) * 2,
            "rejected_item": np.arange(count) * 2 + 1,
            "prompt_item": np.array([20, 20, 21, 21, 22, 22]),
            "reward_margin": np.arange(count).astype(np.float32),
            "rank": np.arange(count),
            "group": np.zeros(count, np.int64),
        },
        schema=schema.TRAINING_PAIRS,
    )
    counts = write_trained_pairs(run, "training/x", table, validation_pairs=1, seed=0)
    assert counts == {"train": 4, "validation": 2}
    learned, held = (read_trained_pairs(run, "training/x", s) for s in ("train", "validation"))
    assert sorted([*learned.pair_id, *held.pair_id]) == [0, 10, 20, 30, 40, 50]
    assert not set(learned.prompt_id) & set(held.prompt_id)
    assert np.array_equal(learned.image_items[:, 1], learned.image_items[:, 0] + 1)
    assert np.array_equal(learned.prompt_item, learned.prompt_id + 19)
    with pytest.raises(ConfigError, match=r"lower train.validation_pairs"):
        write_trained_pairs(run, "training/x", table, validation_pairs=6, seed=0)


def test_images_are_the_same_by_uid_or_by_place():
    rows = pa.table(
        {
            "pair_id": [1, 2, 3, 4],
            "prompt_id": [0, 0, 0, 0],
            "source_file": ["a", "a", "b", "b"],
            "source_group": [0, 0, 0, 0],
            "source_row": [0, 1, 0, 0],
            "chosen_ref": ["x", "x", "x", "x"],
            "rejected_ref": ["y", "y", "y", "z"],
            "chosen_uid": ["one", "two", "one", None],
            "rejected_uid": ["two", None, None, None],
        }
    )
    image_of, images = distinct_images(rows)
    assert image_of.tolist() == [[0, 1], [1, 2], [0, 3], [4, 5]]
    assert images.column("source_file").to_pylist() == ["a", "a", "a", "b", "b", "b"]
    assert images.column("ref").to_pylist() == ["x", "y", "y", "y", "x", "z"]
    assert images.column("source_row").to_pylist() == [0, 0, 1, 0, 0, 0]


# Batches


def batch_of(model, positions, seed=0) -> PairBatch:
    """Pairs whose posteriors and prompts depend on their position alone."""
    shape = model.latent_shape
    draws = [torch.Generator().manual_seed(int(p)) for p in positions]
    mean = torch.stack([torch.randn(2, *shape, generator=g) for g in draws]).transpose(0, 1)
    conditioning = model.encode_prompts([f"prompt {p}" for p in positions])
    inputs = PairInputs(
        mean=mean.flatten(0, 1),
        std=torch.full((2 * len(positions), *shape), 0.1),
        pixels=None,
        conditioning=conditioning,
        reward_margin=torch.zeros(len(positions)),
        usable=range(len(positions)),
        bad=(),
    )
    return make_batch(inputs, positions, model, seed)


def test_what_is_random_about_a_pair_does_not_depend_on_its_batch(model):
    together = batch_of(model, [5, 6, 7])
    halves = together.halves()
    assert [len(half) for half in halves] == [1, 2]
    for half, positions in zip(halves, ([5], [6, 7]), strict=True):
        alone = batch_of(model, positions)
        for name in ("mean", "noise", "posterior_noise", "timesteps"):
            assert torch.equal(getattr(half, name), getattr(alone, name)), name
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(batch_of(model, [5], seed=1).noise[0], together.noise[0])
    # The two images of a pair draw from their posteriors independently.
    assert not torch.equal(together.posterior_noise[0], together.posterior_noise[3])


def test_both_images_of_a_pair_get_one_noise_timestep_crop_and_flip(model, monkeypatch):
    seen = {}

    def watched(latents, noise, timesteps):
        seen["noise"], seen["timesteps"] = noise, timesteps
        return type(model).add_noise(model, latents, noise, timesteps)

    monkeypatch.setattr(model, "add_noise", watched)
    PairLoss(model, LossConfig()).errors(model.denoiser, batch_of(model, [1, 2, 3]))
    for name in ("noise", "timesteps"):
        chosen, rejected = seen[name].chunk(2)
        assert torch.equal(chosen, rejected)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 37, 3), np.uint8))
    transform = TrainingImage(16, random_crop=True)
    views = []
    for position in range(30):
        augmentation = pair_augmentation(0, position, random_flip=True, prompt_dropout=0)
        chosen, rejected = (transform(image, augmentation) for _ in range(2))
        assert np.array_equal(chosen, rejected)
        views.append(chosen.tobytes())
    assert len(set(views)) > 10
    middle = transform(image)
    assert middle.shape == (3, 16, 16)
    assert np.array_equal(flipped(flipped(middle)), middle)


# Gradients


def gradients_of(model, batches, weight, size=8):
    step = GradientStep(
        PairLoss(model, LossConfig(dpo_beta=10.0)),
        model.denoiser,
        torch.amp.GradScaler("cpu", enabled=False),
        size,
    )
    metrics = step.run(batches, weight)
    return [p.grad.clone() for p in model.denoiser.parameters()], metrics, step


def test_a_steps_gradient_is_that_of_the_mean_however_it_is_split(model):
    positions = [0, 1, 2, 3, 4]
    with torch.no_grad():  # away from the reference, where every gradient is alike
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    whole, expected, _ = gradients_of(model, [batch_of(model, positions)], 1 / 5)
    parts = [batch_of(model, [0]), batch_of(model, [1, 2, 3]), batch_of(model, [4])]
    for batches, size in ((parts, 8), ([batch_of(model, positions)], 2)):
        found, metrics, _ = gradients_of(model, batches, 1 / 5, size)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-6)
        for gradient, other in zip(found, whole, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)
    assert float(expected["pair_weight"]) == pytest.approx(1)


def test_out_of_memory_halves_the_batch_and_begins_the_step_again(model, monkeypatch):
    batch = batch_of(model, [0, 1, 2, 3])
    first = batch_of(model, [4])
    whole, _, _ = gradients_of(model, [first, batch], 1 / 5)
    errors = PairLoss.errors

    def limited(self, denoiser, pairs):
        if len(pairs) > 1:
            raise torch.cuda.OutOfMemoryError("does not fit")
        return errors(self, denoiser, pairs)

    monkeypatch.setattr(PairLoss, "errors", limited)
    # The large batch is not the last one: the others are not waiting for it yet.
    found, _, step = gradients_of(model, [batch, first], 1 / 5)
    assert step.batch_size == 1
    for gradient, other in zip(found, whole, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-4)
    with pytest.raises(OutOfDeviceMemory, match=r"train\.gradient_checkpointing=true"):
        gradients_of(model, [batch], 1 / 4)
    _, _, step = rehearsed(model, batch)
    assert step.batch_size == 1
    monkeypatch.setattr(PairLoss, "errors", raise_out_of_memory)
    with pytest.raises(OutOfDeviceMemory, match="with 1 pairs at once"):
        rehearsed(model, batch)


def raise_out_of_memory(self, denoiser, pairs):
    raise torch.cuda.OutOfMemoryError("does not fit")


def rehearsed(model, batch):
    step = GradientStep(
        PairLoss(model, LossConfig()),
        model.denoiser,
        torch.amp.GradScaler("cpu", enabled=False),
        len(batch),
    )
    step.rehearse(batch)
    assert all(p.grad is None for p in model.denoiser.parameters())
    return None, None, step


def test_a_worker_without_a_pair_of_its_own_adds_nothing(model):
    gradients, metrics, _ = gradients_of(model, [weightless_batch(model)], 0.0)
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    assert all(float(value) == 0 for value in metrics.values())


# Optimiser


def test_learning_rates_warm_up_and_decay():
    settings = OptimizerConfig(warmup_steps=4, schedule="linear")
    factors = [learning_rate_factor(step, settings, 12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == 0.5
    assert factors[12] == 0
    cosine = settings.model_copy(update={"schedule": "cosine"})
    assert learning_rate_factor(8, cosine, 12) == pytest.approx(0.5)
    assert learning_rate_factor(100, OptimizerConfig(), 12) == 1


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_checkpoint_puts_everything_back(base, tmp_path, kind):
    settings = train_config(
        tmp_path, base, optimizer={"kind": kind, "warmup_steps": 10, "learning_rate": 1e-3}
    ).train

    def fresh():
        model = build_diffusion_model(str(base), resolution=16)
        named = dict(model.denoiser.named_parameters())
        optimizer = build_optimizer(list(named.values()), settings.optimizer, 1e-3)
        return model, optimizer, AveragedWeights(named, 0.9)

    def advance(model, optimizer, averaged, first, last):
        schedule = build_schedule(optimizer, settings, first)
        for step in range(first, last):
            for index, parameter in enumerate(model.denoiser.parameters()):
                noise = torch.Generator().manual_seed(step * 1000 + index)
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            optimizer.step()
            schedule.step()
            averaged.update()
        return schedule.get_last_lr()

    whole = fresh()
    rates = advance(*whole, 0, 5)
    first = fresh()
    advance(*first, 0, 3)
    state = TrainState(step=3, best_accuracy=0.7, best_step=2, totals={"loss": 0.1}, seconds=1.5)
    save_checkpoint(tmp_path, state, *first)
    second = fresh()
    assert load_checkpoint(tmp_path, *second) == state
    assert advance(*second, 3, 5) == rates
    for own, other in zip(
        whole[0].trainable_state().values(), second[0].trainable_state().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=0)
    for name, average in whole[2].averages.items():
        torch.testing.assert_close(average, second[2].averages[name], rtol=0, atol=0)
    before = next(iter(second[0].trainable_state().values())).clone()
    with second[2].swapped_in():
        inside = next(iter(second[0].trainable_state().values()))
        assert not torch.equal(inside, before)
    assert torch.equal(next(iter(second[0].trainable_state().values())), before)


def test_eight_bit_adam_says_what_it_needs():
    settings = OptimizerConfig(kind="adamw_8bit")
    with pytest.raises(RuntimeError, match="needs GPUs; use adamw"):
        build_optimizer([torch.zeros(2)], settings, 1e-3)
    if find_spec("bitsandbytes") is None:
        with pytest.raises(RuntimeError, match="pip install bitsandbytes"):
            check_optimizer(settings, on_gpu=True)
    check_optimizer(OptimizerConfig(), on_gpu=False)


# Readers


def test_the_streamed_reader_answers_any_order_and_names_bad_images(base, tmp_path):
    data = write_dataset(tmp_path / "data", 9, corrupt=(2,))
    config = train_config(tmp_path, base)
    rows = pq.read_table(data / "pairs.parquet")
    model = build_diffusion_model(str(base), resolution=16)
    texts = sorted({*rows.column("prompt").to_pylist(), ""})
    items = pa.Table.from_pylist(
        [
            {
                "item_id": 2 * row + side,
                "source_file": "pairs.parquet",
                "source_group": row // 4,
                "source_row": row,
                "ref": ("chosen", "rejected")[side],
                "prompt_id": 0,
            }
            for row in range(9)
            for side in (0, 1)
        ]
        + [{"item_id": 18 + i, "prompt": text, "prompt_id": i} for i, text in enumerate(texts)],
        schema=schema.TRAINING_ITEMS,
    )
    item_of = {text: 18 + i for i, text in enumerate(texts)}
    pairs = PairTable(
        pair_id=np.arange(9),
        prompt_id=np.zeros(9, np.int64),
        image_items=np.arange(18).reshape(9, 2),
        prompt_item=np.array([item_of[p] for p in rows.column("prompt").to_pylist()]),
        reward_margin=np.arange(9, dtype=np.float32),
        group=np.arange(9) // 4,
    )
    for max_bytes in (10**9, 1000):  # the second one keeps a single image
        reader = StreamedReader(
            open_source(config.ingest, ImagesConfig()),
            items,
            pairs,
            item_of[""],
            model,
            TrainingImage(16),
            ImagesConfig(),
            max_bytes=max_bytes,
        )
        order = np.array([8, 2, 0, 5])
        dropped = pair_augmentation(0, 0, random_flip=False, prompt_dropout=0.999999)
        found = reader.read(order, [None, None, None, dropped])
        assert list(found.usable) == [0, 2, 3]
        assert found.bad == [(1, "corrupt_image")]
        assert found.pixels.shape == (6, 3, 16, 16)
        assert found.reward_margin.tolist() == [8, 0, 5]
        expected = model.encode_prompts([rows.column("prompt")[8].as_py(), "a red cat", ""])
        torch.testing.assert_close(found.conditioning["text"], expected["text"])
        nothing = reader.read(np.array([2]), [None])
        assert not nothing.usable


def test_items_are_made_ahead_and_errors_come_in_their_place():
    def items():
        yield 1
        yield 2
        raise ValueError("the third one")

    made = Prefetcher(items(), depth=1)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="the third one"):
        next(made)
    endless = Prefetcher(iter(range(10**9)), depth=2)
    assert next(endless) == 0
    endless.close()
    assert not endless.thread.is_alive()


# Files


def line(step, kind="train"):
    return {"kind": kind, "optimizer_step": step, "loss": 1.0 / step}


def test_lines_of_an_attempt_that_died_are_dropped(tmp_path):
    run = RunDir(str(tmp_path))
    log = MetricLog(run, "training/x", 0, [])
    for step in range(1, 6):
        log.log(line(step))
    log.close()
    assert [entry["optimizer_step"] for entry in read_metrics(run, "training/x")] == [1, 2, 3, 4, 5]
    resumed = MetricLog(run, "training/x", 3, [])
    resumed.log(line(4) | {"gradient_norm": float("inf")})
    resumed.close()
    assert read_metrics(run, "training/x")[-1]["gradient_norm"] is None
    assert [entry["optimizer_step"] for entry in read_metrics(run, "training/x")] == [1, 2, 3, 4]
    assert len(list((tmp_path / "training" / "x" / "tensorboard").iterdir())) == 1


def checkpoint(run, name, whole=True):
    run.write_text("x" * 10, "training/x/checkpoints", name, "weights.safetensors")
    sizes = {"weights.safetensors": 10 if whole else 11}
    run.write_text(json.dumps({"sizes": sizes}), "training/x/checkpoints", name, "state.json")


def snapshot(run, names):
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    text = json.dumps(
        {
            "checkpoint_results": results,
            "latest_checkpoint_result": results[-1] if results else None,
        }
    )
    run.write_text(text, "training/x/checkpoints", SNAPSHOT)


def test_a_good_note_is_left_alone_and_unnamed_checkpoints_go(tmp_path):
    run = RunDir(str(tmp_path))
    assert mend_snapshot(run, "training/x") is None
    for name in ("step-1", "step-2", "step-3"):
        checkpoint(run, name)
    snapshot(run, ["step-1", "step-2"])
    assert mend_snapshot(run, "training/x") is None
    assert run.exists("training/x/checkpoints", SNAPSHOT)
    assert run.exists("training/x/checkpoints/step-2")
    assert not run.exists("training/x/checkpoints/step-3")


@pytest.mark.parametrize("broken", ["{", "{}", None])
def test_a_broken_note_is_replaced_by_the_newest_whole_checkpoint(tmp_path, broken):
    run = RunDir(str(tmp_path))
    checkpoint(run, "step-1")
    checkpoint(run, "step-2")
    checkpoint(run, "step-3", whole=False)
    if broken is None:
        snapshot(run, ["step-1", "step-9"])  # names one that is gone
    else:
        run.write_text(broken, "training/x/checkpoints", SNAPSHOT)
    assert mend_snapshot(run, "training/x") == run.path("training/x/checkpoints/step-2")
    assert not run.exists("training/x/checkpoints", SNAPSHOT)
