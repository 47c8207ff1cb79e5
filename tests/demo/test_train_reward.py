"""The tiny reward model: its tokenizer, its losses, its training, and the weights that ship."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from fifa_ray.demo.clip_tokenizer import train_tokenizer
from fifa_ray.demo.labelled_pairs import LabelledPairs, read_labelled_pairs
from fifa_ray.demo.prompts import prompt_catalogue
from fifa_ray.demo.reward_card import RewardMeasures, measure_reward_model
from fifa_ray.demo.run import REWARD_WEIGHTS
from fifa_ray.demo.train_reward import (
    batches,
    build_model,
    losses,
    normalized,
    save,
    spread_features,
    train,
)
from fifa_ray.demo.world import generate_world
from fifa_ray.models.reward import build_image_transform, build_reward_model

# Floors for the shipped weights on the world below; the model card has what was measured.
TRUTH_ACCURACY, LABEL_RIGHT_AUC, TOP_TENTH = 0.64, 0.68, 0.92
PROMPTS = [prompt.text for prompt in prompt_catalogue(400, seed=1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are no faster on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of a seed that neither training nor the demo uses."""
    folder = tmp_path_factory.mktemp("held_out")
    generate_world(folder, num_pairs=1_500, num_prompts=300, seed=4, num_files=2, num_processes=1)
    return folder


@pytest.fixture(scope="module")
def measures(world: Path) -> RewardMeasures:
    return measure_reward_model(REWARD_WEIGHTS, world)


def test_labelled_pairs_leave_out_what_cannot_be_learnt_from(world: Path) -> None:
    pairs = read_labelled_pairs(world)
    rows = {}
    for row in pq.read_table(world / "data").to_pylist():
        rows[row["ranking_id"]] = row
    truth = {
        row["ranking_id"]: row for row in pq.read_table(world / "truth/pairs.parquet").to_pylist()
    }
    usable = {
        ranking
        for ranking, row in rows.items()
        if row["has_label"]
        and row["caption"].strip()
        and "corrupted" not in truth[ranking]["defects_0"] + truth[ranking]["defects_1"]
    }
    assert len(usable) < len(rows)
    assert set(pairs.ranking_id.tolist()) == usable
    at = len(usable) // 2
    row = rows[int(pairs.ranking_id[at])]
    assert pairs.prompts[pairs.prompt[at]] == row["caption"].strip()
    assert pairs.label_0[at] == row["label_0"]
    picture = np.asarray(Image.open(io.BytesIO(row["jpg_1"])))
    assert np.array_equal(pairs.pixels[pairs.image[at, 1]], picture.transpose(2, 0, 1))


def test_the_tokenizer_knows_common_words_and_loses_nothing_of_others() -> None:
    tokenizer = train_tokenizer(PROMPTS, vocabulary_size=1_200)
    ids = tokenizer("a red balloon").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 5  # one token a word
    strange = "zxq ümläut 漢字 ~~ 🎈"
    assert tokenizer.unk_token_id not in tokenizer(strange).input_ids[1:-1]
    assert tokenizer.decode(tokenizer("Two RED kites").input_ids[1:-1]) == "two red kites"


def test_losses_equal_the_formulas_written_out() -> None:
    rng = np.random.default_rng(0)
    cosine = rng.uniform(-1, 1, (5, 3))
    image = np.array([[0, 1], [2, 1], [3, 4]])
    prompt, label_0 = np.array([2, 2, 0]), np.array([1.0, 0.5, 0.0])
    expected = []
    for (first, second), p, label in zip(image, prompt, label_0, strict=True):
        a, b = np.exp(5 * cosine[first, p]), np.exp(5 * cosine[second, p])
        expected.append(-(label * np.log(a / (a + b)) + (1 - label) * np.log(b / (a + b))))
    owner = [2, 2, 2, 0, 0]
    weights = np.exp(10 * cosine)
    named = [-np.log(weights[i, p] / weights[i].sum()) for i, p in enumerate(owner)]
    preference, contrastive = losses(
        torch.tensor(cosine),
        torch.tensor(image),
        torch.tensor(prompt),
        torch.tensor(label_0),
        torch.tensor(5.0),
        torch.tensor(10.0),
    )
    assert preference.item() == pytest.approx(np.mean(expected))
    assert contrastive.item() == pytest.approx(np.mean(named))


