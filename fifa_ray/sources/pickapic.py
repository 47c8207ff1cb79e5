"""Pick-a-Pic v1 and v2: parquet with a caption, two images and a soft label each.

`jpg_0` and `jpg_1` hold the bytes; the `no_images` variant has `image_0_url` and `image_1_url`
alone. Labels are 1/0, 0/1, or 0.5/0.5 for a tie; `has_label` false marks rows nobody judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray.schema import check_columns
from fifa_ray.sources.source import metadata_table

NEEDED = ("caption", "label_0", "label_1")
OPTIONAL = (
    "has_label",
    "best_image_uid",
    "image_0_uid",
    "image_1_uid",
    "model_0",
    "model_1",
    "ranking_id",
)
BYTES = ("jpg_0", "jpg_1")
URLS = ("image_0_url", "image_1_url")


@dataclass(frozen=True)
class PickAPic:
    """Column layout of Pick-a-Pic; `has_bytes` false for the variant with URLs alone."""

    has_bytes: bool
    format: str = "pickapic"
    whole_files: bool = False

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns with image bytes."""
        return BYTES if self.has_bytes else ()

    def read_columns(self, found: Sequence[str], where: str) -> list[str]:
        """Caption, labels and what else is there, never the image bytes."""
        check_columns(found, (*NEEDED, *(BYTES if self.has_bytes else URLS)), where)
        urls = () if self.has_bytes else URLS
        return [*NEEDED, *urls, *(name for name in OPTIONAL if name in found)]

    def pairs(self, table: pa.Table, first_row: int) -> pa.Table:
        """One METADATA row per source row."""
        refs = [pa.scalar(name) for name in BYTES]
        if not self.has_bytes:
            refs = [table.column(name).cast(pa.string()) for name in URLS]
        return labelled_pairs(table, refs, first_row)


def labelled_pairs(table: pa.Table, refs: Sequence[Any], first_row: int) -> pa.Table:
    """METADATA of rows with Pick-a-Pic's label columns; `refs` are those of image 0 and 1."""
    first_is_chosen, reason, detail = read_labels(table)
    mask = pa.array(first_is_chosen)

    def chosen(pair: Sequence[Any]) -> pa.Array:
        return pc.if_else(mask, *pair)

    def rejected(pair: Sequence[Any]) -> pa.Array:
        return pc.if_else(mask, *reversed(pair))

    # Without names of its own an image is known by its URL, never by the column it is in.
    is_place = all(isinstance(ref, pa.Array | pa.ChunkedArray) for ref in refs)
    uids = _both(table, "image_{}_uid") or (refs if is_place else None)
    models = _both(table, "model_{}")
    return metadata_table(
        len(table),
        source_row=np.arange(first_row, first_row + len(table)),
        source_group=np.zeros(len(table), np.int32),
        prompt=table.column("caption"),
        chosen_ref=chosen(refs),
        rejected_ref=rejected(refs),
        chosen_uid=chosen(uids) if uids else None,
        rejected_uid=rejected(uids) if uids else None,
        source_id=_optional(table, "ranking_id"),
        model_chosen=chosen(models) if models else None,
        model_rejected=rejected(models) if models else None,
        reason=reason,
        detail=detail,
    )


def read_labels(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool (R,) whether image 0 is preferred, object (R,) reason and detail, None where usable.

    Reasons: `unlabelled` (has_label false, or no labels), `tie` (0.5 each) and `bad_label`: any
    other values, or a best_image_uid that names the other image.
    """
    label_0, label_1 = (_floats(table, f"label_{i}") for i in (0, 1))
    first, second = (label_0 == 1) & (label_1 == 0), (label_0 == 0) & (label_1 == 1)
    tie = (label_0 == 0.5) & (label_1 == 0.5)
    unlabelled = np.isnan(label_0) & np.isnan(label_1)
    if "has_label" in table.column_names:
        has_label = table.column("has_label").cast(pa.bool_()).fill_null(True)
        unlabelled |= ~has_label.to_numpy()
    bad = ~(first | second | tie) | _best_is_other(table, first, second)
    reason = np.full(len(table), None, object)
    reason[tie], reason[bad], reason[unlabelled] = "tie", "bad_label", "unlabelled"
    detail = np.full(len(table), None, object)
    for i in np.flatnonzero(reason == "bad_label"):
        best = table.column("best_image_uid")[i] if "best_image_uid" in table.column_names else None
        detail[i] = f"label_0={label_0[i]:g}, label_1={label_1[i]:g}, best_image_uid={best}"
    return first, reason, detail


def _best_is_other(table: pa.Table, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    uids = _both(table, "image_{}_uid")
    if uids is None or "best_image_uid" not in table.column_names:
        return np.zeros(len(table), bool)
    best = table.column("best_image_uid").cast(pa.string())
    is_first, is_second = (pc.equal(best, uid).fill_null(False).to_numpy() for uid in uids)
    other = (first & is_second & ~is_first) | (second & is_first & ~is_second)
    return np.asarray(other)


def _floats(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).cast(pa.float64())
    return np.asarray(pc.fill_null(column, np.nan))


def _optional(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    return table.column(name).cast(pa.string()) if name in table.column_names else None


def _both(table: pa.Table, pattern: str) -> list[pa.ChunkedArray] | None:
    found = [_optional(table, pattern.format(i)) for i in (0, 1)]
    return None if None in found else [column for column in found if column is not None]
