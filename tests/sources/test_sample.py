"""Samples: spread over the source, pairs with their own ids, images as in the whole."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa_ray.sources import SampledSource, SourceChunk, count_rows
from fifa_ray.sources.sample import spread


def chunks_of(sizes: list[int]) -> list[SourceChunk]:
    ends = np.cumsum(sizes)
    return [
        SourceChunk(file_index=i, file=f"{i}", row_start=int(end - size), row_stop=int(end))
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    num_rows=st.integers(1, 3000),
    piece=st.integers(1, 200),
)
def test_a_sample_has_the_rows_wanted_and_takes_heads_of_chunks(sizes, num_rows, piece):
    chunks = chunks_of(sizes)
    taken = spread(chunks, num_rows, piece)
    assert sum(c.row_stop - c.row_start for c in taken) == min(num_rows, sum(sizes))
    by_file = {chunk.file: chunk for chunk in chunks}
    for piece_taken in taken:
        whole = by_file[piece_taken.file]
        assert piece_taken.row_start == whole.row_start
        assert whole.row_start < piece_taken.row_stop <= whole.row_stop
    assert len({c.file for c in taken}) == len(taken)


def test_pieces_lie_evenly_over_the_source():
    taken = spread(chunks_of([100] * 40), 80, 10)
    assert [int(c.file) for c in taken] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert {c.row_stop - c.row_start for c in taken} == {10}


@pytest.fixture
def parquet(tmp_path, png):
    for number in range(3):
        rows = range(40 * number, 40 * number + 40)
        table = pa.table(
            {
                "prompt": [f"prompt {i}" for i in rows],
                "chosen": [png(i) for i in rows],
                "rejected": [png(i + 500) for i in rows],
            }
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=10)
    return tmp_path


def test_sampled_pairs_are_those_of_the_whole(parquet, opened, metadata, answers):
    source = opened(parquet, rows_per_part=100)
    assert count_rows(source) == (120, True)
    in_groups = opened(parquet)
    in_groups.rows_per_chunk = 10
    sample = SampledSource(in_groups, 24, 6)
    rows = metadata(sample).to_pylist()
    whole = {(row["prompt"], row["source_row"], row["source_group"]) for row in
             metadata(source).to_pylist()}  # fmt: skip
    assert {(row["prompt"], row["source_row"], row["source_group"]) for row in rows} <= whole
    assert len(rows) == 24
    numbers = [int(row["prompt"].split()[1]) for row in rows]
    assert min(numbers) < 30
    assert max(numbers) >= 90
    place = sample.chunks()[1]
    first = metadata(source).slice(0, 120).to_pylist()
    row = next(r for r in first if r["prompt"] == f"prompt {numbers[6]}")
    found = answers(sample, place.file, row["source_group"], [(row["source_row"], "chosen")])
    assert found == answers(
        source, place.file, row["source_group"], [(row["source_row"], "chosen")]
    )
    assert sample.identity() != SampledSource(source, 25, 6).identity()


def test_shards_that_are_too_many_to_count_are_sampled(tmp_path, opened):
    for shard in range(12):
        with tarfile.open(tmp_path / f"{shard:02}.tar", "w") as tar:
            for row in range(4):
                path = tmp_path / "row.json"
                path.write_text(json.dumps({"prompt": "x"}))
                tar.add(path, f"{row}.json")
                path.unlink()
    rows, exact = count_rows(opened(tmp_path))
    assert rows == 48
    assert not exact
