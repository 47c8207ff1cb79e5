"""Some rows of a dataset, spread over all of it, as a dataset of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from fifa_ray.sources.source import Source, SourceChunk

# Chunks whose rows are counted where the format does not say how many they have.
COUNTED_CHUNKS = 8


class SampledSource:
    """The first rows of evenly spread chunks of another source, which also reads the images.

    Their places are those in the whole dataset, so a pair keeps its id.
    """

    def __init__(self, source: Source, num_rows: int, rows_per_piece: int) -> None:
        """`rows_per_piece`: rows that are taken together, as a pass over images reads them."""
        self.source, self.format = source, source.format
        self.num_rows, self.rows_per_piece = num_rows, rows_per_piece

    def identity(self) -> list[Any]:
        """That of the whole source, and how it is sampled."""
        return [*self.source.identity(), "sample", self.num_rows, self.rows_per_piece]

    def chunks(self) -> list[SourceChunk]:
        """The pieces, in the order of the source."""
        return spread(self.source.chunks(), self.num_rows, self.rows_per_piece)

    def read_metadata(self, chunk: SourceChunk) -> pa.Table:
        """As the whole source does."""
        return self.source.read_metadata(chunk)

    def read_images(
        self, source_file: str, source_group: int, requests: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """As the whole source does."""
        return self.source.read_images(source_file, source_group, requests)


def spread(chunks: Sequence[SourceChunk], num_rows: int, rows_per_piece: int) -> list[SourceChunk]:
    """The heads of evenly spread chunks: together `num_rows` rows, or all there are.

    At least num_rows / rows_per_piece chunks are touched where there are so many. A chunk of
    unknown length counts as long enough.
    """
    if not chunks:
        return []
    wanted = max(1, -(-num_rows // rows_per_piece))
    sizes = np.array(
        [num_rows if c.row_stop is None else c.row_stop - c.row_start for c in chunks], np.int64
    )
    # The middle of each of `wanted` equal ranges of the chunks, and no chunk twice.
    places = np.unique(((np.arange(wanted) + 0.5) * len(chunks) / wanted).astype(np.int64))
    takes = np.zeros(len(chunks), np.int64)
    takes[places] = np.minimum(sizes[places], -(-num_rows // len(places)))
    # What short chunks lack is taken from those with more, first of the chosen, then of all.
    lack = num_rows - int(takes.sum())
    for place in (*places, *range(len(chunks))):
        if lack <= 0:
            break
        more = min(lack, int(sizes[place] - takes[place]))
        takes[place] += more
        lack -= more
    # Shares are rounded up.
    for place in places[::-1]:
        if lack >= 0:
            break
        less = min(-lack, int(takes[place]) - 1)
        takes[place] -= less
        lack += less
    return [
        replace(chunk, row_stop=chunk.row_start + int(take))
        for chunk, take in zip(chunks, takes, strict=True)
        if take
    ]


def count_rows(source: Source) -> tuple[int, bool]:
    """Rows of a source, reading only its chunks' bounds, and whether that is exact.

    Where the format does not know them (tar shards), a few chunks are read through and the others
    taken to be like them.
    """
    chunks = source.chunks()
    known = [c.row_stop - c.row_start for c in chunks if c.row_stop is not None]
    if len(known) == len(chunks):
        return sum(known), True
    places = np.unique(np.linspace(0, len(chunks) - 1, min(COUNTED_CHUNKS, len(chunks))).round())
    counted = [len(source.read_metadata(chunks[int(place)])) for place in places]
    return round(sum(counted) / len(counted) * len(chunks)), len(counted) == len(chunks)
