"""Prompts and their parts as texts of their own, and the answers put together again.

A harmful sentence stays harmful whatever is said around it, so with `judge.check_parts` each
sentence, line, quoted and bracketed part is judged alone too, by whichever engine. Row `part` 0 of
a prompt is the whole of it, 1 to `num_parts` are its parts; an engine sees nothing but texts, and
may answer them in any order and in any block.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray import schema
from fifa_ray.models.judge import JudgeReply, merge_parts
from fifa_ray.scoring.quality import prompt_parts

PART_FIELDS = (
    pa.field("part", pa.int32(), nullable=False),
    pa.field("num_parts", pa.int32(), nullable=False),
)
PARTIAL = pa.schema([*schema.QUALITY, *PART_FIELDS])
REPLY_COLUMNS = schema.QUALITY.names[1:]


def split_prompts(prompts: pa.Table, check_parts: bool) -> pa.Table:
    """(prompt_id, prompt) to (prompt_id, prompt, part, num_parts), one row a text to judge."""
    ids, texts, part, num_parts = [], [], [], []
    for row in prompts.to_pylist():
        pieces = prompt_parts(row["prompt"]) if check_parts else []
        for index, text in enumerate((row["prompt"], *pieces)):
            ids.append(row[schema.PROMPT_ID])
            texts.append(text)
            part.append(index)
            num_parts.append(len(pieces))
    return pa.table(
        [pa.array(ids, pa.int64()), pa.array(texts, pa.string()), part, num_parts],
        schema=pa.schema(
            [
                pa.field(schema.PROMPT_ID, pa.int64()),
                pa.field("prompt", pa.string()),
                *PART_FIELDS,
            ]
        ),
    )


def combine_parts(answers: pa.Table) -> pa.Table:
    """Rows of `PARTIAL` in any order to one row of `schema.QUALITY` for each prompt all answered.

    Of several answers to one text (a block that was redone) a usable one counts.
    """
    if not len(answers):
        return schema.QUALITY.empty_table()
    failed = pc.is_valid(answers.column("quality_error")).to_numpy()
    ids, part = (answers.column(name).to_numpy() for name in (schema.PROMPT_ID, "part"))
    order = np.lexsort((failed, part, ids))
    ids, part = ids[order], part[order]
    first = np.r_[True, (ids[1:] != ids[:-1]) | (part[1:] != part[:-1])]
    rows = answers.take(order[first])
    ids, wanted = ids[first], rows.column("num_parts").to_numpy() + 1
    start = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    found = np.diff(np.r_[start, len(ids)])
    complete = found == wanted[start]
    whole = rows.take(start[complete]).select(schema.QUALITY.names)
    several = np.flatnonzero(found[complete] > 1)
    if not len(several):
        return whole
    merged = {
        int(place): merge_parts(
            *_replies(rows.slice(start[complete][place], found[complete][place]))
        )
        for place in several
    }
    columns = {schema.PROMPT_ID: whole.column(schema.PROMPT_ID)}
    for name in REPLY_COLUMNS:
        values = whole.column(name).to_pylist()
        for place, reply in merged.items():
            values[place] = getattr(reply, name)
        columns[name] = pa.array(values, schema.QUALITY.field(name).type)
    return pa.table(columns, schema=schema.QUALITY)


def _replies(rows: pa.Table) -> tuple[JudgeReply, list[JudgeReply]]:
    """The whole prompt's reply and its parts'."""
    whole, *parts = (
        JudgeReply(**{name: row[name] for name in REPLY_COLUMNS}) for row in rows.to_pylist()
    )
    return whole, parts
