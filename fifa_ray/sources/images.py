"""Encoded image bytes -> an RGB image, or the reason why not.

Pixels come out as the reward models' authors get them from `Image.open(...).convert("RGB")`: EXIF
orientation is not applied, an alpha channel is dropped (not blended with a background), an
animation gives its first frame, a palette and CMYK are converted. One exception: 16-bit grey is
scaled to 8 bits, where a plain conversion would clip nearly every pixel to white.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# Nothing else is tried: each decoder less is attack surface less.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadImage(ValueError):
    """An image that cannot be used. `reason` is a quarantine reason, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a whole image to mode RGB.

    Raises BadImage with the reason `empty_image` (no bytes), `image_too_large` (more than
    `max_pixels` by its header, before anything is decoded) or `corrupt_image` (not one of
    `FORMATS`, damaged or cut short).
    """
    if not data:
        raise BadImage("empty_image", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit, a second line of defence; ours is below it unless configured higher.
        raise BadImage("image_too_large", str(error)) from None
    except Exception as error:
        raise BadImage("corrupt_image", _describe(error)) from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            detail = f"{width} x {height} pixels, allowed {max_pixels:,}"
            raise BadImage("image_too_large", detail)
        try:
            image.load()
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:
            # Decoders raise whatever they like on damaged bytes: OSError, ValueError, IndexError,
            # struct.error, zlib.error, ...
            raise BadImage("corrupt_image", _describe(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _describe(error: Exception) -> str:
    # Pillow's message on unknown bytes names a memory address, which would differ in every run.
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"[:200]
