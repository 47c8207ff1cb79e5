"""Hand-computed image statistics: features for a reward fitted without any learned encoder.

Light, colour, edges, spectrum, compression and texture, some fifty numbers an image. They know
nothing of what is shown, still less of the prompt, so a reward fitted on them is weak: it sees
blur, noise, blocks, washed-out or clipped colours, and the grain that a generator leaves. No
weights, no torch.

Two views of each image are measured: the whole of it at 224 px, for light, colour and composition,
and its middle at its own resolution, for sharpness, noise and JPEG blocks, which a resize would
hide. Shapes: N images, H = W = 224, values in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from fifa_ray.models.image_transform import ResizeAndCrop

VIEW_PX = 224
_JPEG_BLOCK_PX = 8
_TINY = 1e-6
_PATTERN_STEP = 0.01  # A neighbour is brighter by at least so much; less is rounding.
_RARE_SHARE = 1e-3  # Patterns rarer than this are alike: absent.

Statistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class TwoViews:
    """Whole image (short side to 224 px, centre crop) and its native middle: uint8 (6, 224, 224).

    The native crop starts on the JPEG grid. An image smaller than the crop is enlarged first.
    """

    def __call__(self, image: Image.Image) -> np.ndarray:
        """One image of any mode and size to uint8 (6, 224, 224)."""
        image = image.convert("RGB")
        whole = ResizeAndCrop(VIEW_PX, (VIEW_PX, VIEW_PX))(image)
        if min(image.size) < VIEW_PX:
            return np.concatenate([whole, whole])
        left, top = (
            (side - VIEW_PX) // 2 // _JPEG_BLOCK_PX * _JPEG_BLOCK_PX for side in image.size
        )
        middle = image.crop((left, top, left + VIEW_PX, top + VIEW_PX))
        return np.concatenate([whole, np.asarray(middle).transpose(2, 0, 1)])

    @property
    def description(self) -> str:
        """Short text for a manifest."""
        return f"short side {VIEW_PX} px and centre crop, and {VIEW_PX} px of the native middle"


def image_statistics(views: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (N, D) statistics of `TwoViews` arrays, all finite; columns: `STATISTIC_NAMES`."""
    if not len(views):
        return np.empty((0, len(STATISTIC_NAMES)), np.float32)
    # One at a time: the last bits of a sum depend on the shape of the array, and a reward fitted on
    # these numbers must not depend on how images were batched. It is as fast.
    rows = [_statistics(view[None].astype(np.float32) / 255) for view in views]
    return np.array([[value[0] for value in row.values()] for row in rows], np.float32)


def _statistics(views_NCHW: np.ndarray) -> Statistics:
    whole, middle = views_NCHW[:, :3], views_NCHW[:, 3:]
    return (
        _light(_luma(whole))
        | _color(whole)
        | _composition(_luma(whole))
        | _spectrum(_luma(whole))
        | _detail(_luma(middle))
        | _texture(_luma(whole), "fine")
        | _texture(_halved(_luma(whole)), "coarse")
    )


