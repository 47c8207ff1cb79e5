"""Scenes into pixels: objects as shaded sprites on painted settings.

Objects are drawn once per shape and colour at 160 px, shaded, kept, and scaled down for each
picture (which is also the anti-aliasing); settings are painted at three times the size wanted.
Everything random comes from the generator that is passed in.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fifa_ray.demo.scenes import Item, Scene
from fifa_ray.demo.settings import PAINTERS

Rgb = tuple[int, int, int]
Point = tuple[float, float]

PIXELS = {
    "red": (220, 44, 48), "orange": (248, 136, 26), "yellow": (250, 214, 48),
    "green": (52, 164, 74), "blue": (46, 98, 214), "purple": (134, 62, 186),
    "pink": (248, 138, 184), "white": (244, 244, 240),
}  # fmt: skip
CREAM, WOOD, LEAF, GLASS, DARK = (
    (250, 238, 214), (128, 84, 50), (70, 138, 62), (186, 226, 246), (52, 48, 60),
)  # fmt: skip
SPRITE_PX = 160
SCALE = {"small": 0.72, "medium": 1.0, "large": 1.42}
FLYING = {"balloon", "star", "heart", "kite", "rocket", "fish"}


class _Pen:
    """ImageDraw in units of a sprite's side, so that shapes below read as coordinates in [0, 1]."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)
        self.side = image.width

    def _scaled(self, values: tuple[float, ...]) -> list[float]:
        return [value * self.side for value in values]

    def polygon(self, points: list[Point], fill: Rgb) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill)

    def ellipse(self, left: float, top: float, right: float, bottom: float, fill: Rgb) -> None:
        self.draw.ellipse(self._scaled((left, top, right, bottom)), fill)

    def box(
        self, left: float, top: float, right: float, bottom: float, fill: Rgb, radius: float = 0.0
    ) -> None:
        self.draw.rounded_rectangle(
            self._scaled((left, top, right, bottom)), radius * self.side, fill
        )

    def pie(
        self, box: tuple[float, float, float, float], start: float, end: float, fill: Rgb
    ) -> None:
        self.draw.pieslice(self._scaled(box), start, end, fill)

    def line(self, points: list[Point], fill: Rgb, width: float) -> None:
        self.draw.line(
            [(x * self.side, y * self.side) for x, y in points],
            fill,
            round(width * self.side),
            joint="curve",
        )

    def ring(self, box: tuple[float, float, float, float], fill: Rgb, width: float) -> None:
        self.draw.ellipse(self._scaled(box), outline=fill, width=round(width * self.side))


def _shade(colour: Rgb, factor: float) -> Rgb:
    """Lighter towards white for a factor above 1, darker below."""
    if factor <= 1:
        return tuple(round(channel * factor) for channel in colour)  # type: ignore[return-value]
    blend = factor - 1
    return tuple(round(channel + (255 - channel) * blend) for channel in colour)  # type: ignore[return-value]


def _balloon(pen: _Pen, colour: Rgb) -> None:
    pen.line([(0.5, 0.68), (0.47, 0.8), (0.53, 0.88), (0.5, 0.99)], (110, 104, 104), 0.018)
    pen.ellipse(0.2, 0.03, 0.8, 0.68, colour)
    pen.polygon([(0.25, 0.48), (0.75, 0.48), (0.53, 0.7), (0.47, 0.7)], colour)
    pen.polygon([(0.5, 0.68), (0.44, 0.76), (0.56, 0.76)], _shade(colour, 0.75))
    pen.ellipse(0.29, 0.13, 0.42, 0.3, _shade(colour, 1.6))


def _boat(pen: _Pen, colour: Rgb) -> None:
    pen.box(0.47, 0.08, 0.51, 0.7, WOOD)
    pen.polygon([(0.54, 0.1), (0.9, 0.6), (0.54, 0.6)], CREAM)
    pen.polygon([(0.44, 0.2), (0.44, 0.6), (0.16, 0.6)], _shade(CREAM, 0.9))
    pen.polygon([(0.04, 0.65), (0.96, 0.65), (0.8, 0.92), (0.2, 0.92)], colour)
    pen.polygon([(0.04, 0.65), (0.96, 0.65), (0.93, 0.71), (0.07, 0.71)], _shade(colour, 1.45))


