"""The demo world's prompt catalogue: proportions, distinctness, the tail, words that fit scenes."""

from collections import Counter

import numpy as np
import pytest

from fifa_ray.demo.prompts import KIND_SHARES, Prompt, prompt_catalogue
from fifa_ray.demo.scenes import COLOURS, SETTINGS, SHAPES, Item, Scene, random_prompt_scene
from fifa_ray.demo.wording import NOUNS, describe, plural
from fifa_ray.schema import normalize_prompt


@pytest.fixture(scope="module")
def catalogue() -> list[Prompt]:
    return prompt_catalogue(2_200, seed=0)


def test_kinds_come_in_their_stated_shares(catalogue: list[Prompt]) -> None:
    counts = Counter(prompt.kind for prompt in catalogue)
    assert len(catalogue) == 2_200
    for kind, share in KIND_SHARES.items():
        assert counts[kind] == pytest.approx(share * 2_200, abs=2)
    assert counts["harmful"] > 150


def test_prompts_stay_distinct_after_normalisation(catalogue: list[Prompt]) -> None:
    assert len({normalize_prompt(prompt.text) for prompt in catalogue}) == len(catalogue)


def test_catalogues_of_odd_and_even_seeds_share_no_prompt(catalogue: list[Prompt]) -> None:
    ours = {normalize_prompt(prompt.text) for prompt in catalogue}
    for seed in (1, 3):
        theirs = {normalize_prompt(prompt.text) for prompt in prompt_catalogue(2_200, seed)}
        assert not ours & theirs
    even = {normalize_prompt(prompt.text) for prompt in prompt_catalogue(2_200, seed=2)}
    assert len(ours & even) < 0.2 * len(ours)  # another even seed: few, but possible


def test_weights_have_a_long_tail(catalogue: list[Prompt]) -> None:
    weights = np.sort([prompt.weight for prompt in catalogue])[::-1]
    top = len(weights) // 20
    assert weights[:top].sum() > 0.25 * weights.sum()
    assert np.median(weights) < 0.05 * weights[0]


def test_a_near_duplicate_shares_the_scene_of_a_normal_prompt(catalogue: list[Prompt]) -> None:
    scenes = {prompt.scene for prompt in catalogue if prompt.kind == "normal"}
    near = [prompt for prompt in catalogue if prompt.kind == "near_duplicate"]
    assert near
    assert all(prompt.scene in scenes for prompt in near)


def test_a_description_names_what_the_scene_states() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_prompt_scene(rng)
        text = describe(scene, rng)
        for item in scene.items:
            names = NOUNS[item.shape or ""]
            assert any(name in text or plural(name) in text for name in names)
            if item.colour:
                assert item.colour in text
        stated = {item.colour for item in scene.items if item.colour}
        words = set(text.replace(",", " ").split())
        assert {colour for colour in COLOURS if colour in words} == stated


def test_a_plain_description_is_the_scene_alone() -> None:
    scene = Scene((Item("fish", "orange", None, 2),), "underwater", None)
    text = describe(scene, np.random.default_rng(0), plain=True)
    assert text.split()[-1] not in COLOURS
    assert "orange" in text
    assert "fish" in text
    assert "fishs" not in text


def test_the_same_seed_gives_the_same_catalogue(catalogue: list[Prompt]) -> None:
    assert prompt_catalogue(2_200, seed=0) == catalogue


def test_too_many_or_too_few_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 50"):
        prompt_catalogue(10, seed=0)
    with pytest.raises(ValueError, match="lower num_prompts"):
        prompt_catalogue(40_000, seed=0)


def test_vocabulary_covers_every_shape_and_setting() -> None:
    assert set(NOUNS) == set(SHAPES)
    assert len(SHAPES) >= 12
    assert len(SETTINGS) == 10
