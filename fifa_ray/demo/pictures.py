"""The demo world's pictures: who draws them, how well, what spoils them, what they are worth."""

import io
import uuid
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fifa_ray.demo.drawing import render
from fifa_ray.demo.prompts import Prompt
from fifa_ray.demo.scenes import (
    Scene,
    alignment,
    choose,
    complete,
    distort,
    random_image_scene,
)

ALIGNMENT_UTILITY, QUALITY_UTILITY = 4.0, 2.0
CORRUPTED_IMAGE_RATE = 0.003
OFF_PROMPT_RATE = 0.03
NOTABLE_SEVERITY = 0.3  # from here on a technical defect is listed in the truth

# The image generators people tried: name, chance that an attribute is wrong, that quality suffers.
GENERATORS = (
    ("sketch-1.0", 0.36, 0.55),
    ("sketch-1.5", 0.26, 0.40),
    ("painter-turbo", 0.20, 0.50),
    ("painter-xl", 0.14, 0.25),
    ("studio-2", 0.07, 0.15),
)
# What each defect costs at full severity, in the unit of quality (1 is a clean picture).
DEFECTS = {
    "blur": 0.9, "noise": 0.8, "occlusion": 0.8, "colour_cast": 0.6, "banding": 0.5,
    "exposure": 0.4,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One image of the world; `defects` are those of its alignment, its quality and its file."""

    uid: str
    jpeg: bytes
    generator: str
    utility: float
    defects: list[str]


@dataclass(frozen=True)
class Plan:
    """What a generator is about to draw for a prompt: `severity` as `spoil` takes it."""

    generator: str
    scene: Scene
    severity: dict[str, float]
    off_prompt: bool


def spoil(
    picture: Image.Image, severity: dict[str, float], rng: np.random.Generator
) -> Image.Image:
    """Lower a picture's technical quality; `severity` maps a defect of `DEFECTS` to (0, 1]."""
    side = picture.width
    if amount := severity.get("occlusion"):
        pen, reach = ImageDraw.Draw(picture), side * (0.25 + 0.35 * amount)
        x, y = rng.uniform(0.15, 0.85, 2) * side
        tone = int(rng.integers(40, 120))
        pen.ellipse((x - reach / 2, y - reach / 2.6, x + reach / 2, y + reach / 2.6), (tone,) * 3)
    if amount := severity.get("blur"):
        picture = picture.filter(ImageFilter.GaussianBlur(side / 64 * (0.5 + 2.2 * amount)))
    values = np.asarray(picture, np.float32) * (1 - 0.6 * severity.get("exposure", 0.0))
    if amount := severity.get("colour_cast"):
        tint = np.array([(1.0, 0.6, 0.5), (0.55, 1.0, 0.6), (0.5, 0.65, 1.0)])[rng.integers(3)]
        values = values * (1 - amount * (1 - tint)).astype(np.float32)
    if amount := severity.get("banding"):
        step = 24 + 72 * amount
        values = np.floor(values / step) * step + step / 2
    if amount := severity.get("noise"):
        values = values + rng.normal(0, 10 + 50 * amount, values.shape).astype(np.float32)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def technical_quality(severity: dict[str, float]) -> float:
    """1 for a clean picture, less its defects' costs, never below 0."""
    return max(0.0, 1.0 - sum(DEFECTS[name] * amount for name, amount in severity.items()))


def to_jpeg(picture: Image.Image, quality: int = 88) -> bytes:
    """JPEG bytes without chroma subsampling (small coloured objects would bleed)."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def plan_picture(prompt: Prompt, rng: np.random.Generator) -> Plan:
    """Choose a generator and, by its error rates, what it gets wrong."""
    generator, error_rate, defect_rate = choose(rng, GENERATORS)
    off_prompt = rng.random() < OFF_PROMPT_RATE
    if off_prompt:
        scene = random_image_scene(rng)
    else:
        scene = distort(complete(prompt.scene, rng), error_rate, rng)
    severity = {"exposure": float(rng.beta(1, 4))}
    if rng.random() < defect_rate:
        kinds = [name for name in DEFECTS if name != "exposure"]
        for index in rng.permutation(len(kinds))[: int(rng.integers(1, 3))]:
            severity[kinds[index]] = float(rng.uniform(0.1, 1.0))
    return Plan(generator, scene, severity, off_prompt)


def draw_picture(prompt: Prompt, rng: np.random.Generator, image_size: int) -> Picture:
    """One picture for a prompt by one of the generators, with what is wrong with it."""
    plan = plan_picture(prompt, rng)
    aligned, wrong = alignment(prompt.scene, plan.scene)
    defects = ["off_prompt"] if plan.off_prompt else []
    defects += wrong
    defects += sorted(name for name, amount in plan.severity.items() if amount >= NOTABLE_SEVERITY)
    utility = ALIGNMENT_UTILITY * aligned + QUALITY_UTILITY * technical_quality(plan.severity)
    jpeg = to_jpeg(spoil(render(plan.scene, rng, image_size), plan.severity, rng))
    if rng.random() < CORRUPTED_IMAGE_RATE:
        jpeg = corrupt(jpeg, rng)
        defects.append("corrupted")
    uid = str(uuid.UUID(bytes=rng.bytes(16)))
    return Picture(uid, jpeg, plan.generator, utility, defects)


def corrupt(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that no decoder takes for a picture: cut short, empty, or an error page."""
    way = int(rng.integers(3))
    if way == 0:
        return jpeg[: int(len(jpeg) * rng.uniform(0.05, 0.6))]
    return b"" if way == 1 else b"<html><body>404 Not Found</body></html>"
