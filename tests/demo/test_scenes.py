"""Alignment of a picture's scene with a prompt's scene."""

import numpy as np
import pytest

from fifa_ray.demo.scenes import (
    SHAPES,
    WEIGHTS,
    Item,
    Scene,
    alignment,
    complete,
    distort,
    random_prompt_scene,
)

RED_BOAT = Item("boat", "red", "small", 1)
TWO_STARS = Item("star", "yellow", "medium", 2)
ASKED = Scene((Item("boat", "red", None, 1), Item("star", None, None, 2)), "night", "below")
DRAWN = Scene((RED_BOAT, TWO_STARS), "night", "below")


def test_a_completed_scene_is_wholly_aligned_with_its_prompt() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_prompt_scene(rng)
        assert alignment(scene, complete(scene, rng)) == (1.0, [])


def test_the_order_of_the_items_does_not_matter_when_the_relation_is_turned_round() -> None:
    turned = Scene((TWO_STARS, RED_BOAT), "night", "above")
    assert alignment(ASKED, turned) == (1.0, [])
    assert alignment(ASKED, Scene((TWO_STARS, RED_BOAT), "night", "below"))[1] == ["wrong_relation"]


@pytest.mark.parametrize(
    ("drawn", "lost", "wrong"),
    [
        (Scene((Item("boat", "blue", "small", 1), TWO_STARS), "night", "below"), 2.0, "colour"),
        (Scene((Item("boat", "red", "small", 3), TWO_STARS), "night", "below"), 1.5, "count"),
        (Scene((RED_BOAT, TWO_STARS), "city", "below"), 1.5, "setting"),
        (Scene((RED_BOAT, TWO_STARS), "night", "left of"), 1.5, "relation"),
    ],
)
def test_one_wrong_attribute_costs_its_weight(drawn: Scene, lost: float, wrong: str) -> None:
    # stated: two shapes, one colour, two counts, the setting, the relation
    total = 2 * WEIGHTS["shape"] + 2.0 + 2 * 1.5 + 1.5 + 1.5
    value, defects = alignment(ASKED, drawn)
    assert value == pytest.approx(1 - lost / total)
    assert defects == [f"wrong_{wrong}"]


def test_a_missing_object_loses_its_attributes_and_the_relation() -> None:
    value, defects = alignment(ASKED, Scene((RED_BOAT,), "night"))
    total = 2 * WEIGHTS["shape"] + 2.0 + 2 * 1.5 + 1.5 + 1.5
    assert value == pytest.approx(1 - (3.0 + 1.5 + 1.5) / total)
    assert defects == ["wrong_count", "wrong_relation", "wrong_shape"]


def test_a_prompt_that_asks_for_nothing_is_neutral() -> None:
    assert alignment(Scene(), DRAWN) == (0.5, [])


def test_distortion_lowers_alignment_more_at_a_higher_error_rate() -> None:
    rng = np.random.default_rng(1)
    means = []
    for error_rate in (0.0, 0.1, 0.3):
        scores = []
        for _ in range(300):
            scene = random_prompt_scene(rng)
            drawn = distort(complete(scene, rng), error_rate, rng)
            assert {item.shape for item in drawn.items} <= set(SHAPES)
            scores.append(alignment(scene, drawn)[0])
        means.append(np.mean(scores))
    assert means[0] == 1.0
    assert means[0] > means[1] + 0.05 > means[2] + 0.1
