"""Pictures of the demo world."""

import io

import numpy as np
import pytest
from PIL import Image

from fifa_ray.demo.drawing import PIXELS, render, sprite
from fifa_ray.demo.pictures import DEFECTS, spoil, technical_quality, to_jpeg
from fifa_ray.demo.scenes import COLOURS, SETTINGS, SHAPES, Item, Scene


def picture_of(*items: Item, setting: str = "meadow", seed: int = 0) -> Image.Image:
    relation = "left of" if len(items) == 2 else None
    return render(Scene(items, setting, relation), np.random.default_rng(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_its_colour(shape: str) -> None:
    for colour in COLOURS:
        pixels = np.asarray(sprite(shape, colour), np.float32)
        solid = pixels[..., 3] > 200
        assert 0.1 < solid.mean() < 0.95
        near = np.abs(pixels[solid][:, :3] - PIXELS[colour]).max(axis=1) < 60
        assert near.mean() > 0.15, (shape, colour)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_look_different_from_one_another(setting: str) -> None:
    item = Item("star", "red", "small", 1)
    own = [np.asarray(picture_of(item, setting=setting, seed=s), np.float32) for s in range(2)]
    assert own[0].shape == (64, 64, 3)
    within = np.abs(own[0].mean((0, 1)) - own[1].mean((0, 1))).mean()
    for other in set(SETTINGS) - {setting}:
        picture = np.asarray(picture_of(item, setting=other), np.float32)
        assert np.abs(picture - own[0]).mean() > within


def test_more_copies_and_a_larger_size_cover_more_of_the_picture() -> None:
    def covered(count: int, size: str) -> float:
        setting = picture_of(Item("heart", "red", size, count), setting="underwater")
        red = np.asarray(setting, np.int32)
        return float(((red[..., 0] > 150) & (red[..., 2] < 110)).mean())

    assert covered(1, "small") < covered(1, "medium") < covered(1, "large")
    assert covered(1, "medium") < covered(4, "medium")


def test_objects_stand_where_the_relation_says() -> None:
    boat, star = Item("heart", "red", "medium", 1), Item("balloon", "green", "medium", 1)
    for relation, axis, sign in (
        ("above", 0, -1), ("below", 0, 1), ("left of", 1, -1), ("right of", 1, 1),
    ):  # fmt: skip
        picture = render(Scene((boat, star), "night", relation), np.random.default_rng(0))  # type: ignore[arg-type]
        pixels = np.asarray(picture, np.int32)
        red = np.argwhere((pixels[..., 0] > 150) & (pixels[..., 1] < 100))
        green = np.argwhere((pixels[..., 1] > 110) & (pixels[..., 0] < 100))
        assert sign * (red[:, axis].mean() - green[:, axis].mean()) > 15, relation


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_worse_defect_changes_the_picture_more_and_costs_more(defect: str) -> None:
    clean = picture_of(Item("house", "blue", "medium", 1))
    changes = []
    for amount in (0.2, 0.9):
        spoiled = spoil(clean.copy(), {defect: amount}, np.random.default_rng(0))
        changes.append(np.abs(np.asarray(spoiled, float) - np.asarray(clean, float)).mean())
    assert 0 < changes[0] < changes[1]
    assert technical_quality({defect: 0.9}) == pytest.approx(1 - 0.9 * DEFECTS[defect])


def test_quality_is_one_when_clean_and_never_negative() -> None:
    assert technical_quality({}) == 1.0
    assert technical_quality(dict.fromkeys(DEFECTS, 1.0)) == 0.0


def test_jpeg_decodes_to_nearly_the_same_picture() -> None:
    picture = picture_of(Item("kite", "purple", "large", 1), setting="beach")
    decoded = Image.open(io.BytesIO(to_jpeg(picture)))
    assert decoded.format == "JPEG"
    assert np.abs(np.asarray(decoded, float) - np.asarray(picture, float)).mean() < 6
