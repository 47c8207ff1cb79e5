"""Rows of pairs -> the tables pairs/ and items/ of `training_data/<key>`, images told apart."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray import schema
from fifa_ray.run_dir import RunDir, part_name

# A part with images ends at the first end of a source group after the smaller number, or at the
# larger one: it is written by one task and should fit into its memory encoded, flips included.
IMAGES_PER_PART = (256, 1024)
PROMPTS_PER_PART = 256


def write_tables(run: RunDir, stage: str, rows: pa.Table, prompts: pa.Table) -> dict[str, Any]:
    """Write pairs/ and items/ below `stage` from rows in the order of the source.

    `rows` has the columns of a pair's places (`source_*`, refs and uids), rank and reward_margin;
    `prompts` the distinct ones and the empty one, sorted by id.
    """
    folder = stage.split("/")
    image_of, images = distinct_images(rows)
    prompt_items = len(images) + np.arange(len(prompts))
    prompt_ids = prompts.column(schema.PROMPT_ID).to_numpy()
    prompt_of = np.searchsorted(prompt_ids, rows.column(schema.PROMPT_ID).to_numpy())
    group = _dense(rows.column("source_file"), rows.column("source_group"))
    pairs = pa.table(
        [
            rows.column(schema.PAIR_ID),
            rows.column(schema.PROMPT_ID),
            pa.array(image_of[:, 0]),
            pa.array(image_of[:, 1]),
            pa.array(prompt_items[prompt_of]),
            rows.column("reward_margin").cast(pa.float32()),
            rows.column("rank"),
            pa.array(group),
        ],
        schema=schema.TRAINING_PAIRS,
    )
    run.write_table(pairs, *folder, "pairs", part_name(0))
    texts = _items(len(prompts), item_id=prompt_items, **_columns(prompts))
    parts = [images.slice(start, stop - start) for start, stop in _image_parts(images)]
    parts += [texts.slice(i, PROMPTS_PER_PART) for i in range(0, len(texts), PROMPTS_PER_PART)]
    for index, part in enumerate(parts):
        run.write_table(part, *folder, "items", part_name(index))
    empty = int(np.flatnonzero(prompt_ids == schema.prompt_id(""))[0])
    return {
        "pairs": len(pairs),
        "images": len(images),
        "prompts": len(prompts) - 1,
        "groups": int(group.max()) + 1,
        "empty_prompt_item": int(prompt_items[empty]),
    }


def _items(count: int, **columns: Any) -> pa.Table:
    """Rows of schema.TRAINING_ITEMS; columns left out are null."""
    arrays = [
        pa.nulls(count, field.type)
        if field.name not in columns
        else columns[field.name].cast(field.type)
        if isinstance(columns[field.name], pa.Array | pa.ChunkedArray)
        else pa.array(columns[field.name], field.type)
        for field in schema.TRAINING_ITEMS
    ]
    return pa.table(arrays, schema=schema.TRAINING_ITEMS)


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


def distinct_images(rows: pa.Table) -> tuple[np.ndarray, pa.Table]:
    """int64 (N, 2) item_id of each row's chosen and rejected image, and the images' items.

    Two images are the same where the dataset gives them the same uid, or is silent on uids and
    they are the same row and reference. An image's place is that of its first pair.
    """
    count = len(rows)
    row = rows.column("source_row").cast(pa.string())
    names = []
    for side in ("chosen", "rejected"):
        place = pc.binary_join_element_wise(
            "place", rows.column("source_file"), row, rows.column(f"{side}_ref"), "\n"
        )
        uid = rows.column(f"{side}_uid")
        named = pc.binary_join_element_wise("uid", uid.cast(pa.string()), "\n")
        names.append(pc.coalesce(named, place).combine_chunks())
    # chosen 0, rejected 0, chosen 1, ...: ids follow the order of the source.
    turns = pa.array(np.arange(2 * count).reshape(2, count).T.ravel())
    encoded = pc.dictionary_encode(pa.concat_arrays(_arrays(names)).take(turns))
    image_of = encoded.indices.to_numpy().astype(np.int64)
    _, first = np.unique(image_of, return_index=True)
    of_row, is_rejected = pa.array(first // 2), pa.array(first % 2 == 1)
    taken = rows.take(of_row)
    refs = pc.if_else(is_rejected, taken.column("rejected_ref"), taken.column("chosen_ref"))
    images = _items(
        len(first),
        item_id=np.arange(len(first)),
        source_file=taken.column("source_file"),
        source_group=taken.column("source_group"),
        source_row=taken.column("source_row"),
        ref=refs,
        pair_id=taken.column(schema.PAIR_ID),
        prompt_id=taken.column(schema.PROMPT_ID),
    )
    return image_of.reshape(count, 2), images


def _arrays(columns: list[Any]) -> list[pa.Array]:
    return [
        chunk
        for column in columns
        for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else [column])
    ]


def _dense(file: pa.ChunkedArray, group: pa.ChunkedArray) -> np.ndarray:
    """int64 number of each row's (file, group), in order of appearance."""
    names = pc.binary_join_element_wise(file, group.cast(pa.string()), "\n").combine_chunks()
    array = pa.concat_arrays(_arrays([names]))
    return np.asarray(pc.dictionary_encode(array).indices.to_numpy(), np.int64)


def _image_parts(images: pa.Table) -> list[tuple[int, int]]:
    smallest, largest = IMAGES_PER_PART
    group = _dense(images.column("source_file"), images.column("source_group"))
    ends = np.append(np.flatnonzero(np.diff(group)) + 1, len(group))
    parts, start = [], 0
    while start < len(group):
        end = ends[np.searchsorted(ends, min(start + smallest, len(group)))]
        stop = int(min(end, start + largest))
        parts.append((start, stop))
        start = stop
    return parts
