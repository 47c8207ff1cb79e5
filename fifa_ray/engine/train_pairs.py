"""The pairs of one training: which are learned from, which are held out, and as columns."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray import schema
from fifa_ray.config import ConfigError
from fifa_ray.engine.strategies import uniform_hash
from fifa_ray.run_dir import RunDir, part_name

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class PairTable:
    """Pairs as columns, in the order of the source."""

    pair_id: np.ndarray
    prompt_id: np.ndarray
    image_items: np.ndarray  # int64 (N, 2): item_id of the chosen and the rejected image
    prompt_item: np.ndarray
    reward_margin: np.ndarray  # float32, in standard deviations; 0 where there is none
    group: np.ndarray  # int64: pairs of one group are read together

    def __len__(self) -> int:
        return len(self.pair_id)


def write_trained_pairs(
    run: RunDir, stage: str, pairs: pa.Table, *, validation_pairs: int, seed: int
) -> dict[str, int]:
    """Split pairs (schema.TRAINING_PAIRS) and write `training/<name>/pairs/`; counts by split.

    Raises ConfigError where no pair is left to learn from.
    """
    prompt_id = pairs.column(schema.PROMPT_ID).to_numpy()
    held_out = hold_out(prompt_id, validation_pairs, seed)
    counts = {TRAIN: int((~held_out).sum()), VALIDATION: int(held_out.sum())}
    if not counts[TRAIN]:
        raise ConfigError(
            f"no pair is left to train on: of {len(pairs):,} usable pairs {counts[VALIDATION]:,} "
            "are held out, whole prompts at a time; lower train.validation_pairs or select more"
        )
    margin = pairs.column("reward_margin").to_numpy(zero_copy_only=False).astype(np.float32)
    table = pa.table(
        [
            pairs.column(schema.PAIR_ID),
            pairs.column(schema.PROMPT_ID),
            pa.array(np.where(held_out, VALIDATION, TRAIN)),
            pairs.column("chosen_item"),
            pairs.column("rejected_item"),
            pairs.column("prompt_item"),
            pa.array(in_deviations(margin)),
            pairs.column("group"),
        ],
        schema=schema.TRAINED_PAIRS,
    )
    run.write_table(table, *stage.split("/"), "pairs", part_name(0))
    return counts


def read_trained_pairs(run: RunDir, stage: str, split: str) -> PairTable:
    """The pairs of one split."""
    table = run.read_table(*stage.split("/"), "pairs").combine_chunks()
    table = table.filter(pc.equal(table.column("split"), split))
    column = {name: table.column(name).to_numpy() for name in table.column_names if name != "split"}
    images = np.stack([column["chosen_item"], column["rejected_item"]], axis=1)
    return PairTable(
        column[schema.PAIR_ID],
        column[schema.PROMPT_ID],
        images,
        column["prompt_item"],
        column["reward_margin"],
        column["group"],
    )


def hold_out(prompt_id: np.ndarray, num_pairs: int, seed: int) -> np.ndarray:
    """bool (N,): pairs of a seeded choice of whole prompts, together at least `num_pairs`.

    A prompt's choice depends on its id and the seed alone, so adding pairs moves few prompts.
    """
    if not num_pairs:
        return np.zeros(len(prompt_id), bool)
    prompts, prompt_of, counts = np.unique(prompt_id, return_inverse=True, return_counts=True)
    rank = np.argsort(uniform_hash(prompts, seed), kind="stable")
    taken = int(np.searchsorted(np.cumsum(counts[rank]), num_pairs)) + 1
    is_held_out = np.zeros(len(prompts), bool)
    is_held_out[rank[:taken]] = True
    held_out: np.ndarray = is_held_out[prompt_of.reshape(-1)]
    return held_out


def in_deviations(margin: np.ndarray) -> np.ndarray:
    """Margins over their standard deviation, float32; 0 where there is none (NaN)."""
    known = np.isfinite(margin)
    spread = float(margin[known].astype(np.float64).std()) if known.any() else 0.0
    scaled = margin / spread if spread > 0 else np.zeros_like(margin)
    return np.where(known, scaled, 0).astype(np.float32)
