"""Galleries of pairs with both images: the best, the just missed, the contradicted, the worst."""

import base64
import io
from typing import Any

from PIL import Image, ImageOps

from fifa_ray.report.section import Absent, Section
from fifa_ray.report.tables import HIDDEN_PROMPT, RunTables
from fifa_ray.schema import PROMPT_ID

THUMBNAIL_SIDE = 256
WEBP_QUALITY = 72
# Decoding stops before an image bomb of a table that someone else wrote fills the memory.
MAX_PIXELS = 64_000_000
GROUPS = {
    "best": ("Best", "The highest importance scores."),
    "just_missed": ("Just missed", "The next pairs, had the selection been larger."),
    "disagrees": (
        "Contradicted",
        "The reward model prefers what the people rejected, and by the largest margin.",
    ),
    "worst": ("Worst", "The lowest importance scores among pairs that pass every filter."),
}
TERMS = ("margin_term", "quality_term", "diversity_term")


def galleries(tables: RunTables) -> Section:
    """The groups of gallery/ with thumbnails, `report.gallery_size` pairs each."""
    if not tables.has("gallery"):
        raise Absent(
            "gallery/ is not in this run; the stage select writes it, unless select.images or "
            "report.enabled is off."
        )
    size = tables.settings.gallery_size
    if not size:
        raise Absent("The galleries are switched off: report.gallery_size is 0.")
    rows = tables.run.read_table("gallery").to_pylist()
    largest = max([abs(row[term] or 0.0) for row in rows for term in TERMS], default=0.0) or 1.0
    groups, notes = [], []
    for name, (title, explanation) in GROUPS.items():
        found = [row for row in rows if row["group"] == name]
        if not found:
            notes.append(f"No pair is in the group {title.lower()!r}.")
            continue
        groups.append(
            {
                "title": title,
                "explanation": explanation,
                "pairs": [_card(row, tables.harmful_ids) for row in found[:size]],
            }
        )
    values = {"groups": groups, "largest": largest}
    return Section(template="galleries.html.j2", values=values, notes=tuple(notes))


def thumbnail(image_bytes: bytes | None) -> str | None:
    """A small WebP data URI of an encoded image, upright, without metadata; None if unreadable."""
    if not image_bytes:
        return None
    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            encoded = io.BytesIO()
            small.save(encoded, "WEBP", quality=WEBP_QUALITY, method=6)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _card(row: dict[str, Any], harmful: set[int]) -> dict[str, Any]:
    images = {side: thumbnail(row[f"{side}_image"]) for side in ("chosen", "rejected")}
    prompt = HIDDEN_PROMPT if row[PROMPT_ID] in harmful else row["prompt"]
    return row | {"images": images, "prompt": prompt}
