"""Lists of prompts to evaluate with: files of several formats, and the packaged list.

Prompts come out as `schema.normalize_prompt` leaves them, each distinct one once, in the order of
the list, with its category where the list has one.
"""

import csv
import io
import json
import logging
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fifa_ray import schema
from fifa_ray.run_dir import resolve_filesystem
from fifa_ray.sources.general_prompts import GENERAL_PROMPTS

logger = logging.getLogger(__name__)

PROMPT_SET = pa.schema(
    [
        pa.field(schema.PROMPT_ID, pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("category", pa.string()),
    ]
)
GENERAL = "general"
MAX_FILE_BYTES = 1_000_000_000

# (where in the file, prompt, category), as the file has them
_Row = tuple[str, Any, Any]


def read_prompt_set(location: str) -> pa.Table:
    """Rows of PROMPT_SET from a file (path or URI, format by suffix) or the list `general`.

    .txt has a prompt a line, blank lines left out. .jsonl and .json hold objects with `prompt` and
    perhaps `category`, or bare strings; .csv, .tsv and .parquet have those columns; upper and lower
    case of their names are the same. An empty prompt is one: what the model draws when told
    nothing. Raises FileNotFoundError, or ValueError that says what was expected where.
    """
    if location == GENERAL:
        listed = [
            (GENERAL, prompt, category)
            for category, prompts in GENERAL_PROMPTS.items()
            for prompt in prompts
        ]
        return prompt_table(listed, GENERAL)
    filesystem, path = resolve_filesystem(location)
    suffix = posixpath.splitext(path)[1].lower()
    if suffix not in _READERS:
        raise ValueError(
            f"evaluate.prompts={location!r}: expected held_out, {GENERAL}, or a file that ends in "
            f"{', '.join(_READERS)}"
        )
    return prompt_table(_READERS[suffix](_read(filesystem, path), location), location)


def prompt_table(rows: Iterable[_Row], location: str) -> pa.Table:
    """Rows of PROMPT_SET, normalised and distinct; ValueError for one that is no text."""
    found: dict[str, str | None] = {}
    repeated = 0
    for place, prompt, category in rows:
        if not isinstance(prompt, str):
            raise ValueError(
                f"{location}, {place}: expected a prompt that is text, found {_shown(prompt)}"
            )
        if not (category is None or isinstance(category, str)):
            raise ValueError(
                f"{location}, {place}: expected a category that is text or nothing, found "
                f"{_shown(category)}"
            )
        text = schema.normalize_prompt(prompt)
        repeated += text in found
        found.setdefault(text, (category or "").strip() or None)
    if not found:
        raise ValueError(f"{location} holds no prompt")
    if repeated:
        logger.info("%s: %s prompts are there twice, once is enough", location, f"{repeated:,}")
    ids = [schema.prompt_id(text) for text in found]
    return pa.table([ids, list(found), list(found.values())], schema=PROMPT_SET)


def seeded_rank(prompt_id: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A number (P,) for each prompt that is as good as random: the smallest ones are a sample.

    It depends on the prompt's id and the seed alone, so a larger sample holds every smaller one,
    whatever else is in the list. SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = np.asarray(prompt_id, np.int64).astype(np.uint64)
    mixed = mixed + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def sample_prompts(prompts: pa.Table, count: int | None, seed: int) -> pa.Table:
    """At most `count` rows of PROMPT_SET, a seeded sample in the order of the list."""
    if count is None or len(prompts) <= count:
        return prompts
    ranks = seeded_rank(prompts.column(schema.PROMPT_ID).to_numpy(), seed)
    return prompts.take(np.sort(np.argsort(ranks, kind="stable")[:count]))


def _read(filesystem: pafs.FileSystem, path: str) -> bytes:
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(f"evaluate.prompts: expected a file of prompts, found no {path}")
    if info.size is not None and info.size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path} has {info.size:,} bytes, allowed {MAX_FILE_BYTES:,}: is it a dataset? A "
            "file of prompts holds text alone"
        )
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _text(content: bytes, location: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{location} is not UTF-8 text: {error}") from None


def _from_txt(content: bytes, location: str) -> Iterator[_Row]:
    # Not splitlines(): that also cuts at form feeds and other separators inside a prompt.
    for number, line in enumerate(_text(content, location).split("\n"), 1):
        if line.strip():
            yield f"line {number}", line, None


def _from_jsonl(content: bytes, location: str) -> Iterator[_Row]:
    for number, line in enumerate(_text(content, location).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{location}, line {number} is not JSON: {error}") from None
        yield _from_value(value, f"line {number}", location)


def _from_json(content: bytes, location: str) -> Iterator[_Row]:
    try:
        values = json.loads(_text(content, location))
    except ValueError as error:
        raise ValueError(f"{location} is not JSON: {error}") from None
    if not isinstance(values, list):
        raise ValueError(f"{location}: expected a list of prompts, found {_shown(values)}")
    for number, value in enumerate(values):
        yield _from_value(value, f"entry {number}", location)


def _from_value(value: Any, place: str, location: str) -> _Row:
    if isinstance(value, str):
        return place, value, None
    if not isinstance(value, dict):
        raise ValueError(
            f"{location}, {place}: expected an object with a prompt, or a string, found "
            f"{_shown(value)}"
        )
    prompt, category = _columns(value, f"{location}, {place}")
    return place, value[prompt], None if category is None else value[category]


def _from_csv(content: bytes, location: str) -> Iterator[_Row]:
    return _from_separated(content, location, ",")


def _from_tsv(content: bytes, location: str) -> Iterator[_Row]:
    return _from_separated(content, location, "\t")


def _from_separated(content: bytes, location: str, delimiter: str) -> Iterator[_Row]:
    text = io.StringIO(_text(content, location), newline="")
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        prompt, category = _columns(rows.fieldnames or (), location)
        for row in rows:
            place = f"line {rows.line_num}"
            yield place, row[prompt], None if category is None else row[category]
    except csv.Error as error:
        raise ValueError(f"{location}, after line {rows.line_num}: {error}") from None


def _from_parquet(content: bytes, location: str) -> Iterator[_Row]:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{location} is not a parquet file: {error}") from None
    prompt, category = _columns(file.schema_arrow.names, location)
    names = [name for name in (prompt, category) if name is not None]
    for number, row in enumerate(file.read(columns=names).to_pylist()):
        yield f"row {number}", row[prompt], None if category is None else row[category]


def _columns(names: Iterable[str], where: str) -> tuple[str, str | None]:
    """The columns that hold the prompt and the category, whatever their case."""
    by_name = {name.lower(): name for name in reversed(list(names))}
    if "prompt" not in by_name:
        raise ValueError(
            f"{where}: expected a column prompt (and perhaps category), found "
            f"{sorted(by_name.values()) or 'none'}"
        )
    return by_name["prompt"], by_name.get("category")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


_READERS: dict[str, Callable[[bytes, str], Iterator[_Row]]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".parquet": _from_parquet,
}
