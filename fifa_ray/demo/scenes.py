"""What the demo world is made of: scenes, how faithful a scene is to another, how one goes wrong.

A `Scene` is the canonical truth behind a prompt and behind an image. In a prompt's scene `None`
means "left to the artist"; an image's scene has every field set. `prompts` turns scenes into words,
`drawing` turns them into pixels, and `alignment` here compares the two without looking at either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

SHAPES = (
    "balloon", "boat", "house", "tree", "star", "fish", "heart",
    "mushroom", "umbrella", "cup", "kite", "car", "flower", "rocket",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "medium", "large")
SETTINGS = (
    "night", "beach", "forest", "city", "sunset", "mountains", "desert", "underwater", "meadow",
    "room",
)  # fmt: skip
Relation = Literal["above", "below", "left of", "right of", "beside"]
RELATIONS: tuple[Relation, ...] = ("above", "below", "left of", "right of", "beside")
OPPOSITE: dict[Relation | None, Relation] = {
    "above": "below",
    "below": "above",
    "left of": "right of",
    "right of": "left of",
}
MAX_COUNT = 4

T = TypeVar("T")

# What each stated attribute weighs in `alignment`: people forgive a wrong size, not a wrong object.
WEIGHTS = {
    "shape": 3.0, "colour": 2.0, "count": 1.5, "size": 0.5, "setting": 1.5, "relation": 1.5,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One kind of object in a scene; `None` leaves the attribute open."""

    shape: str | None
    colour: str | None = None
    size: str | None = None
    count: int | None = None


@dataclass(frozen=True)
class Scene:
    """One or two kinds of objects, where the first stands relative to the second, and a setting.

    A scene without items asks for nothing in particular ("something nice").
    """

    items: tuple[Item, ...] = ()
    setting: str | None = None
    relation: Relation | None = None


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly (numpy's own `choice` would turn them into numpy scalars)."""
    return options[int(rng.integers(len(options)))]


def other(rng: np.random.Generator, options: tuple[T, ...], current: T) -> T:
    """One of `options` that is not `current`, uniformly."""
    return choose(rng, tuple(option for option in options if option != current))


def random_prompt_scene(rng: np.random.Generator) -> Scene:
    """A scene as a person would ask for it: some attributes stated, others left open."""
    num_items = 1 if rng.random() < 0.6 else 2
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:num_items]]
    items = tuple(
        Item(
            shape=shape,
            colour=choose(rng, COLOURS) if rng.random() < 0.75 else None,
            size=choose(rng, ("small", "large")) if rng.random() < 0.2 else None,
            count=int(rng.integers(1, MAX_COUNT + 1)) if rng.random() < 0.5 else 1,
        )
        for shape in shapes
    )
    relation = choose(rng, RELATIONS) if num_items == 2 else None
    return Scene(items, choose(rng, SETTINGS) if rng.random() < 0.65 else None, relation)


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with everything it left open decided, as an image must."""
    items = scene.items or (Item(choose(rng, SHAPES)),)
    decided = tuple(
        Item(
            shape=item.shape or choose(rng, SHAPES),
            colour=item.colour or choose(rng, COLOURS),
            size=item.size or "medium",
            count=item.count or int(rng.integers(1, 3)),
        )
        for item in items
    )
    relation = scene.relation
    if len(decided) == 2 and relation in (None, "beside"):
        relation = choose(rng, ("left of", "right of"))
    return Scene(decided, scene.setting or choose(rng, SETTINGS), relation)


def distort(scene: Scene, error_rate: float, rng: np.random.Generator) -> Scene:
    """A complete scene with each attribute wrong with a probability of `error_rate` (sizes, counts
    and relations a little more often, as image generators do)."""
    items = []
    for item in scene.items:
        if rng.random() < 0.8 * error_rate:
            item = replace(item, shape=other(rng, SHAPES, item.shape))
        if rng.random() < error_rate:
            item = replace(item, colour=other(rng, COLOURS, item.colour))
        if rng.random() < 1.2 * error_rate:
            item = replace(item, count=other(rng, tuple(range(1, MAX_COUNT + 1)), item.count))
        if rng.random() < 1.2 * error_rate:
            item = replace(item, size=other(rng, SIZES, item.size))
        items.append(item)
    relation = scene.relation
    if relation is not None and rng.random() < 1.2 * error_rate:
        relation = OPPOSITE[relation]
    if len(items) == 2 and rng.random() < 0.5 * error_rate:  # one of the two is missing
        items, relation = [items[int(rng.integers(2))]], None
    setting = scene.setting
    if rng.random() < error_rate:
        setting = other(rng, SETTINGS, setting)
    return Scene(tuple(items), setting, relation)


def random_image_scene(rng: np.random.Generator) -> Scene:
    """A complete scene that has nothing to do with any prompt (an off-prompt image)."""
    return complete(random_prompt_scene(rng), rng)


def alignment(asked: Scene, drawn: Scene) -> tuple[float, list[str]]:
    """How much of what was asked is in the picture: weighted share of stated attributes, in [0, 1].

    An absent object loses its own attributes too. Items are compared in the better of the two
    possible orders; a scene that asks for nothing is neutral (0.5). Also returns which attributes
    are wrong ("wrong_colour", ...), sorted and without repeats.
    """
    if not asked.items and asked.setting is None:
        return 0.5, []
    orders = [drawn.items, drawn.items[::-1]] if len(drawn.items) == 2 else [drawn.items]
    return max((_alignment_in_order(asked, drawn, order) for order in orders), key=lambda a: a[0])


def _alignment_in_order(
    asked: Scene, drawn: Scene, drawn_items: tuple[Item, ...]
) -> tuple[float, list[str]]:
    """`alignment` when the i-th item asked for is the i-th of `drawn_items`."""
    total = right = 0.0
    wrong: set[str] = set()

    def check(attribute: str, is_right: bool) -> None:
        nonlocal total, right
        total += WEIGHTS[attribute]
        if is_right:
            right += WEIGHTS[attribute]
        else:
            wrong.add(f"wrong_{attribute}")

    all_present = True
    for index, item in enumerate(asked.items):
        found = drawn_items[index] if index < len(drawn_items) else None
        present = found is not None and found.shape == item.shape
        all_present &= present
        check("shape", present)
        for attribute in ("colour", "count", "size"):
            if (stated := getattr(item, attribute)) is not None:
                check(attribute, present and getattr(found, attribute) == stated)
    if asked.setting is not None:
        check("setting", drawn.setting == asked.setting)
    if asked.relation is not None:
        swapped = drawn_items is not drawn.items
        seen = OPPOSITE.get(drawn.relation) if swapped else drawn.relation
        allowed = ("left of", "right of") if asked.relation == "beside" else (asked.relation,)
        check("relation", all_present and seen in allowed)
    return right / total, sorted(wrong)