def _house(pen: _Pen, colour: Rgb) -> None:
    pen.box(0.7, 0.12, 0.8, 0.4, _shade(WOOD, 0.9))
    pen.box(0.16, 0.42, 0.84, 0.96, colour)
    pen.polygon([(0.5, 0.06), (0.96, 0.46), (0.04, 0.46)], _shade(colour, 0.6))
    pen.box(0.44, 0.66, 0.58, 0.96, WOOD)
    for left in (0.24, 0.65):
        pen.box(left, 0.56, left + 0.13, 0.7, (255, 240, 170))


def _tree(pen: _Pen, colour: Rgb) -> None:
    pen.box(0.45, 0.55, 0.56, 0.98, WOOD)
    pen.ellipse(0.1, 0.3, 0.55, 0.72, _shade(colour, 0.82))
    pen.ellipse(0.45, 0.3, 0.9, 0.72, _shade(colour, 0.88))
    pen.ellipse(0.22, 0.04, 0.78, 0.58, colour)
    pen.ellipse(0.32, 0.12, 0.54, 0.32, _shade(colour, 1.28))


def _star(pen: _Pen, colour: Rgb) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 0.48, 0.2)
    points = [
        (0.5 + r * np.cos(a), 0.52 + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)
    ]
    pen.polygon(points, colour)
    pen.polygon([(0.5, 0.52), points[0], points[9]], _shade(colour, 1.35))
    pen.polygon([(0.5, 0.52), points[8], points[7]], _shade(colour, 1.2))


def _fish(pen: _Pen, colour: Rgb) -> None:
    pen.polygon([(0.7, 0.5), (0.98, 0.24), (0.92, 0.5), (0.98, 0.76)], _shade(colour, 0.78))
    pen.polygon([(0.36, 0.3), (0.6, 0.12), (0.64, 0.34)], _shade(colour, 0.78))
    pen.ellipse(0.04, 0.25, 0.8, 0.76, colour)
    pen.pie((0.1, 0.46, 0.72, 0.74), 0, 180, _shade(colour, 1.5))
    pen.ellipse(0.15, 0.37, 0.28, 0.5, (255, 255, 255))
    pen.ellipse(0.19, 0.4, 0.26, 0.47, DARK)


def _heart(pen: _Pen, colour: Rgb) -> None:
    pen.ellipse(0.05, 0.1, 0.53, 0.58, colour)
    pen.ellipse(0.47, 0.1, 0.95, 0.58, colour)
    pen.polygon([(0.09, 0.46), (0.91, 0.46), (0.5, 0.95)], colour)
    pen.ellipse(0.16, 0.2, 0.32, 0.36, _shade(colour, 1.6))


def _mushroom(pen: _Pen, colour: Rgb) -> None:
    pen.box(0.39, 0.45, 0.61, 0.96, CREAM, 0.09)
    pen.pie((0.06, 0.08, 0.94, 1.0), 180, 360, colour)
    pen.ellipse(0.06, 0.46, 0.94, 0.62, _shade(colour, 0.8))
    dot = CREAM if colour != PIXELS["white"] else (226, 190, 160)
    for left, top, size in ((0.25, 0.27, 0.15), (0.48, 0.14, 0.13), (0.66, 0.32, 0.13)):
        pen.ellipse(left, top, left + size, top + size, dot)


def _umbrella(pen: _Pen, colour: Rgb) -> None:
    pen.line([(0.5, 0.45), (0.5, 0.88), (0.56, 0.95), (0.65, 0.93), (0.67, 0.85)], WOOD, 0.045)
    pen.pie((0.03, 0.08, 0.97, 1.0), 180, 360, colour)
    pen.pie((0.3, 0.08, 0.7, 1.0), 180, 360, _shade(colour, 1.4))
    for left in (0.03, 0.265, 0.5, 0.735):
        pen.ellipse(left, 0.49, left + 0.235, 0.61, (0, 0, 0))
    pen.polygon([(0.47, 0.1), (0.5, 0.0), (0.53, 0.1)], WOOD)


