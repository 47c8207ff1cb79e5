"""Pictures of the demo world whose scenes and defects are known, for training on and measuring.

`draw_known` draws them as the world's generators do, errors and defects included, and keeps of each
what it shows and what spoils it. A scene is stored as `NUM_CODES` small numbers, -1 for absent:

    setting, layout, then shape, colour, size, count of the first item and of the second

in an order of its own: the first item is the one on the left, or the one above.
"""

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fifa_ray.demo.drawing import render
from fifa_ray.demo.pictures import DEFECTS, plan_picture, spoil, to_jpeg
from fifa_ray.demo.prompts import Kind, Prompt, prompt_catalogue
from fifa_ray.demo.scenes import COLOURS, SETTINGS, SHAPES, SIZES, Item, Relation, Scene

IMAGE_SIZE = 64
# What the second item is to the first; `single` has no second.
LAYOUTS = ("single", "left of", "above")
ITEM_FIELDS = ("shape", "colour", "size", "count")
NUM_CODES = 2 + 2 * len(ITEM_FIELDS)
DEFECT_NAMES = tuple(DEFECTS)
CHUNK_PROMPTS = 500


@dataclass(frozen=True)
class KnownDrawings:
    """N pictures of P prompts.

    pixels: uint8 (N, 64, 64, 3); prompt: int64 (N,), into `prompts`; codes: int8 (N, NUM_CODES);
    severity: float32 (N, defects) in [0, 1], in the order of `DEFECT_NAMES`.
    """

    prompts: list[Prompt]
    pixels: np.ndarray
    prompt: np.ndarray
    codes: np.ndarray
    severity: np.ndarray


def encode_scene(scene: Scene) -> np.ndarray:
    """Codes, int8 (NUM_CODES,), of a complete scene of one or two items."""
    items = scene.items
    if len(items) == 2 and scene.relation in ("right of", "below"):
        items = items[::-1]
    layout = {None: 0, "left of": 1, "right of": 1, "above": 2, "below": 2}
    codes = [SETTINGS.index(scene.setting or ""), layout[scene.relation if items[1:] else None]]
    for item in items:
        codes += [
            SHAPES.index(item.shape or ""), COLOURS.index(item.colour or ""),
            SIZES.index(item.size or ""), (item.count or 0) - 1,
        ]  # fmt: skip
    return np.array(codes + [-1] * (NUM_CODES - len(codes)), np.int8)


def decode_scene(codes: np.ndarray) -> Scene:
    """The scene of codes; its items come in the codes' own order, left or upper one first."""
    setting, layout, *fields = (int(code) for code in codes)
    items = tuple(
        Item(SHAPES[shape], COLOURS[colour], SIZES[size], count + 1)
        for shape, colour, size, count in (fields[:4], fields[4:])[: 1 if layout == 0 else 2]
    )
    relation: tuple[Relation | None, ...] = (None, "left of", "above")
    return Scene(items, SETTINGS[setting], relation[layout])


def prompts_of(seeds: tuple[int, ...], per_seed: int, kinds: tuple[Kind, ...]) -> list[Prompt]:
    """The prompts of some kinds in the catalogues of some seeds, each text once."""
    prompts = {
        prompt.text: prompt
        for seed in seeds
        for prompt in prompt_catalogue(per_seed, seed)
        if prompt.kind in kinds
    }
    return list(prompts.values())


def draw_known(
    prompts: list[Prompt], pictures_per_prompt: int, seed: int, folder: Path, num_processes: int = 2
) -> KnownDrawings:
    """Draw, or read what an earlier call with the same arguments left in `folder`.

    Pictures of a prompt are neighbours. Chunks of `CHUNK_PROMPTS` prompts are written as they are
    finished, so that an interrupted call loses little. Processes are spawned, unless there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (prompts[at : at + CHUNK_PROMPTS], pictures_per_prompt, seed, at, folder)
        for at in range(0, len(prompts), CHUNK_PROMPTS)
    ]
    paths = [_chunk_path(*job) for job in jobs]
    jobs = [job for job, path in zip(jobs, paths, strict=True) if not path.exists()]
    if num_processes == 1 or not jobs:
        for job in jobs:
            _draw_chunk(*job)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            list(pool.map(_draw_chunk, *zip(*jobs, strict=True)))
    chunks = [np.load(path) for path in paths]
    return KnownDrawings(
        prompts,
        np.concatenate([chunk["pixels"] for chunk in chunks]),
        np.repeat(np.arange(len(prompts)), pictures_per_prompt),
        np.concatenate([chunk["codes"] for chunk in chunks]),
        np.concatenate([chunk["severity"] for chunk in chunks]),
    )


def _chunk_path(
    prompts: list[Prompt], pictures_per_prompt: int, seed: int, first: int, folder: Path
) -> Path:
    return folder / f"drawings-{seed}-{first:06d}-{len(prompts)}x{pictures_per_prompt}.npz"


def _draw_chunk(
    prompts: list[Prompt], pictures_per_prompt: int, seed: int, first: int, folder: Path
) -> None:
    rng = np.random.default_rng([seed, 4, first])
    pixels, codes, severities = [], [], []
    for prompt in prompts:
        for _ in range(pictures_per_prompt):
            plan = plan_picture(prompt, rng)
            jpeg = to_jpeg(spoil(render(plan.scene, rng, IMAGE_SIZE), plan.severity, rng))
            pixels.append(np.asarray(Image.open(io.BytesIO(jpeg))))
            codes.append(encode_scene(plan.scene))
            severities.append([plan.severity.get(name, 0.0) for name in DEFECT_NAMES])
    path = _chunk_path(prompts, pictures_per_prompt, seed, first, folder)
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(
        unfinished, pixels=np.stack(pixels), codes=np.stack(codes),
        severity=np.array(severities, np.float32),
    )  # fmt: skip
    unfinished.rename(path)
