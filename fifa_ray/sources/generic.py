"""The generic layout: a row has a prompt, a chosen and a rejected image.

Parquet: an image is bytes, the `{bytes, path}` struct of the `datasets` library, or a path or URL.
JSON and JSON lines: a path or URL. Your own column names go into `ingest.columns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fifa_ray.schema import check_columns
from fifa_ray.sources.source import metadata_table

NEEDED = ("prompt", "chosen", "rejected")
OPTIONAL = ("chosen_uid", "rejected_uid", "source_id", "model_chosen", "model_rejected")


@dataclass(frozen=True)
class Columns:
    """Which column of the dataset holds each field: `names` maps ours to theirs."""

    names: dict[str, str]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - {*NEEDED, *OPTIONAL})
        if unknown:
            raise ValueError(
                f"ingest.columns names {unknown}; its keys are {[*NEEDED, *OPTIONAL]}, its values "
                "the names of your columns"
            )

    def find(self, found: Sequence[str], where: str) -> dict[str, str]:
        """Our field -> their column, of those that are there.

        Raises ValueError where a needed or a configured one is missing.
        """
        needed = [self.names.get(name, name) for name in NEEDED]
        configured = list(self.names.values())
        try:
            check_columns(found, [*dict.fromkeys([*needed, *configured])], where)
        except ValueError as error:
            raise ValueError(
                f"{error}; map yours as ingest.columns.prompt=NAME and so on"
            ) from None
        fields = {name: self.names.get(name, name) for name in (*NEEDED, *OPTIONAL)}
        return {name: column for name, column in fields.items() if column in found}


@dataclass(frozen=True)
class GenericTable:
    """Parquet with the generic columns. `image_columns` are those that hold bytes."""

    columns: Columns
    image_columns: tuple[str, ...]
    format: str = "generic"
    whole_files: bool = False

    @staticmethod
    def of(schema: pa.Schema, columns: Columns, where: str) -> "GenericTable":
        """The layout of files with this schema. Raises ValueError where it does not fit."""
        fields = columns.find(schema.names, where)
        stored = [
            fields[n] for n in ("chosen", "rejected") if _holds_bytes(schema, fields[n], where)
        ]
        return GenericTable(columns, tuple(stored))

    def read_columns(self, found: Sequence[str], where: str) -> list[str]:
        """The fields that are there, without image bytes."""
        return [c for c in self.columns.find(found, where).values() if c not in self.image_columns]

    def pairs(self, table: pa.Table, first_row: int) -> pa.Table:
        """One METADATA row per source row."""
        fields = {name: self.columns.names.get(name, name) for name in (*NEEDED, *OPTIONAL)}
        text = {
            name: table.column(column).cast(pa.string())
            for name, column in fields.items()
            if column in table.column_names
        }
        refs = {side: text.get(side) for side in ("chosen", "rejected")}
        for side, column in refs.items():
            if column is None:
                refs[side] = pa.repeat(pa.scalar(fields[side]), len(table))
        return metadata_table(
            len(table),
            source_row=np.arange(first_row, first_row + len(table)),
            source_group=np.zeros(len(table), np.int32),
            prompt=text["prompt"],
            chosen_ref=refs["chosen"],
            rejected_ref=refs["rejected"],
            **{name: text[name] for name in OPTIONAL if name in text},
            **{
                f"{side}_uid": text[side]
                for side in ("chosen", "rejected")
                if side in text and f"{side}_uid" not in text
            },
        )


@dataclass(frozen=True)
class GenericRecords:
    """JSON objects with the generic keys."""

    columns: Columns
    format: str = "generic"

    def check(self, keys: Sequence[str], where: str) -> None:
        """Raise ValueError where the first record lacks a key."""
        self.columns.find(keys, where)

    def expand(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The one pair of a record."""
        pair = {}
        for name in (*NEEDED, *OPTIONAL):
            value = record.get(self.columns.names.get(name, name))
            pair[name] = value if value is None else str(value)
        chosen, rejected = pair.pop("chosen"), pair.pop("rejected")
        pair["chosen_uid"] = pair["chosen_uid"] or chosen
        pair["rejected_uid"] = pair["rejected_uid"] or rejected
        return [pair | {"chosen_ref": chosen, "rejected_ref": rejected}]


def _holds_bytes(schema: pa.Schema, column: str, where: str) -> bool:
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return False
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        return True
    raise ValueError(
        f"{where}: column {column!r} has the type {kind}; expected image bytes (binary), a struct "
        "of bytes and path, or a path or URL (string)"
    )