def _cup(pen: _Pen, colour: Rgb) -> None:
    pen.ring((0.62, 0.36, 0.97, 0.76), _shade(colour, 0.82), 0.075)
    pen.polygon([(0.1, 0.27), (0.76, 0.27), (0.68, 0.93), (0.18, 0.93)], colour)
    pen.ellipse(0.18, 0.86, 0.68, 0.98, colour)
    pen.ellipse(0.1, 0.18, 0.76, 0.37, _shade(colour, 1.4))
    pen.ellipse(0.15, 0.22, 0.71, 0.35, (104, 66, 40))


def _kite(pen: _Pen, colour: Rgb) -> None:
    pen.line([(0.5, 0.68), (0.6, 0.8), (0.44, 0.88), (0.56, 0.99)], _shade(colour, 0.7), 0.03)
    pen.polygon([(0.5, 0.02), (0.84, 0.3), (0.5, 0.72), (0.16, 0.3)], colour)
    pen.polygon([(0.5, 0.02), (0.5, 0.3), (0.16, 0.3)], _shade(colour, 1.5))
    pen.polygon([(0.5, 0.72), (0.5, 0.3), (0.84, 0.3)], _shade(colour, 0.74))


def _car(pen: _Pen, colour: Rgb) -> None:
    pen.polygon([(0.2, 0.5), (0.32, 0.27), (0.68, 0.27), (0.82, 0.5)], colour)
    pen.polygon([(0.27, 0.49), (0.36, 0.33), (0.49, 0.33), (0.49, 0.49)], GLASS)
    pen.polygon([(0.53, 0.49), (0.53, 0.33), (0.65, 0.33), (0.74, 0.49)], GLASS)
    pen.box(0.03, 0.47, 0.97, 0.75, colour, 0.08)
    pen.box(0.88, 0.53, 0.97, 0.61, (255, 244, 180), 0.03)
    for left in (0.15, 0.63):
        pen.ellipse(left, 0.62, left + 0.23, 0.85, DARK)
        pen.ellipse(left + 0.07, 0.69, left + 0.16, 0.78, (206, 206, 212))


def _flower(pen: _Pen, colour: Rgb) -> None:
    pen.box(0.475, 0.45, 0.525, 0.98, LEAF)
    pen.ellipse(0.5, 0.72, 0.78, 0.84, LEAF)
    pen.ellipse(0.22, 0.78, 0.5, 0.9, _shade(LEAF, 0.85))
    for angle in np.arange(6) * np.pi / 3:
        x, y = 0.5 + 0.2 * np.cos(angle), 0.31 + 0.2 * np.sin(angle)
        pen.ellipse(x - 0.145, y - 0.145, x + 0.145, y + 0.145, colour)
    core = (250, 206, 60) if colour != PIXELS["yellow"] else (150, 92, 40)
    pen.ellipse(0.37, 0.18, 0.63, 0.44, core)


def _rocket(pen: _Pen, colour: Rgb) -> None:
    pen.polygon([(0.4, 0.8), (0.6, 0.8), (0.5, 1.0)], (255, 168, 46))
    pen.polygon([(0.45, 0.8), (0.55, 0.8), (0.5, 0.92)], (255, 232, 130))
    pen.polygon([(0.33, 0.55), (0.14, 0.84), (0.36, 0.8)], _shade(colour, 0.65))
    pen.polygon([(0.67, 0.55), (0.86, 0.84), (0.64, 0.8)], _shade(colour, 0.65))
    pen.ellipse(0.31, 0.02, 0.69, 1.0, (0, 0, 0))
    pen.ellipse(0.31, 0.02, 0.69, 0.96, colour)
    pen.polygon([(0.34, 0.8), (0.66, 0.8), (0.72, 1.0), (0.28, 1.0)], (0, 0, 0))
    pen.polygon([(0.43, 0.81), (0.57, 0.81), (0.5, 0.99)], (255, 168, 46))
    pen.ellipse(0.41, 0.3, 0.59, 0.48, (232, 232, 238))
    pen.ellipse(0.435, 0.325, 0.565, 0.455, GLASS)


SHAPE_DRAWERS: dict[str, Callable[[_Pen, Rgb], None]] = {
    "balloon": _balloon, "boat": _boat, "house": _house, "tree": _tree, "star": _star,
    "fish": _fish, "heart": _heart, "mushroom": _mushroom, "umbrella": _umbrella, "cup": _cup,
    "kite": _kite, "car": _car, "flower": _flower, "rocket": _rocket,
}  # fmt: skip


