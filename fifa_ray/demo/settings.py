"""The ten settings of the demo world, painted behind the objects.

A painter takes the picture's side in pixels and a generator and returns an RGB image; it draws at
`SUPERSAMPLE` times the size and scales down. Coordinates below are shares of the side.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rgb = tuple[int, int, int]
Painter = Callable[[int, np.random.Generator], Image.Image]
SUPERSAMPLE = 3


def _gradient(side: int, stops: list[tuple[float, Rgb]]) -> Image.Image:
    """A vertical gradient through (height, colour) stops."""
    heights, colours = zip(*stops, strict=True)
    rows = np.linspace(0, 1, side)
    channels = [np.interp(rows, heights, [colour[i] for colour in colours]) for i in range(3)]
    column = np.stack(channels, axis=1).astype(np.uint8)[:, None, :]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (side, side, 3))))


def _glow(
    canvas: Image.Image, x: float, y: float, radius: float, colour: Rgb, strength: float = 0.8
) -> None:
    """A soft light around a point, fading to nothing at `radius`."""
    side = canvas.width
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    far = np.hypot(axis[None, :] - x, axis[:, None] - y) / radius
    mask = Image.fromarray((255 * strength * np.clip(1 - far, 0, 1) ** 1.5).astype(np.uint8))
    canvas.paste(colour, (0, 0), mask)


def _hill(
    pen: ImageDraw.ImageDraw, side: int, rng: np.random.Generator, base: float, height: float,
    colour: Rgb,
) -> None:  # fmt: skip
    """A rolling ridge from edge to edge, filled down to the bottom."""
    x = np.linspace(0, 1, 25)
    phase, pitch = rng.uniform(0, 2 * np.pi, 2), rng.uniform(3, 7)
    y = base - height * (
        0.6 * np.sin(pitch * x + phase[0]) + 0.4 * np.sin(2.3 * pitch * x + phase[1])
    )
    outline = [(a * side, b * side) for a, b in zip(x, y, strict=True)]
    pen.polygon([*outline, (side, side), (0, side)], colour)


def _disc(pen: ImageDraw.ImageDraw, side: int, x: float, y: float, r: float, colour: Rgb) -> None:
    pen.ellipse(((x - r) * side, (y - r) * side, (x + r) * side, (y + r) * side), colour)


def _clouds(canvas: Image.Image, rng: np.random.Generator, count: int, lowest: float) -> None:
    side = canvas.width
    layer = Image.new("L", (side // 2, side // 2))
    pen = ImageDraw.Draw(layer)
    for _ in range(count):
        x, y, width = rng.uniform(0, 1), rng.uniform(0.06, lowest), rng.uniform(0.07, 0.12)
        for dx, dy, size in ((-0.9, 0.15, 0.6), (0, -0.1, 0.9), (0.9, 0.12, 0.65)):
            _disc(pen, side // 2, x + dx * width, y + dy * width, size * width * 0.7, 190)  # type: ignore[arg-type]
    soft = layer.filter(ImageFilter.GaussianBlur(side / 130)).resize(canvas.size)
    canvas.paste((255, 255, 255), (0, 0), soft)


def _night(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (14, 16, 52)), (0.7, (44, 46, 104)), (1, (78, 72, 134))])
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2)
    _glow(canvas, x, y, 0.34, (206, 212, 255), 0.55)
    pen = ImageDraw.Draw(canvas)
    for px, py, size in rng.uniform(0, 1, (26, 3)):
        _disc(pen, side, px, 0.78 * py, 0.004 + 0.006 * size**2, (250, 246, 224))
    _disc(pen, side, x, y, 0.075, (250, 246, 220))
    _disc(pen, side, x + 0.03, y - 0.015, 0.062, (66, 70, 128))
    _hill(pen, side, rng, 0.86, 0.03, (24, 26, 62))
    return canvas


def _beach(side: int, rng: np.random.Generator) -> Image.Image:
    horizon = rng.uniform(0.36, 0.44)
    canvas = _gradient(side, [
        (0, (108, 190, 240)), (horizon - 0.01, (206, 236, 250)), (horizon, (36, 142, 188)),
        (horizon + 0.18, (96, 206, 214)), (horizon + 0.2, (236, 214, 164)), (1, (222, 190, 132)),
    ])  # fmt: skip
    _glow(canvas, rng.uniform(0.1, 0.9), 0.1, 0.3, (255, 250, 214), 0.9)
    _clouds(canvas, rng, 2, 0.25)
    pen = ImageDraw.Draw(canvas)
    x = np.linspace(0, 1, 25)
    foam = horizon + 0.19 + 0.012 * np.sin(14 * x + rng.uniform(0, 6))
    pen.line(
        [(a * side, b * side) for a, b in zip(x, foam, strict=True)], (250, 252, 250), side // 50
    )
    return canvas


def _forest(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (190, 220, 180)), (0.6, (116, 166, 114)), (1, (58, 98, 58))])
    pen = ImageDraw.Draw(canvas)
    for depth, colour in ((0, (126, 172, 122)), (1, (84, 134, 88)), (2, (48, 94, 60))):
        for x in rng.uniform(-0.05, 1.05, 7):
            foot, width = 0.6 + 0.07 * depth, 0.07 + 0.02 * depth
            tip = foot - rng.uniform(0.36, 0.56)
            for tier in range(3):
                top, half = tip + (foot - tip) * tier / 4, width * (0.5 + 0.25 * tier)
                low = tip + (foot - tip) * (tier + 2) / 4
                points = [(x, top), (x + half, low), (x - half, low)]
                pen.polygon([(a * side, b * side) for a, b in points], colour)
    _hill(pen, side, rng, 0.72, 0.02, (74, 116, 62))
    _glow(canvas, 0.5, 0.95, 0.55, (130, 168, 90), 0.6)
    return canvas


def _city(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (150, 180, 214)), (0.7, (232, 224, 216)), (1, (232, 224, 216))])
    pen = ImageDraw.Draw(canvas)
    for colour, low, high in (((164, 176, 198), 0.2, 0.4), ((112, 124, 152), 0.36, 0.56)):
        left = rng.uniform(-0.1, 0.0)
        while left < 1:
            right, top = left + rng.uniform(0.1, 0.19), rng.uniform(low, high)
            pen.rectangle((left * side, top * side, right * side, 0.78 * side), colour)
            for wx in np.arange(left + 0.025, right - 0.03, 0.04):
                for wy in np.arange(top + 0.03, 0.72, 0.06):
                    if rng.random() < 0.5:
                        box = (wx * side, wy * side, (wx + 0.018) * side, (wy + 0.028) * side)
                        pen.rectangle(box, (250, 232, 170))
            left = right + 0.01
    pen.rectangle((0, 0.78 * side, side, side), (104, 106, 116))
    pen.rectangle((0, 0.76 * side, side, 0.8 * side), (176, 174, 172))
    for x in np.arange(rng.uniform(0, 0.2), 1, 0.24):
        pen.rectangle((x * side, 0.895 * side, (x + 0.11) * side, 0.91 * side), (236, 230, 200))
    return canvas


def _sunset(side: int, rng: np.random.Generator) -> Image.Image:
    horizon = rng.uniform(0.58, 0.66)
    canvas = _gradient(side, [
        (0, (92, 62, 130)), (0.3, (222, 106, 116)), (horizon, (255, 190, 108)),
        (horizon + 0.005, (196, 92, 104)), (1, (66, 44, 96)),
    ])  # fmt: skip
    x = rng.uniform(0.2, 0.8)
    _glow(canvas, x, horizon, 0.5, (255, 226, 140), 0.75)
    pen = ImageDraw.Draw(canvas)
    pen.pieslice(
        ((x - 0.11) * side, (horizon - 0.11) * side, (x + 0.11) * side, (horizon + 0.11) * side),
        180, 360, (255, 244, 190),
    )  # fmt: skip
    for step in range(5):
        y, half = horizon + 0.03 + 0.06 * step, 0.1 - 0.012 * step + rng.uniform(-0.02, 0.02)
        pen.rectangle(
            ((x - half) * side, y * side, (x + half) * side, (y + 0.014) * side), (255, 204, 136)
        )
    return canvas


def _mountains(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (98, 150, 212)), (0.7, (214, 232, 246)), (1, (238, 244, 250))])
    _clouds(canvas, rng, 2, 0.2)
    pen = ImageDraw.Draw(canvas)
    peaks = ((0.15, 0.34), (0.85, 0.3), (0.5, 0.2))
    for (x, top), colour in zip(
        peaks, ((122, 140, 176), (110, 128, 168), (92, 110, 152)), strict=True
    ):
        x, top, half = x + rng.normal(0, 0.06), top + rng.normal(0, 0.03), 0.42
        points = [(x, top), (x + half, 0.8), (x - half, 0.8)]
        pen.polygon([(a * side, b * side) for a, b in points], colour)
        snow = [(x, top), (x + 0.11, top + 0.14), (x + 0.04, top + 0.11), (x - 0.02, top + 0.16),
                (x - 0.06, top + 0.11), (x - 0.11, top + 0.14)]  # fmt: skip
        pen.polygon([(a * side, b * side) for a, b in snow], (250, 252, 255))
    _hill(pen, side, rng, 0.76, 0.03, (228, 236, 246))
    return canvas


def _desert(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (250, 196, 128)), (0.5, (255, 232, 186)), (1, (255, 232, 186))])
    x, y = rng.uniform(0.15, 0.85), rng.uniform(0.12, 0.2)
    _glow(canvas, x, y, 0.3, (255, 255, 236), 0.95)
    pen = ImageDraw.Draw(canvas)
    _hill(pen, side, rng, 0.56, 0.05, (224, 158, 96))
    _hill(pen, side, rng, 0.68, 0.05, (208, 134, 76))
    _hill(pen, side, rng, 0.82, 0.04, (190, 112, 62))
    return canvas


def _underwater(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (92, 208, 220)), (0.6, (20, 112, 160)), (1, (10, 62, 110))])
    rays = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(rays)
    for x in rng.uniform(0, 1, 4):
        points = [(x, 0), (x + 0.09, 0), (x + 0.3, 0.9), (x + 0.1, 0.9)]
        pen.polygon([(a * side, b * side) for a, b in points], 34)
    canvas.paste((240, 255, 255), (0, 0), rays.filter(ImageFilter.GaussianBlur(side / 60)))
    pen = ImageDraw.Draw(canvas)
    _hill(pen, side, rng, 0.88, 0.02, (188, 172, 128))
    for x in rng.uniform(0, 1, 5):
        height, sway = rng.uniform(0.12, 0.26), rng.uniform(-0.05, 0.05)
        points = [(x - 0.02, 0.96), (x + sway, 0.9 - height), (x + 0.02, 0.96)]
        pen.polygon([(a * side, b * side) for a, b in points], (38, 128, 100))
    for x, y, size in rng.uniform(0, 1, (9, 3)):
        radius = 0.008 + 0.014 * size
        box = [(v * side) for v in (x - radius, 0.8 * y - radius, x + radius, 0.8 * y + radius)]
        pen.ellipse(box, outline=(196, 238, 246), width=max(1, side // 120))
    return canvas


def _meadow(side: int, rng: np.random.Generator) -> Image.Image:
    canvas = _gradient(side, [(0, (122, 194, 240)), (0.6, (222, 242, 250)), (1, (222, 242, 250))])
    _clouds(canvas, rng, 3, 0.3)
    pen = ImageDraw.Draw(canvas)
    _hill(pen, side, rng, 0.56, 0.04, (150, 204, 110))
    _hill(pen, side, rng, 0.68, 0.03, (116, 184, 84))
    tints = ((255, 250, 240), (250, 220, 90), (246, 170, 196))
    for index, (x, y) in enumerate(rng.uniform(0, 1, (16, 2))):
        _disc(pen, side, x, 0.76 + 0.23 * y, 0.007 + 0.006 * y, tints[index % 3])
    return canvas


def _room(side: int, rng: np.random.Generator) -> Image.Image:
    wall = ((222, 206, 190), (200, 212, 206), (214, 204, 222))[rng.integers(3)]
    canvas = _gradient(side, [(0, wall), (1, tuple(round(0.9 * c) for c in wall))])  # type: ignore[list-item]
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0.74 * side, side, side), (166, 116, 76))
    for y in (0.8, 0.87, 0.94):
        pen.line((0, y * side, side, y * side), (148, 100, 64), max(1, side // 90))
    pen.rectangle((0, 0.72 * side, side, 0.745 * side), (240, 234, 226))
    x = rng.choice([0.1, 0.62])
    pen.rectangle((x * side, 0.1 * side, (x + 0.28) * side, 0.4 * side), (250, 248, 242))
    for px in (x + 0.02, x + 0.15):
        for py in (0.12, 0.26):
            pen.rectangle(
                (px * side, py * side, (px + 0.11) * side, (py + 0.12) * side), (160, 208, 238)
            )
    _glow(canvas, x + 0.14, 0.25, 0.5, (255, 250, 230), 0.3)
    return canvas


def _at_size(paint: Painter) -> Painter:
    def painter(image_size: int, rng: np.random.Generator) -> Image.Image:
        """Paint large, return the size wanted."""
        large = paint(SUPERSAMPLE * image_size, rng)
        return large.resize((image_size, image_size), Image.Resampling.BOX)

    return painter


PAINTERS: dict[str, Painter] = {
    name: _at_size(paint)
    for name, paint in {
        "night": _night, "beach": _beach, "forest": _forest, "city": _city, "sunset": _sunset,
        "mountains": _mountains, "desert": _desert, "underwater": _underwater, "meadow": _meadow,
        "room": _room,
    }.items()
}  # fmt: skip