def _luma(rgb_NCHW: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 luma, (N, H, W)."""
    return 0.299 * rgb_NCHW[:, 0] + 0.587 * rgb_NCHW[:, 1] + 0.114 * rgb_NCHW[:, 2]


def _light(luma_NHW: np.ndarray) -> Statistics:
    flat = luma_NHW.reshape(len(luma_NHW), -1)
    mean, std = flat.mean(axis=1), flat.std(axis=1)
    low, median, high = np.percentile(flat, [5, 50, 95], axis=1)
    centered = flat - mean[:, None]
    return {
        "brightness": mean,
        "contrast": std,
        "luma_p5": low,
        "luma_median": median,
        "luma_p95": high,
        "luma_skewness": (centered * centered * centered).mean(axis=1) / (std**3 + _TINY),
        "luma_entropy": _entropy(np.clip(flat * 64, 0, 63).astype(np.int64), 64),
        "black_fraction": (flat < 1.5 / 255).mean(axis=1),
        "white_fraction": (flat > 253.5 / 255).mean(axis=1),
    }


def _color(rgb_NCHW: np.ndarray) -> Statistics:
    red, green, blue = (rgb_NCHW[:, c].reshape(len(rgb_NCHW), -1) for c in range(3))
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=1), yellow_blue.std(axis=1))
    offset = np.hypot(red_green.mean(axis=1), yellow_blue.mean(axis=1))
    brightest, darkest = rgb_NCHW.max(axis=1), rgb_NCHW.min(axis=1)
    saturation = ((brightest - darkest) / (brightest + _TINY)).reshape(len(red), -1)
    cell = np.clip(rgb_NCHW * 6, 0, 5).astype(np.int64)
    cell = (cell[:, 0] * 36 + cell[:, 1] * 6 + cell[:, 2]).reshape(len(red), -1)
    return {
        # Hasler and Suesstrunk, Measuring colourfulness in natural images, 2003, equation 2.
        "colorfulness": spread + 0.3 * offset,
        "red_green_mean": red_green.mean(axis=1),
        "yellow_blue_mean": yellow_blue.mean(axis=1),
        "red_green_std": red_green.std(axis=1),
        "yellow_blue_std": yellow_blue.std(axis=1),
        "saturation_mean": saturation.mean(axis=1),
        "saturation_std": saturation.std(axis=1),
        "color_entropy": _entropy(cell, 216),
    }


def _composition(luma_NHW: np.ndarray) -> Statistics:
    gradient = _gradient(luma_NHW)
    third = VIEW_PX // 3
    central = np.s_[:, third:-third, third:-third]
    energy = (gradient**2).mean(axis=(1, 2))
    centered = luma_NHW - luma_NHW.mean(axis=(1, 2), keepdims=True)
    mirrored = (centered * centered[:, :, ::-1]).mean(axis=(1, 2))
    return {
        "edge_density": (gradient > 0.1).mean(axis=(1, 2)),
        "log_gradient": np.log(gradient.mean(axis=(1, 2)) + _TINY),
        "central_edges": (gradient[central] ** 2).mean(axis=(1, 2)) / (energy + _TINY),
        "central_light": luma_NHW[central].mean(axis=(1, 2)) - luma_NHW.mean(axis=(1, 2)),
        "mirror_symmetry": mirrored / ((centered**2).mean(axis=(1, 2)) + _TINY),
    }


def _spectrum(luma_NHW: np.ndarray) -> Statistics:
    """Slope of log power over log frequency: near -2 for photographs, 0 for white noise."""
    window = np.hanning(VIEW_PX).astype(np.float32)
    centered = luma_NHW - luma_NHW.mean(axis=(1, 2), keepdims=True)
    power = np.abs(np.fft.rfft2(centered * window[:, None] * window)) ** 2
    radius, log_frequency = _radial_bins()
    counts = np.bincount(radius.ravel(), minlength=VIEW_PX)
    rings = range(1, VIEW_PX // 2)
    profile = np.stack([np.bincount(radius.ravel(), p.ravel(), VIEW_PX) for p in power])
    log_power = np.log(profile[:, rings] / counts[rings] + _TINY)
    centered_frequency = log_frequency - log_frequency.mean()
    slope = log_power @ centered_frequency / (centered_frequency**2).sum()
    fitted = log_power.mean(axis=1, keepdims=True) + slope[:, None] * centered_frequency
    total = profile[:, rings].sum(axis=1)
    return {
        "spectral_slope": slope,
        "spectral_misfit": (log_power - fitted).std(axis=1),
        "high_frequency_share": profile[:, VIEW_PX // 4 : VIEW_PX // 2].sum(axis=1)
        / (total + _TINY),
    }


@cache
def _radial_bins() -> tuple[np.ndarray, np.ndarray]:
    """Rounded radius of each coefficient of a half plane, and the logarithms of the used radii."""
    rows = np.fft.fftfreq(VIEW_PX, 1 / VIEW_PX)[:, None]
    columns = np.fft.rfftfreq(VIEW_PX, 1 / VIEW_PX)[None]
    radius = np.minimum(np.rint(np.hypot(rows, columns)).astype(np.int64), VIEW_PX - 1)
    return radius, np.log(np.arange(1, VIEW_PX // 2))


def _detail(luma_NHW: np.ndarray) -> Statistics:
    inner = luma_NHW[:, 1:-1, 1:-1]
    beside = luma_NHW[:, 1:-1, :-2] + luma_NHW[:, 1:-1, 2:]
    above = luma_NHW[:, :-2, 1:-1] + luma_NHW[:, 2:, 1:-1]
    corners = (
        luma_NHW[:, :-2, :-2] + luma_NHW[:, :-2, 2:] + luma_NHW[:, 2:, :-2] + luma_NHW[:, 2:, 2:]
    )
    laplacian = beside + above - 4 * inner
    # Immerkaer, Fast noise variance estimation, 1996: blind to smooth shading and to edges' mean.
    noise = corners - 2 * (beside + above) + 4 * inner
    step = np.abs(np.diff(luma_NHW, axis=2))
    gradient = _gradient(luma_NHW)
    spread = step.std(axis=(1, 2))
    return {
        "log_sharpness": np.log(laplacian.var(axis=(1, 2)) + _TINY),
        "log_noise": np.log(np.sqrt(np.pi / 2) / 6 * np.abs(noise).mean(axis=(1, 2)) + _TINY),
        "log_detail_gradient": np.log(gradient.mean(axis=(1, 2)) + _TINY),
        "flat_fraction": (gradient < 1.2 / 255).mean(axis=(1, 2)),
        "step_peakedness": step.mean(axis=(1, 2)) / (spread + _TINY),
        "blockiness": _blockiness(luma_NHW),
    }


def _texture(luma_NHW: np.ndarray, scale: str) -> Statistics:
    """Log shares of uniform local binary patterns (Ojala et al. 2002, P = 8, R = 1, riu2).

    Pattern k of 0..8: the k neighbours that are brighter than a pixel lie side by side on the ring
    around it; `mixed`: they do not. Rotations count as one.
    """
    height, width = (side - 2 for side in luma_NHW.shape[1:])
    center = luma_NHW[:, 1:-1, 1:-1]
    ring = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
    brighter = [
        luma_NHW[:, y : y + height, x : x + width] > center + _PATTERN_STEP for y, x in ring
    ]
    count, changes = np.zeros(center.shape, np.int64), np.zeros(center.shape, np.int64)
    for here, before in zip(brighter, [brighter[-1], *brighter[:-1]], strict=True):
        count += here
        changes += here ^ before
    pattern = np.where(changes <= 2, count, 9).reshape(len(center), -1)
    names = [f"{scale}_pattern_{kind}" for kind in (*range(9), "mixed")]
    shares = [(pattern == kind).mean(axis=1) for kind in range(10)]
    return {name: np.log(share + _RARE_SHARE) for name, share in zip(names, shares, strict=True)}


def _halved(luma_NHW: np.ndarray) -> np.ndarray:
    """Means of 2 by 2 pixels, (N, H/2, W/2)."""
    rows = luma_NHW[:, ::2] + luma_NHW[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def _blockiness(luma_NHW: np.ndarray) -> np.ndarray:
    """Log ratio of steps across JPEG block borders to all other steps; 0 without blocks, (N,)."""
    ratios = []
    for axis in (1, 2):
        other = 3 - axis
        step = np.abs(np.diff(luma_NHW, axis=axis)).mean(axis=other)
        border = np.arange(step.shape[1]) % _JPEG_BLOCK_PX == _JPEG_BLOCK_PX - 1
        across, within = step[:, border].mean(axis=1), step[:, ~border].mean(axis=1)
        ratios.append(np.log((across + _TINY) / (within + _TINY)))
    return np.mean(ratios, axis=0)


def _gradient(luma_NHW: np.ndarray) -> np.ndarray:
    """Length of the forward difference, (N, H-1, W-1)."""
    across = luma_NHW[:, :-1, 1:] - luma_NHW[:, :-1, :-1]
    down = luma_NHW[:, 1:, :-1] - luma_NHW[:, :-1, :-1]
    return np.hypot(across, down)


def _entropy(labels_NP: np.ndarray, num_labels: int) -> np.ndarray:
    """Shannon entropy in nats of each row's labels, (N,)."""
    offset = np.arange(len(labels_NP))[:, None] * num_labels
    counts = np.bincount((labels_NP + offset).ravel(), minlength=len(labels_NP) * num_labels)
    share = counts.reshape(-1, num_labels) / labels_NP.shape[1]
    return -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)


STATISTIC_NAMES: tuple[str, ...] = tuple(
    _statistics(np.zeros((1, 6, VIEW_PX, VIEW_PX), np.float32))
)
