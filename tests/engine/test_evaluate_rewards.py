"""Scores of drawn images: whatever a scorer does wrong costs the images concerned alone."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fifa_ray import schema
from fifa_ray.engine.evaluate_images import encode_image, image_tables
from fifa_ray.engine.evaluate_rewards import ScoreParts, score_encoded
from fifa_ray.models.image_generator import Drawing
from fifa_ray.run_dir import RunDir


def png(level: int) -> bytes:
    return encode_image(np.full((8, 8, 3), level, np.uint8), "png")


class Picky:
    """The level of grey; refuses what a prompt asks it to refuse."""

    def __init__(self) -> None:
        self.calls = []

    def score(self, images, prompts):
        self.calls.append(len(images))
        if "raise" in prompts:
            raise KeyError("no such thing")
        levels = [float(np.asarray(image).mean()) for image in images]
        return [np.nan if p == "nan" else v for p, v in zip(prompts, levels, strict=True)]


def test_one_bad_image_costs_one_image():
    scorer = Picky()
    images = [png(10), b"no image", png(20), png(30), png(40), b""]
    prompts = ["a", "b", "raise", "nan", "c", "d"]
    found = score_encoded(scorer, images, prompts, 10_000)
    assert [reward for reward, _, _ in found] == [10.0, None, None, None, 40.0, None]
    assert [error for _, error, _ in found] == [
        None, "corrupt_image", "scoring_failed", "nan_reward", None, "empty_image",
    ]  # fmt: skip
    assert "no such thing" in found[2][2]
    assert scorer.calls == [4, 1, 1, 1, 1]


def test_a_block_is_scored_at_once_and_a_large_image_is_refused():
    scorer = Picky()
    assert score_encoded(scorer, [png(1), png(2)], ["x", "x"], 64)[1][0] == 2.0
    assert scorer.calls == [2]
    assert score_encoded(scorer, [png(1)], ["x"], 63)[0][1] == "image_too_large"
    assert score_encoded(scorer, [], [], 64) == []


def test_a_scorer_that_gives_too_few_scores_is_caught():
    class Short:
        def score(self, images, prompts):
            return [1.0]

    found = score_encoded(Short(), [png(1), png(2)], ["a", "b"], 64)
    assert [reward for reward, _, _ in found] == [1.0, 1.0]  # one by one it is right

    class Wrong:
        def score(self, images, prompts):
            return [[1.0, 2.0]]

    ((_, error, detail),) = score_encoded(Wrong(), [png(1)], ["a"], 64)
    assert error == "scoring_failed"
    assert "a score for each of 1 images" in detail


def test_parts_are_written_with_their_quarantine(tmp_path):
    run = RunDir(str(tmp_path))
    count = 4
    images = pa.table(
        [
            np.arange(count), np.arange(count) + 50, np.zeros(count, np.int32),
            ["a", "raise", "nan", "b"], [None] * count, np.arange(count), ["m"] * count,
            [png(10 * i) for i in range(count)],
        ],
        schema=schema.EVALUATION_IMAGES,
    )  # fmt: skip
    run.write_table(images, "evaluation/images/m", "part-000000.parquet")
    score = ScoreParts(run, lambda device: Picky(), "cpu", 1, 10_000)
    todo = {"input": "evaluation/images/m", "stage": "evaluation/rewards/m/picky",
            "part": "part-000000.parquet"}  # fmt: skip
    assert score(pa.Table.from_pylist([todo])).to_pydict() == {"rows": [4]}
    rewards = run.read_table("evaluation/rewards/m/picky")
    assert rewards.schema.equals(schema.EVALUATION_REWARDS)
    assert rewards.to_pydict() == {
        "image_id": [0, 3], "prompt_id": [50, 53], "reward": [0.0, 30.0],
    }  # fmt: skip
    failed = run.read_table("quarantine/evaluation/rewards/m/picky").to_pylist()
    assert [(r["reason"], r["prompt_id"]) for r in failed] == [
        ("scoring_failed", 51), ("nan_reward", 52),
    ]  # fmt: skip
    assert failed[0]["detail"] == "image 1: KeyError: 'no such thing'"


def test_images_that_failed_go_to_quarantine():
    rows = pa.table(
        [[4, 5, 6], [7, 7, 8], np.array([0, 1, 0], np.int32), ["a", "a", "b"], [None] * 3,
         [1, 2, 3]],
        schema=schema.EVALUATION_PROMPTS,
    )  # fmt: skip
    pixels = np.full((8, 8, 3), 9, np.uint8)
    failure = Drawing(None, "generation_failed", "out of paint")
    drawings = [Drawing(pixels), failure, Drawing(pixels + 1)]
    drawn, failed = image_tables(rows, drawings, "evaluation/images/m", "m", "png")
    assert drawn.schema.equals(schema.EVALUATION_IMAGES)
    assert drawn.column("image").to_pylist() == [png(9), png(10)]
    assert drawn.column("image_id").to_pylist() == [4, 6]
    assert failed.column("detail").to_pylist() == ["image 5: out of paint"]
    assert failed.column("reason").to_pylist() == ["generation_failed"]


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_encoded_images_open_as_they_were(image_format):
    gradient = np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1).astype(np.uint8)
    pixels = np.concatenate([gradient, gradient[..., :1]], -1)
    image = Image.open(io.BytesIO(encode_image(pixels, image_format)))
    assert image.format == image_format.upper()
    difference = np.abs(np.asarray(image, int) - pixels).max()
    assert difference <= (0 if image_format == "png" else 8)
