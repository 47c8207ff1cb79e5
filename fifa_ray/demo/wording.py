"""Scenes put into words: the vocabulary of the demo world and sentences made of it."""

import numpy as np

from fifa_ray.demo.scenes import Item, Scene, choose

NOUNS: dict[str, tuple[str, ...]] = {
    "balloon": ("balloon", "hot air balloon", "party balloon"),
    "boat": ("boat", "sailboat", "little ship"),
    "house": ("house", "cottage", "cosy house"),
    "tree": ("tree", "round tree", "leafy tree"),
    "star": ("star", "shining star"),
    "fish": ("fish", "friendly fish"),
    "heart": ("heart", "glossy heart"),
    "mushroom": ("mushroom", "toadstool"),
    "umbrella": ("umbrella", "parasol"),
    "cup": ("cup", "coffee cup", "mug"),
    "kite": ("kite", "paper kite"),
    "car": ("car", "toy car"),
    "flower": ("flower", "daisy"),
    "rocket": ("rocket", "toy rocket", "spaceship"),
}
PLURALS = {"fish": "fish", "daisy": "daisies"}
NUMBERS = {2: ("two", "a pair of", "2"), 3: ("three", "3"), 4: ("four", "4")}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("big", "large", "huge")}
RELATION_WORDS = {
    "above": ("above", "over", "floating above"),
    "below": ("below", "under", "beneath"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "beside": ("next to", "beside", "and"),
}
SETTING_WORDS = {
    "night": ("at night", "under a starry sky", "on a moonlit night"),
    "beach": ("on a beach", "at the seaside", "on the sand by the sea"),
    "forest": ("in a forest", "in the deep woods", "among pine trees"),
    "city": ("in a city street", "in the city", "in front of skyscrapers"),
    "sunset": ("at sunset", "at dusk by the sea", "in front of the setting sun"),
    "mountains": ("in the mountains", "in front of snowy peaks", "in the snow"),
    "desert": ("in the desert", "among sand dunes"),
    "underwater": ("under water", "at the bottom of the sea", "in the deep ocean"),
    "meadow": ("in a meadow", "on a grassy hill", "in a sunny field"),
    "room": ("in a room", "on a wooden floor indoors", "in a bright living room"),
}
OPENERS = (
    "a picture of", "an illustration of", "a painting of", "a cute drawing of", "a photo of",
    "digital art of", "a storybook picture of", "a poster showing", "a watercolor of",
)  # fmt: skip
CLOSERS = (
    "soft light", "highly detailed", "fine texture", "pastel colours", "flat design",
    "clean composition", "gentle shadows", "warm light", "wide shot", "calm mood", "4k",
    "minimalist", "trending illustration", "crisp edges", "vivid colours",
)  # fmt: skip


def plural(noun: str) -> str:
    """The plural of one of `NOUNS`."""
    for singular, many in PLURALS.items():
        if noun.endswith(singular):
            return noun.removesuffix(singular) + many
    return noun + "s"


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _describe_item(item: Item, rng: np.random.Generator) -> str:
    noun = choose(rng, NOUNS[item.shape or "star"])
    words = []
    if item.size in SIZE_WORDS:
        words.append(choose(rng, SIZE_WORDS[item.size]))
    if item.colour:
        words.append(item.colour)
    if item.count and item.count > 1:
        return " ".join([choose(rng, NUMBERS[item.count]), *words, plural(noun)])
    return with_article(" ".join([*words, noun]))


def describe(scene: Scene, rng: np.random.Generator, plain: bool = False) -> str:
    """Words for a prompt's scene; `plain` leaves out openers, style words and reorderings."""
    phrase = _describe_item(scene.items[0], rng)
    if len(scene.items) == 2:
        link = choose(rng, RELATION_WORDS[scene.relation or "beside"])
        phrase = f"{phrase} {link} {_describe_item(scene.items[1], rng)}"
    place = choose(rng, SETTING_WORDS[scene.setting]) if scene.setting else ""
    if plain:
        return f"{phrase} {place}".strip()
    if place and rng.random() < 0.2:
        text = f"{place}, {phrase}"
    else:
        text = f"{phrase} {place}".strip()
        if rng.random() < 0.3:
            text = f"{choose(rng, OPENERS)} {text}"
    num_closers = int(rng.choice([0, 1, 2, 3], p=[0.5, 0.25, 0.17, 0.08]))
    return ", ".join([text, *(CLOSERS[i] for i in rng.permutation(len(CLOSERS))[:num_closers])])
