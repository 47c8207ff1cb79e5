"""The demo world's prompts: scenes in words, and what else people type into a prompt box.

`prompt_catalogue` returns distinct prompts of six kinds with a weight each (how often people return
to a prompt: a long tail, with a few popular scenes worded many times over):

- `normal`: a scene, from two words to a long sentence;
- `near_duplicate`: another wording of a popular scene (case, opener, order, a typo);
- `vague`: says nothing that could be drawn wrong ("something nice");
- `junk`: keyboard mash, spam, addresses, token soup, bare tag lists, markup;
- `contradictory`: no picture can satisfy it;
- `harmful`: violence, hatred, self-harm, weapons, explicit content; mild in wording, for testing a
  judge's flag. What is drawn for such a prompt is an ordinary scene.

The text of a prompt decides the parity of its id, and a catalogue keeps only the parity of its
seed: catalogues of an even and of an odd seed share no prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fifa_ray.demo.scenes import Scene, choose, random_prompt_scene
from fifa_ray.demo.unusual_prompts import contradictory, harmful, junk, vague
from fifa_ray.demo.wording import CLOSERS, OPENERS, describe
from fifa_ray.schema import normalize_prompt, prompt_id

Kind = Literal["normal", "near_duplicate", "vague", "junk", "contradictory", "harmful"]
KIND_SHARES: dict[Kind, float] = {
    "normal": 0.55, "near_duplicate": 0.18, "vague": 0.06, "junk": 0.08, "contradictory": 0.05,
    "harmful": 0.08,
}  # fmt: skip
WORDINGS_PER_POPULAR_SCENE = 14
POPULAR_BOOST = 3.0


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt; `scene` is what a picture of it is held against (empty: anything)."""

    text: str
    kind: Kind
    theme: str
    scene: Scene
    weight: float


def _with_typo(text: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters swapped."""
    at = int(rng.integers(1, max(2, len(text) - 2)))
    return text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]


def _reword(scene: Scene, text: str, rng: np.random.Generator) -> str:
    """A near-duplicate of `text`, which describes `scene`."""
    ways: tuple[Callable[[], str], ...] = (
        lambda: text.upper() if rng.random() < 0.3 else text.capitalize(),
        lambda: text + choose(rng, (".", "!", "!!", " please", " :)")),
        lambda: f"{choose(rng, OPENERS)} {text}",
        lambda: f"{text}, {choose(rng, CLOSERS)}",
        lambda: _with_typo(text, rng),
        lambda: describe(scene, rng, plain=True),
        lambda: f"{describe(scene, rng, plain=True)}, {choose(rng, CLOSERS)}",
    )
    return choose(rng, ways)()


def _normal(rng: np.random.Generator) -> tuple[str, str, Scene]:
    scene = random_prompt_scene(rng)
    return describe(scene, rng), f"{scene.items[0].shape}/{scene.setting or 'anywhere'}", scene


def prompt_catalogue(num_prompts: int, seed: int) -> list[Prompt]:
    """`num_prompts` distinct prompts (distinct also after normalisation), the same for a seed.

    Kinds come in the proportions of `KIND_SHARES`, of which near-duplicates surround popular scenes
    with `WORDINGS_PER_POPULAR_SCENE` wordings each. Weights are Pareto, so that a few prompts take
    many pairs, and larger for popular scenes.

    Raises ValueError for fewer than 50 prompts, which could not hold every kind.
    """
    if num_prompts < 50:
        raise ValueError(f"expected num_prompts of at least 50, found {num_prompts}; ask for more")
    rng = np.random.default_rng([seed, 0])
    seen: set[str] = set()
    catalogue: list[Prompt] = []

    def add(make: Callable[[], tuple[str, str, Scene]], kind: Kind, boost: float = 1.0) -> Prompt:
        for _ in range(2_000):
            text, theme, scene = make()
            normalized = normalize_prompt(text)
            if normalized and normalized not in seen and prompt_id(normalized) % 2 == seed % 2:
                seen.add(normalized)
                weight = boost * min(1.0 + float(rng.pareto(1.1)), 25.0)
                catalogue.append(Prompt(text, kind, theme, scene, weight))
                return catalogue[-1]
        raise ValueError(
            f"expected {num_prompts:,} distinct prompts, but the grammar of {kind!r} ran dry after"
            f" {len(catalogue):,}; lower num_prompts"
        )

    counts = {kind: round(share * num_prompts) for kind, share in KIND_SHARES.items()}
    while counts["near_duplicate"] > 0:
        popular = add(lambda: _normal(rng), "normal", POPULAR_BOOST)
        counts["normal"] -= 1
        for _ in range(min(WORDINGS_PER_POPULAR_SCENE, counts["near_duplicate"])):
            add(
                lambda p=popular: (_reword(p.scene, p.text, rng), p.theme, p.scene),  # type: ignore[misc]
                "near_duplicate",
                POPULAR_BOOST,
            )
            counts["near_duplicate"] -= 1
    makers: dict[Kind, Callable[[np.random.Generator], tuple[str, str, Scene]]] = {
        "vague": vague, "junk": junk, "contradictory": contradictory, "harmful": harmful,
    }  # fmt: skip
    for kind, maker in makers.items():
        for _ in range(counts[kind]):
            add(lambda m=maker: m(rng), kind)  # type: ignore[misc]
    while len(catalogue) < num_prompts:
        add(lambda: _normal(rng), "normal")
    return catalogue[:num_prompts]