@lru_cache(maxsize=256)
def sprite(shape: str, colour: str) -> Image.Image:
    """One object, RGBA, shaded from the upper left. Pure black is transparent while drawing."""
    canvas = Image.new("RGB", (2 * SPRITE_PX, 2 * SPRITE_PX))
    SHAPE_DRAWERS[shape](_Pen(canvas), PIXELS[colour])
    flat = np.asarray(canvas, np.float32)
    opaque = flat.any(axis=2)
    axis = np.linspace(-1, 1, 2 * SPRITE_PX, dtype=np.float32)
    light = 1.04 - 0.2 * (axis[None, :] * 0.5 + axis[:, None])
    shaded = np.clip(flat * light[..., None], 0, 255)
    shaded[~opaque] = 0.75 * PIXELS[colour][0], 0.75 * PIXELS[colour][1], 0.75 * PIXELS[colour][2]
    rgba = np.dstack([shaded, 255.0 * opaque]).astype(np.uint8)
    return Image.fromarray(rgba).resize((SPRITE_PX, SPRITE_PX), Image.Resampling.BOX)


def _centres(count: int, centre: Point, spread: float, rng: np.random.Generator) -> list[Point]:
    """Where `count` copies stand around a centre: side by side, the third and fourth behind."""
    x, y = centre
    layouts: dict[int, list[Point]] = {
        1: [(0, 0)],
        2: [(-0.62, 0.1), (0.62, -0.1)],
        3: [(-0.7, 0.42), (0.7, 0.42), (0, -0.62)],
        4: [(-0.64, -0.6), (0.64, -0.6), (-0.64, 0.6), (0.64, 0.6)],
    }
    jitter = rng.normal(0, 0.05, (count, 2))
    return [
        (x + spread * (dx + jx), y + spread * (dy + jy))
        for (dx, dy), (jx, jy) in zip(layouts[count], jitter, strict=True)
    ]


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[Item, Point, float]]:
    """Centre and size of every object, in shares of the picture's side, far ones first."""
    shift = rng.normal(0, 0.025, 2)
    if len(scene.items) == 1:
        high = 0.46 if scene.items[0].shape in FLYING else 0.6
        centres, extent = [(0.5 + 2 * shift[0], high + shift[1])], 0.4
    else:
        first = {
            "above": (0.5, 0.27), "below": (0.5, 0.74), "left of": (0.26, 0.55),
            "right of": (0.74, 0.55),
        }[scene.relation or "left of"]  # fmt: skip
        second = (1 - first[0], 1.01 - first[1] if first[0] == 0.5 else first[1])
        centres = [(x + shift[0], y + shift[1]) for x, y in (first, second)]
        extent = 0.32
    placed = []
    for item, centre in zip(scene.items, centres, strict=True):
        count = item.count or 1
        size = extent * SCALE[item.size or "medium"] * (1.0, 0.74, 0.64, 0.6)[count - 1]
        for point in _centres(count, centre, size * 0.84, rng):
            placed.append((item, point, size))
    return sorted(placed, key=lambda entry: entry[1][1])


def render(scene: Scene, rng: np.random.Generator, image_size: int = 64) -> Image.Image:
    """Draw a complete scene: RGB, `image_size` square."""
    picture = PAINTERS[scene.setting or "meadow"](image_size, rng)
    shadow = Image.new("L", picture.size)
    placed = _place(scene, rng)
    pen = ImageDraw.Draw(shadow)
    for _, (x, y), size in placed:
        half, low = 0.42 * size * image_size, (y + 0.48 * size) * image_size
        left = x * image_size + 0.06 * size * image_size
        pen.ellipse((left - half, low - half * 0.2, left + half, low + half * 0.24), 110)
    shadow = shadow.filter(ImageFilter.GaussianBlur(image_size / 52))
    picture.paste((16, 18, 34), (0, 0), shadow)
    for item, (x, y), size in placed:
        side = max(4, round(size * image_size))
        tile = sprite(item.shape or "star", item.colour or "red")
        tile = tile.resize((2 * side, 2 * side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        if item.shape not in ("house", "tree"):
            tile = tile.rotate(float(rng.normal(0, 4)), Image.Resampling.BILINEAR)
        tile = tile.reduce(2)
        corner = round(x * image_size - side / 2), round(y * image_size - side / 2)
        picture.paste(tile, corner, tile)
    return picture
