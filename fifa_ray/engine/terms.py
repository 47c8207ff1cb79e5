"""The terms of every pair of a part, joined: what `select` standardises, weighs and compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from fifa_ray import schema
from fifa_ray.config import FifaConfig
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


def read_prompt_terms(run: RunDir, config: FifaConfig) -> PromptTerms:
    """Read quality/ (if there is a judge) and neighbors/, both sorted by prompt_id."""
    neighbors = run.read_table("neighbors", columns=[schema.PROMPT_ID, "log_kth_neighbor_distance"])
    ids = neighbors.column(schema.PROMPT_ID).to_numpy()
    quality = np.full(len(ids), np.nan, np.float32)
    harmful = np.zeros(len(ids), bool)
    if config.judge.enabled:
        judged = run.read_table("quality", columns=[schema.PROMPT_ID, "prompt_quality", "harmful"])
        if not np.array_equal(judged.column(schema.PROMPT_ID).to_numpy(), ids):
            raise ValueError(
                "quality/ and neighbors/ hold different prompts; run `fifa filter` again"
            )
        quality = judged.column("prompt_quality").to_numpy().astype(np.float32)
        harmful = judged.column("harmful").fill_null(False).to_numpy()
    shift = 64 - max(1, min(24, len(ids).bit_length()))
    buckets = _leading_bits(ids, shift)
    first = np.searchsorted(buckets, np.arange(1 << (64 - shift))).astype(np.int32)
    distance = neighbors.column("log_kth_neighbor_distance").to_numpy()
    return PromptTerms(ids, quality, harmful, distance, first, shift)


@dataclass(frozen=True)
class Terms:
    """Terms of the pairs of one part; raw, one row a pair, sorted by pair_id.

    margins: per reward model float64 (P,), NaN where it has no score. dropped: uint8 codes of
    DROP_REASONS under the method's hard filters.
    """

    pair_id: np.ndarray
    prompt_id: np.ndarray
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
            margins={name: values[mask] for name, values in self.margins.items()},
            prompt_quality=self.prompt_quality[mask],
            log_kth_neighbor_distance=self.log_kth_neighbor_distance[mask],
            dropped=self.dropped[mask],
        )


def read_terms(run: RunDir, part: str, config: FifaConfig, of_prompt: PromptTerms) -> Terms:
    """Join pairs/, every rewards/<name>/ and the prompt-level terms of one part."""
    pairs = run.read_table("pairs", part, columns=[schema.PAIR_ID, schema.PROMPT_ID])
    pair_id = _column(pairs, schema.PAIR_ID)
    prompt_id = _column(pairs, schema.PROMPT_ID)
    margins = {
        reward.name: _aligned_margins(run, reward.name, part, pair_id) for reward in config.rewards
    }
    at = of_prompt.find(prompt_id)
    quality = of_prompt.prompt_quality[at]
    return Terms(
        pair_id=pair_id,
        prompt_id=prompt_id,
        margins=margins,
        prompt_quality=quality,
        log_kth_neighbor_distance=of_prompt.log_kth_neighbor_distance[at],
        dropped=_dropped(config, list(margins.values()), quality, of_prompt.harmful[at]),
    )


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


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy()


def _aligned_margins(run: RunDir, name: str, part: str, pair_id: np.ndarray) -> np.ndarray:
    table = run.read_table("rewards", name, part, columns=[schema.PAIR_ID, "reward_margin"])
    scored, values = _column(table, schema.PAIR_ID), _column(table, "reward_margin")
    if len(scored) == len(pair_id) and np.array_equal(scored, pair_id):
        return values
    margins = np.full(len(pair_id), np.nan, np.float32)
    margins[np.searchsorted(pair_id, scored)] = values
    return margins
