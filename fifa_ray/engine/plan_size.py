"""How large a dataset is, from its metadata: rows, pairs, distinct prompts and images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.ingest import ingest_fingerprint, run_ingest
from fifa_ray.planning.estimates import Estimate, distinct_values
from fifa_ray.run_dir import Manifest, RunDir
from fifa_ray.sources import SampledSource, count_rows, open_source

# Rows that lie together in the source: as many images as most models take at once.
PIECE = 64
METADATA_PIECES = 16


@dataclass(frozen=True, kw_only=True)
class DatasetSize:
    """Pairs, distinct prompts and images of the whole dataset, and how they are known.

    images: None where nothing was read. prompt_bytes: of the text of a prompt, likewise. groups: of
    rows that the source reads at once, such as row groups.
    """

    rows: int
    pairs: Estimate
    prompts: Estimate
    images: Estimate | None = None
    pairs_from: str
    prompts_from: str
    prompt_bytes: float | None = None
    groups: float | None = None

    def with_given(self, num_pairs: int | None, num_prompts: int | None) -> "DatasetSize":
        """The same with what is known from elsewhere; prompts follow the pairs' number."""
        size = self
        if num_pairs is not None:
            share = num_pairs / self.pairs.value
            size = replace(
                size,
                rows=round(self.rows * share),
                pairs=Estimate.sure(num_pairs),
                pairs_from="given",
                prompts=self.prompts * share,
                images=None if self.images is None else self.images * share,
                prompts_from=f"{self.prompts_from}; then scaled with the pairs",
            )
        if num_prompts is not None:
            size = replace(size, prompts=Estimate.sure(num_prompts), prompts_from="given")
        return size


def measure_size(run: RunDir, config: FifaConfig, folder: str) -> tuple[DatasetSize, Manifest]:
    """Count the dataset's rows, and estimate its pairs and prompts from many rows' metadata.

    A complete ingest of the same source, or a sample of all rows, leaves nothing to estimate.
    """
    source = open_source(config.ingest, config.images)
    rows, exact = count_rows(source)
    if not rows:
        raise ValueError(f"{config.ingest.source} holds no rows")
    # The small one first: like that of a run it starts Ray's workers, the second one does not.
    _ingest_sample(RunDir(f"{folder}/sample"), config, rows, config.cost.sample_pairs, PIECE)
    metadata = RunDir(f"{folder}/metadata")
    wanted = min(rows, config.cost.sample_rows)
    manifest = _ingest_sample(metadata, config, rows, wanted, -(-wanted // METADATA_PIECES))
    texts = metadata.read_table("prompts", columns=["prompt"]).column("prompt")
    prompt_bytes = texts.nbytes / max(1, len(texts))
    pieces = [metadata.read_table("pairs", name) for name in metadata.list("pairs")]
    pairs_per_row = manifest.rows_out / wanted
    num_pairs = round(pairs_per_row * rows)
    images = distinct_values(_image_ids(pieces), 2 * num_pairs)
    groups = sum(count_groups(piece) for piece in pieces) / max(1, manifest.rows_out) * num_pairs
    whole = run.manifest("pairs")
    if whole is not None and whole.fingerprint == ingest_fingerprint(config, source):
        known = "counted: ingest is complete"
        size = DatasetSize(
            rows=rows,
            pairs=Estimate.sure(whole.rows_out),
            prompts=Estimate.sure(whole.details["distinct_prompts"]),
            images=images,
            pairs_from=known,
            prompts_from=known,
            prompt_bytes=prompt_bytes,
            groups=groups,
        )
        return size, manifest
    counted = "counted" if exact else "estimated from some shards"
    ids = [piece.column(schema.PROMPT_ID).to_numpy() for piece in pieces]
    size = DatasetSize(
        rows=rows,
        pairs=Estimate.sure(num_pairs),
        prompts=distinct_values(ids, num_pairs),
        images=images,
        pairs_from=f"{rows:,} rows {counted}, usable pairs a row from the metadata of {wanted:,}",
        prompts_from=f"estimated from {wanted:,} of {rows:,} rows, taking prompts to repeat in "
        "the rest as they do across the sample's pieces (first-order jackknife); low: those seen, "
        "high: no other repeats"
        if wanted < rows
        else "counted in the metadata of all rows",
        prompt_bytes=prompt_bytes,
        groups=groups,
    )
    return size, manifest


def count_groups(pairs: pa.Table) -> int:
    """Groups of the source that rows of `pairs/` lie in."""
    files = pairs.column(schema.PAIR_ID).to_numpy() >> schema.FILE_SHIFT
    groups = pairs.column("source_group").to_numpy()
    return len(np.unique(np.stack([files, groups]), axis=1).T)


def _image_ids(pieces: Sequence[pa.Table]) -> list[np.ndarray]:
    """Numbers of the images of pairs by piece: equal where the dataset's names are equal.

    An image without a name is one of its own.
    """
    table = pa.concat_tables(pieces)
    names = pa.chunked_array(
        [*table.column("chosen_uid").chunks, *table.column("rejected_uid").chunks], pa.string()
    ).combine_chunks()
    numbers = names.dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    numbers = np.where(numbers < 0, len(numbers) + np.arange(len(numbers)), numbers)
    sides = numbers.reshape(2, -1)
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    return [sides[:, a:b].ravel() for a, b in pairwise(starts)]


def _ingest_sample(
    run: RunDir, config: FifaConfig, rows: int, num_rows: int, piece: int
) -> Manifest:
    """Ingest up to `num_rows` of `rows` rows in pieces spread over the source."""
    num_rows = min(rows, num_rows)
    pieces = max(1, -(-num_rows // piece))
    # Chunks as large as the pieces allow: a piece is the head of one, and of its row group.
    ingest = config.ingest.model_copy(update={"rows_per_part": max(piece, rows // pieces)})
    config = config.model_copy(update={"ingest": ingest, "max_quarantine_fraction": 1.0})
    source = SampledSource(open_source(ingest, config.images), num_rows, piece)
    return run_ingest(run, config, source)
