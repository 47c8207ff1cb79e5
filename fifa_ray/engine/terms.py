"""The terms of every pair, joined: what `select` standardises, weighs and compares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.part_reader import batches, open_part, part_task, read_columns, to_numpy
from fifa_ray.run_dir import RunDir

# Why a pair cannot be chosen; "" for one that can. Position is the code in `Terms.dropped`.
DROP_REASONS = ("", "unscored", "quality_error", "harmful", "low_quality")
_CODE = {reason: np.uint8(code) for code, reason in enumerate(DROP_REASONS)}


@dataclass(frozen=True)
class PromptTerms:
    """Prompt-level terms as sorted arrays: one copy a node in the object store, read in place.

    prompt_id: int64 (N,), ascending. prompt_quality: float32 (N,), NaN where there is none.
    harmful: bool (N,). log_kth_neighbor_distance: float32 (N,). first_of_bucket: int32, where the
    ids of each value of the leading bits begin.
    """

    prompt_id: np.ndarray
    prompt_quality: np.ndarray
    harmful: np.ndarray
    log_kth_neighbor_distance: np.ndarray
    first_of_bucket: np.ndarray
    shift: int

    def find(self, prompt_ids: np.ndarray) -> np.ndarray:
        """Positions (int64) of these ids. Raises ValueError for one that is not there.

        Ids are hashes, so their leading bits say almost where they are; a few steps do the rest.
        """
        at = self.first_of_bucket[_leading_bits(prompt_ids, self.shift)].astype(np.int64)
        last = len(self.prompt_id) - 1
        while (behind := self.prompt_id[np.minimum(at, last)] < prompt_ids).any():
            at += behind
            if (at > last).any():
                break
        if (at > last).any() or not np.array_equal(self.prompt_id[at], prompt_ids):
            raise ValueError(
                "pairs/ names prompts that quality/ or neighbors/ lack: the tables come from "
                "different ingests; run `fifa filter` again"
            )
        return at


def _leading_bits(prompt_ids: np.ndarray, shift: int) -> np.ndarray:
    unsigned = prompt_ids.view(np.uint64) ^ np.uint64(1 << 63)
    return (unsigned >> np.uint64(shift)).astype(np.int64)


@part_task
def read_prompt_terms(run: RunDir, config: FifaConfig) -> PromptTerms:
    """Read quality/ (if there is a judge) and neighbors/, both sorted by prompt_id."""
    neighbors = read_columns(
        run,
        "neighbors",
        columns={schema.PROMPT_ID: np.int64, "log_kth_neighbor_distance": np.float32},
    )
    ids = neighbors[schema.PROMPT_ID]
    quality = np.full(len(ids), np.nan, np.float32)
    harmful = np.zeros(len(ids), bool)
    if config.judge.enabled:
        judged = read_columns(
            run,
            "quality",
            columns={schema.PROMPT_ID: np.int64, "prompt_quality": np.float32, "harmful": bool},
        )
        if not np.array_equal(judged[schema.PROMPT_ID], ids):
            raise ValueError(
                "quality/ and neighbors/ hold different prompts; run `fifa filter` again"
            )
        quality, harmful = judged["prompt_quality"], judged["harmful"]
    shift = 64 - max(1, min(24, len(ids).bit_length()))
    sizes = np.bincount(_leading_bits(ids, shift), minlength=1 << (64 - shift))
    first = np.cumsum(sizes, dtype=np.int32) - sizes.astype(np.int32)
    distance = neighbors["log_kth_neighbor_distance"]
    return PromptTerms(ids, quality, harmful, distance, first, shift)


@dataclass(frozen=True)
class Terms:
    """Terms of some pairs of one part; raw, one row a pair, sorted by pair_id.

    row: int64 (P,), their rows in the part. margins: per reward model float32 (P,), NaN where it
    has no score. dropped: uint8 codes of DROP_REASONS under the method's hard filters.
    """

    pair_id: np.ndarray
    prompt_id: np.ndarray
    row: np.ndarray
    margins: Mapping[str, np.ndarray]
    prompt_quality: np.ndarray
    log_kth_neighbor_distance: np.ndarray
    dropped: np.ndarray

    def where(self, mask: np.ndarray) -> "Terms":
        """The rows of a mask or an index."""
        if mask.dtype == bool and mask.all():
            return self
        return replace(
            self,
            pair_id=self.pair_id[mask],
            prompt_id=self.prompt_id[mask],
            row=self.row[mask],
            margins={name: values[mask] for name, values in self.margins.items()},
            prompt_quality=self.prompt_quality[mask],
            log_kth_neighbor_distance=self.log_kth_neighbor_distance[mask],
            dropped=self.dropped[mask],
        )


def read_terms(
    run: RunDir, part: str, config: FifaConfig, of_prompt: PromptTerms
) -> Iterator[Terms]:
    """Join pairs/, every rewards/<name>/ and the prompt-level terms of one part, block by block."""
    rewards = {
        reward.name: read_columns(
            run,
            "rewards",
            reward.name,
            part,
            columns={schema.PAIR_ID: np.int64, "reward_margin": np.float32},
        )
        for reward in config.rewards
    }
    start = 0
    for batch in batches(open_part(run, "pairs", part), [schema.PAIR_ID, schema.PROMPT_ID]):
        pair_id = to_numpy(batch.column(schema.PAIR_ID))
        prompt_id = to_numpy(batch.column(schema.PROMPT_ID))
        margins = {name: _aligned_margins(scored, pair_id) for name, scored in rewards.items()}
        at = of_prompt.find(prompt_id)
        quality = of_prompt.prompt_quality[at]
        yield Terms(
            pair_id=pair_id,
            prompt_id=prompt_id,
            row=np.arange(start, start + len(batch)),
            margins=margins,
            prompt_quality=quality,
            log_kth_neighbor_distance=of_prompt.log_kth_neighbor_distance[at],
            dropped=_dropped(config, list(margins.values()), quality, of_prompt.harmful[at]),
        )
        start += len(batch)


def _dropped(
    config: FifaConfig, margins: Sequence[np.ndarray], quality: np.ndarray, harmful: np.ndarray
) -> np.ndarray:
    """Codes of the first hard filter that each pair falls to."""
    dropped = np.zeros(len(quality), np.uint8)
    if config.select.min_quality is not None:
        dropped[quality < config.select.min_quality] = _CODE["low_quality"]
    if config.select.exclude_harmful:
        dropped[harmful] = _CODE["harmful"]
    if config.judge.enabled and config.select.quality_error_policy == "drop":
        dropped[np.isnan(quality)] = _CODE["quality_error"]
    for values in margins:
        dropped[np.isnan(values)] = _CODE["unscored"]
    return dropped


def _aligned_margins(scored: Mapping[str, np.ndarray], pair_id: np.ndarray) -> np.ndarray:
    """Margins of some pairs, sorted by id as the scored ones are; NaN for one without a score."""
    first = np.searchsorted(scored[schema.PAIR_ID], pair_id[0])
    last = np.searchsorted(scored[schema.PAIR_ID], pair_id[-1], side="right")
    known, values = scored[schema.PAIR_ID][first:last], scored["reward_margin"][first:last]
    if np.array_equal(known, pair_id):
        return values
    margins = np.full(len(pair_id), np.nan, np.float32)
    margins[np.searchsorted(pair_id, known)] = values
    return margins