def test_a_pass_of_batches_takes_every_pair_at_most_once_and_prompts_whole() -> None:
    prompt = np.repeat(np.arange(200), 3)
    taken = np.concatenate(list(batches(prompt, 5, np.random.default_rng(0))))
    assert len(set(taken.tolist())) == len(taken)
    for rows in batches(prompt, 3, np.random.default_rng(0)):
        assert 24 <= len(rows) <= 48


def test_features_start_spread_out() -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, vocabulary_size=1_200)
    model = build_model(tokenizer).eval()
    tokens = tokenizer(PROMPTS[:120], padding=True, truncation=True, return_tensors="pt")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 3, 64, 64), np.uint8)

    def mean_cosine() -> float:
        with torch.no_grad():
            features = model.get_text_features(**tokens).pooler_output
        features = torch.nn.functional.normalize(features, dim=1)
        return float((features @ features.T).mean())

    before = mean_cosine()
    spread_features(model, tokens["input_ids"], tokens["attention_mask"], pixels)
    # Which of equally frequent pieces the tokenizer merges is not fixed, so `before` varies.
    assert before > 0.3
    assert abs(mean_cosine()) < 0.1


def test_training_learns_to_prefer_the_picture_of_the_colour_asked_for(tmp_path: Path) -> None:
    # Pictures of one colour each; the prompt names it. Labels are right.
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    colours = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    prompts = [f"a {name} wall" for name in colours]
    own = rng.integers(3, size=160)
    other = (own + rng.integers(1, 3, size=160)) % 3
    shades = np.array(list(colours.values()))[np.stack([own, other], axis=1).ravel()]
    noise = rng.normal(0, 10, (320, 3, 1, 1))
    pixels = np.clip(shades[:, :, None, None] + noise, 0, 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (320, 3, 64, 64)).copy()
    first_wins = rng.random(160) < 0.5
    image = np.arange(320).reshape(160, 2)
    image[~first_wins] = image[~first_wins, ::-1]
    pairs = LabelledPairs(
        prompts, pixels, own, image, first_wins.astype(np.float32), np.arange(160)
    )
    tokenizer = train_tokenizer(prompts * 3, vocabulary_size=600)
    model = build_model(tokenizer)
    train(model, tokenizer, pairs, num_steps=25, seed=0)
    save(model, tokenizer, tmp_path)
    reward = build_reward_model("pickscore", str(tmp_path), dtype="float32")
    transform = build_image_transform("pickscore", str(tmp_path))
    images = [transform(Image.new("RGB", (64, 64), colour)) for colour in colours.values()]
    at_image, at_prompt = (grid.ravel() for grid in np.meshgrid(range(3), range(3)))
    rewards = reward.score(images, prompts, at_image, at_prompt).reshape(3, 3)
    assert rewards.argmax(axis=1).tolist() == [0, 1, 2]


def test_shipped_weights_load_as_any_clip_and_score_as_pickscore_does(world: Path) -> None:
    model = CLIPModel.from_pretrained(REWARD_WEIGHTS, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(REWARD_WEIGHTS)
    pairs = read_labelled_pairs(world)
    prompts, pixels = pairs.prompts[:6], pairs.pixels[:6]
    with torch.no_grad():
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        output = model(**tokens, pixel_values=normalized(pixels))
    reward = build_reward_model("pickscore", str(REWARD_WEIGHTS), dtype="float32")
    transform = build_image_transform("pickscore", str(REWARD_WEIGHTS))
    images = [transform(Image.fromarray(p.transpose(1, 2, 0))) for p in pixels]
    ours = reward.score(images, prompts, np.arange(6), np.arange(6))
    assert np.abs(ours - output.logits_per_image.diagonal().numpy()).max() < 1e-5


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in REWARD_WEIGHTS.iterdir()) < 3_000_000


def test_shipped_weights_tell_right_from_wrong_labels(measures: RewardMeasures) -> None:
    assert 0.7 < measures["labels_right"] < 0.86
    assert measures["truth_accuracy"] > TRUTH_ACCURACY
    assert measures["label_right_auc"] > LABEL_RIGHT_AUC
    tops = list(measures["labels_right_at_top"].values())
    assert tops[2] > TOP_TENTH  # the top tenth by reward margin
    assert tops[2] > measures["labels_right"] + 0.1
