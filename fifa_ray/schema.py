"""Column names and Arrow schema of every table that a run directory holds.

Stages talk only through these tables, so this file is the contract between them. Tables are
folders of parquet parts; `rewards/<name>/` has one part for each part of `pairs/`, and `quality/`,
`embeddings/` and `neighbors/` one for each part of `prompts/`, each sorted by its id.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

PAIR_ID = "pair_id"
PROMPT_ID = "prompt_id"

# pair_id = file_index << 42 | source_row << 10 | index of the pair within the row: unique without
# a shuffle, sorted like the source, and it fits in 62 bits.
FILE_SHIFT = 42
ROW_SHIFT = 10
MAX_FILES = 1 << 20
MAX_ROWS_PER_FILE = 1 << (FILE_SHIFT - ROW_SHIFT)
MAX_PAIRS_PER_ROW = 1 << ROW_SHIFT

PAIRS = pa.schema(
    [
        pa.field(PAIR_ID, pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("source_file", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        # What a pass over the images reads at once: the row group of a parquet source with image
        # bytes, else a few hundred rows.
        pa.field("source_group", pa.int32(), nullable=False),
        # Where the source finds the image: a column name, an archive member, a path or a URL.
        pa.field("chosen_ref", pa.string(), nullable=False),
        pa.field("rejected_ref", pa.string(), nullable=False),
        # The dataset's own names: of the images (equal names, equal images) and of the comparison.
        pa.field("chosen_uid", pa.string()),
        pa.field("rejected_uid", pa.string()),
        pa.field("source_id", pa.string()),
        pa.field("model_chosen", pa.string()),
        pa.field("model_rejected", pa.string()),
    ]
)

PROMPTS = pa.schema(
    [
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("num_pairs", pa.int64(), nullable=False),
    ]
)

REWARDS = pa.schema(
    [
        pa.field(PAIR_ID, pa.int64(), nullable=False),
        pa.field("reward_chosen", pa.float32(), nullable=False),
        pa.field("reward_rejected", pa.float32(), nullable=False),
        pa.field("reward_margin", pa.float32(), nullable=False),
    ]
)

QUALITY = pa.schema(
    [
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("prompt_quality", pa.float32()),  # 0..10, null where quality_error is set
        pa.field("harmful", pa.bool_()),
        pa.field("harm_category", pa.string()),
        pa.field("judge_reply", pa.string()),
        pa.field("quality_error", pa.string()),
    ]
)

NEIGHBORS = pa.schema(
    [
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("kth_neighbor_distance", pa.float32(), nullable=False),
        pa.field("log_kth_neighbor_distance", pa.float32(), nullable=False),
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field(PAIR_ID, pa.int64()),
        pa.field(PROMPT_ID, pa.int64()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
    ]
)

SELECTED_TERMS = (
    pa.field(PAIR_ID, pa.int64(), nullable=False),
    pa.field(PROMPT_ID, pa.int64(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("rank", pa.int64(), nullable=False),  # 1 is best
    pa.field("importance_score", pa.float64(), nullable=False),
    pa.field("reward_margin", pa.float64(), nullable=False),
    pa.field("prompt_quality", pa.float64()),
    pa.field("log_kth_neighbor_distance", pa.float64()),
    pa.field("margin_term", pa.float64(), nullable=False),  # standardised and weighted
    pa.field("quality_term", pa.float64(), nullable=False),
    pa.field("diversity_term", pa.float64(), nullable=False),
    pa.field("source_file", pa.string(), nullable=False),
    pa.field("source_row", pa.int64(), nullable=False),
    pa.field("source_id", pa.string()),
    pa.field("chosen_uid", pa.string()),
    pa.field("rejected_uid", pa.string()),
)

# training_data/<key>/: what a training learns from. Items are the distinct images and prompts.
TRAINING_PAIRS = pa.schema(
    [
        pa.field(PAIR_ID, pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("chosen_item", pa.int64(), nullable=False),  # item_id
        pa.field("rejected_item", pa.int64(), nullable=False),
        pa.field("prompt_item", pa.int64(), nullable=False),
        pa.field("reward_margin", pa.float32()),
        pa.field("rank", pa.int64(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),  # what the source reads at once
    ]
)

TRAINING_ITEMS = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),  # from 0: images, then prompts
        pa.field("source_file", pa.string()),  # the four of images alone
        pa.field("source_group", pa.int32()),
        pa.field("source_row", pa.int64()),
        pa.field("ref", pa.string()),
        pa.field("prompt", pa.string()),  # of prompts alone; one is empty, for dropped ones
        pa.field(PAIR_ID, pa.int64()),  # of the first pair that has the image
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
    ]
)

# latents/<key>/: an image's posterior in the denoiser's scale, as raw little-endian bytes of the
# type and shape that the manifest states, or a prompt's conditioning as the bytes of a safetensors
# file. One row a row group.
LATENTS = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("mean", pa.binary()),
        pa.field("std", pa.binary()),
        pa.field("flipped_mean", pa.binary()),  # of the mirrored image; null without flips
        pa.field("flipped_std", pa.binary()),
        pa.field("conditioning", pa.binary()),
    ]
)

# training/<name>/pairs/: the pairs that a training learned from and those it held out, in the
# order of the source; the table that its workers read.
TRAINED_PAIRS = pa.schema(
    [
        pa.field(PAIR_ID, pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train or validation
        pa.field("chosen_item", pa.int64(), nullable=False),  # item_id of the training data
        pa.field("rejected_item", pa.int64(), nullable=False),
        pa.field("prompt_item", pa.int64(), nullable=False),
        pa.field("reward_margin", pa.float32(), nullable=False),  # in standard deviations
        pa.field("group", pa.int64(), nullable=False),
    ]
)

# evaluation/prompts/: one row for each image that every model draws. image_id numbers from 0.
EVALUATION_PROMPTS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),  # of the images of this prompt
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("image_seed", pa.int64(), nullable=False),
    ]
)

# evaluation/images/<model>/
EVALUATION_IMAGES = pa.schema(
    [
        *EVALUATION_PROMPTS,
        pa.field("model", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # PNG or JPEG
    ]
)

# evaluation/rewards/<model>/<reward>/
EVALUATION_REWARDS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field(PROMPT_ID, pa.int64(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
    ]
)


def embeddings_schema(dimension: int) -> pa.Schema:
    """Schema of `embeddings/`: unit vectors of `dimension` float32 values."""
    return pa.schema(
        [
            pa.field(PROMPT_ID, pa.int64(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dimension), nullable=False),
        ]
    )


def embedding_matrix(table: pa.Table) -> np.ndarray:
    """The `embedding` column as a float32 array of shape (rows, dimension)."""
    column = table.column("embedding").combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return np.from_dlpack(column.flatten()).reshape(len(table), -1)


def make_pair_id(
    file_index: int, source_row: np.ndarray, pair_in_row: np.ndarray | int = 0
) -> np.ndarray:
    """Position-based int64 pair ids, sorted like the source.

    Raises ValueError where the source has more files, rows or pairs in a row than an id can hold.
    """
    rows = np.asarray(source_row, np.int64)
    pairs = np.asarray(pair_in_row, np.int64)
    if not 0 <= file_index < MAX_FILES:
        raise ValueError(f"expected fewer than {MAX_FILES:,} source files, got index {file_index}")
    if rows.size and rows.max() >= MAX_ROWS_PER_FILE:
        raise ValueError(f"expected fewer than {MAX_ROWS_PER_FILE:,} rows in a file; split it")
    if pairs.size and pairs.max() >= MAX_PAIRS_PER_ROW:
        raise ValueError(f"expected fewer than {MAX_PAIRS_PER_ROW:,} pairs in a row (45 images)")
    return (np.int64(file_index) << FILE_SHIFT) | (rows << ROW_SHIFT) | pairs


def normalize_prompt(text: str) -> str:
    """NFC form, control and unassigned characters out, each run of white space one space."""
    text = unicodedata.normalize("NFC", text)
    if text.isprintable():  # Nothing to take out, and no white space but plain spaces: the usual.
        return " ".join(text.split())
    kept = (
        " " if c.isspace() else c
        for c in text
        if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs", "Cn", "Co")
    )
    return " ".join("".join(kept).split())


def prompt_id(normalized_prompt: str) -> int:
    """Signed 64-bit BLAKE2b of a prompt that `normalize_prompt` returned; stable for ever."""
    digest = hashlib.blake2b(normalized_prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def check_columns(found: Iterable[str], needed: Iterable[str], where: str) -> None:
    """Raise ValueError naming the columns that `where` lacks and those that it has."""
    found, needed = list(found), list(needed)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(f"{where} lacks the columns {missing}; it has {sorted(found)}")
