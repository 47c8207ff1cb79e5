"""Datasets that rank several images of a prompt: every pair of a ranking becomes a pair.

HPDv2 (Wu et al., arXiv 2306.09341): `train.json` with two images and 1/0 in `human_preference`,
`test.json` with many and their mean `rank`, the best lowest. HPDv3 (Ma et al., arXiv 2508.03789):
`path1` is preferred to `path2`. ImageRewardDB (Xu et al., arXiv 2304.05977): parquet with one row
an image, `rank` within its `prompt_id`, the best lowest; equal ranks are ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyarrow as pa

from fifa_ray.schema import MAX_PAIRS_PER_ROW, check_columns
from fifa_ray.sources.records import bad_row
from fifa_ray.sources.source import METADATA, metadata_table


@dataclass(frozen=True)
class HpdV2:
    """JSON objects with `prompt` and images in `file_path` (train) or `image_path` (test)."""

    format: str = "hpdv2"

    def check(self, keys: Sequence[str], where: str) -> None:
        """Raise ValueError where the first record is of neither split."""
        if not is_hpdv2(keys):
            raise ValueError(
                f"{where} does not have the hpdv2 layout (prompt, human_preference, file_path; or "
                f"prompt, rank, image_path); its records have {sorted(keys)}"
            )

    def expand(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The pairs of a record."""
        prompt = _text(record.get("prompt"))
        if "human_preference" in record:
            preferences = record["human_preference"]
            if not _are_numbers(preferences):
                return [bad_row("bad_label", f"human_preference={preferences!r}"[:200])]
            return expand_ranking(prompt, record.get("file_path"), [-p for p in preferences])
        return expand_ranking(prompt, record.get("image_path"), record.get("rank"))


@dataclass(frozen=True)
class HpdV3:
    """JSON objects with `prompt`, `path1` (preferred) and `path2`."""

    format: str = "hpdv3"

    def check(self, keys: Sequence[str], where: str) -> None:
        """Raise ValueError where the first record lacks a key."""
        check_columns(keys, ("prompt", "path1", "path2"), where)

    def expand(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The one pair of a record."""
        chosen, rejected = _text(record.get("path1")), _text(record.get("path2"))
        return [
            {
                "prompt": _text(record.get("prompt")),
                "chosen_ref": chosen,
                "rejected_ref": rejected,
                "chosen_uid": chosen,
                "rejected_uid": rejected,
                "model_chosen": _text(record.get("model1")),
                "model_rejected": _text(record.get("model2")),
            }
        ]


@dataclass(frozen=True)
class ImageReward:
    """ImageRewardDB's metadata parquet; images are the unpacked files that `image_path` names."""

    format: str = "imagereward"
    image_columns: tuple[str, ...] = ()
    whole_files: bool = True

    def read_columns(self, found: Sequence[str], where: str) -> list[str]:
        """The four columns that make pairs."""
        columns = ["prompt_id", "prompt", "image_path", "rank"]
        check_columns(found, columns, where)
        return columns

    def pairs(self, table: pa.Table, first_row: int) -> pa.Table:
        """All pairs of each prompt_id, at the row where that prompt comes first."""
        rows_of: dict[Any, list[int]] = {}
        rows = table.to_pylist()
        for row, values in enumerate(rows):
            rows_of.setdefault(values["prompt_id"], []).append(row)
        columns: dict[str, list[Any]] = {name: [] for name in METADATA.names}
        for prompt_id, members in rows_of.items():
            images = [rows[row] for row in members]
            pairs = expand_ranking(
                images[0]["prompt"],
                [image["image_path"] for image in images],
                [image["rank"] for image in images],
            )
            for index, pair in enumerate(pairs):
                pair |= {
                    "source_row": first_row + members[0],
                    "pair_in_row": index,
                    "source_group": 0,
                    "source_id": _text(prompt_id),
                }
                for name, values in columns.items():
                    values.append(pair.get(name))
        return metadata_table(len(columns["source_row"]), **columns)


def is_hpdv2(keys: Sequence[str]) -> bool:
    """Whether a record's keys are those of HPDv2's train or test split."""
    splits = ({"prompt", "human_preference", "file_path"}, {"prompt", "rank", "image_path"})
    return any(split <= set(keys) for split in splits)


def expand_ranking(prompt: str | None, paths: Any, ranks: Any) -> list[dict[str, Any]]:
    """METADATA fields of every pair of a ranking, the best rank lowest; equal ranks are ties.

    A ranking that cannot be read gives one row with the reason `bad_label`, `too_few_images` or
    `too_many_images`.
    """
    if not isinstance(paths, list) or not _are_numbers(ranks) or len(paths) != len(ranks):
        detail = f"expected one number for each image, got {ranks!r} for {paths!r}"
        return [bad_row("bad_label", detail[:200], prompt=prompt)]
    if len(paths) < 2:
        return [bad_row("too_few_images", f"{len(paths)} images", prompt=prompt)]
    if len(paths) * (len(paths) - 1) // 2 > MAX_PAIRS_PER_ROW:
        return [bad_row("too_many_images", f"{len(paths)} images, allowed 45", prompt=prompt)]
    pairs = []
    for a, b in combinations(range(len(paths)), 2):
        chosen, rejected = (a, b) if ranks[a] <= ranks[b] else (b, a)
        tie = ranks[a] == ranks[b]
        pairs.append(
            {
                "prompt": prompt,
                "chosen_ref": _text(paths[chosen]),
                "rejected_ref": _text(paths[rejected]),
                "chosen_uid": _text(paths[chosen]),
                "rejected_uid": _text(paths[rejected]),
                "reason": "tie" if tie else None,
                "detail": f"rank {ranks[a]:g} each" if tie else None,
            }
        )
    return pairs


def _are_numbers(values: Any) -> bool:
    # NaN is not equal to itself, and no rank.
    return isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v == v for v in values
    )


def _text(value: Any) -> str | None:
    return value if value is None else str(value)
