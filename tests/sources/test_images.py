"""Decoding: what comes out of every kind of image, and the reason where nothing does."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fifa_ray.sources.images import BadImage, decode_image

LIMIT = 10_000_000


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], channels), np.uint8), mode)


def reason_of(data: bytes, limit: int = LIMIT) -> str:
    with pytest.raises(BadImage) as bad:
        decode_image(data, limit)
    return bad.value.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pixels_are_those_of_pillow_convert(kind: str) -> None:
    data = encode(noise(), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode_image(data, LIMIT)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(mode: str) -> None:
    source = noise(mode)
    colour = np.asarray(source)[..., :3] if mode == "RGBA" else np.asarray(source)[..., [0, 0, 0]]
    np.testing.assert_array_equal(np.asarray(decode_image(encode(source, "PNG"), LIMIT)), colour)


def test_palette_cmyk_and_one_bit_become_rgb() -> None:
    for data in (
        encode(noise().quantize(16), "PNG"),
        encode(noise("CMYK"), "JPEG"),
        encode(noise().convert("1"), "PNG"),
    ):
        assert decode_image(data, LIMIT).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_contrast() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG"), LIMIT))
    np.testing.assert_array_equal(decoded[..., 0], ramp >> 8)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by a quarter turn.
    data = encode(noise(size=(40, 30)), "JPEG", exif=exif)
    assert decode_image(data, LIMIT).size == (40, 30)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, LIMIT).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_cut_short_is_corrupt(kind: str) -> None:
    data = encode(noise(size=(200, 200)), kind)
    assert reason_of(data[: len(data) // 2]) == "corrupt_image"


def test_no_bytes_garbage_and_formats_off_the_list() -> None:
    assert reason_of(b"") == "empty_image"
    assert reason_of(b"not an image at all") == "corrupt_image"
    assert reason_of(encode(noise(), "TIFF")) == "corrupt_image"


def test_too_many_pixels_are_refused_before_decoding() -> None:
    data = encode(Image.new("1", (3000, 2000)), "PNG")
    # Cut off behind the header: only a refusal by header can still say too large.
    assert reason_of(data[:64], limit=1_000_000) == "image_too_large"
    assert decode_image(data, 6_000_000).size == (3000, 2000)


def test_what_pillow_calls_a_bomb_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason_of(encode(noise(), "PNG")) == "image_too_large"


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("corrupt_image", "cut short")))
    assert (error.reason, error.detail) == ("corrupt_image", "cut short")
