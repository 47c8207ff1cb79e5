"""What the demo proves: what the filter kept, held against the truth that it never saw.

Pure: Arrow tables in, numbers out. `prove` compares the kept pairs with a random selection of the
same size and with the whole dataset; `proof_lines` puts the result into words.
"""

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from fifa_ray.schema import PROMPT_ID, check_columns, embedding_matrix
from fifa_ray.scoring.diversity import knn_entropy

CONFIDENCE = 0.95
UNWANTED_KINDS = ("harmful", "junk", "contradictory", "vague")


class Share(TypedDict):
    """Labels that agree with the truth among those that can (ties left out), exact interval."""

    share: float
    low: float
    high: float
    num_labels: int


class SetFacts(TypedDict):
    """What is true of one set of pairs; entropy in nats, None where there is no embedding of it."""

    num_pairs: int
    labels_correct: Share
    pairs_by_kind: dict[str, int]
    distinct_prompts: int
    pairs_with_corrupted_image: int
    knn_entropy: float | None


class Proof(TypedDict):
    """The three sets that `prove` compares."""

    kept: SetFacts
    random: SetFacts
    whole: SetFacts


def prove(
    selected: pa.Table,
    random_selected: pa.Table,
    truth_pairs: pa.Table,
    embeddings: pa.Table,
    *,
    num_neighbors: int,
) -> Proof:
    """Facts of the kept pairs, of as many random ones and of the whole dataset.

    `selected` and `random_selected` need `source_id` (the ranking_id as text) and `prompt_id`;
    `truth_pairs` is the world's `truth/pairs.parquet`; `embeddings` has the unit vector of each
    prompt_id. The entropy is that of a set's distinct prompts, with `num_neighbors` neighbours.

    Raises ValueError where a selection names a pair that the truth, or a prompt that the
    embeddings, do not have, and where the two selections differ in size.
    """
    if len(selected) != len(random_selected):
        raise ValueError(
            f"expected a random selection as large as the one it is compared with, found"
            f" {len(random_selected):,} and {len(selected):,} pairs; select with the same K"
        )
    return {
        "kept": _facts(_truth_of(selected, truth_pairs), selected, embeddings, num_neighbors),
        "random": _facts(
            _truth_of(random_selected, truth_pairs), random_selected, embeddings, num_neighbors
        ),
        "whole": _facts(truth_pairs, None, embeddings, num_neighbors),
    }


def proof_lines(proof: Proof) -> list[str]:
    """The proof as lines of a plain-text table."""
    sets = ("kept", "random", "whole")

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<34}" + "".join(f"{cell:>24}" for cell in cells)

    def share(name: str) -> str:
        labels = proof[name]["labels_correct"]  # type: ignore[literal-required]
        return f"{labels['share']:.1%} ({labels['low']:.1%}-{labels['high']:.1%})"

    facts: list[SetFacts] = [proof["kept"], proof["random"], proof["whole"]]
    entropies = [fact["knn_entropy"] for fact in facts]
    return [
        line("", ["kept", "random as many", "whole dataset"]),
        line("pairs", [f"{fact['num_pairs']:,}" for fact in facts]),
        line(f"labels right ({CONFIDENCE:.0%} interval)", [share(name) for name in sets]),
        *(
            line(
                f"pairs with a {kind} prompt",
                [f"{fact['pairs_by_kind'][kind]:,}" for fact in facts],
            )
            for kind in UNWANTED_KINDS
        ),
        line(
            "pairs with a corrupted image",
            [f"{fact['pairs_with_corrupted_image']:,}" for fact in facts],
        ),
        line("distinct prompts", [f"{fact['distinct_prompts']:,}" for fact in facts]),
        line(
            "knn entropy of prompts (nats)",
            ["-" if value is None else f"{value:,.1f}" for value in entropies],
        ),
    ]


def _truth_of(selection: pa.Table, truth_pairs: pa.Table) -> pa.Table:
    """The truth's rows of a selection, in the selection's order."""
    check_columns(selection.column_names, ["source_id", PROMPT_ID], "the selection")
    known = truth_pairs["ranking_id"].to_numpy()
    order = np.argsort(known)
    wanted = selection["source_id"].cast(pa.int64()).to_numpy()
    at = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    if (unknown := known[at] != wanted).any():
        raise ValueError(
            f"expected every selected source_id among the truth's ranking_id, found"
            f" {int(unknown.sum()):,} others (first: {wanted[unknown][0]}); the truth is another"
            " world's"
        )
    return truth_pairs.take(pa.array(at))


def _facts(
    truth: pa.Table, selection: pa.Table | None, embeddings: pa.Table, num_neighbors: int
) -> SetFacts:
    """Facts of one set; `selection` is None for the whole dataset."""
    correct = truth["label_correct"].drop_null()
    right, total = pc.sum(correct, min_count=0).as_py(), len(correct)
    interval = binomtest(right, total).proportion_ci(CONFIDENCE, method="exact") if total else None
    kinds = dict(zip(*truth["prompt_kind"].value_counts().flatten(), strict=True))
    counts = {kind.as_py(): count.as_py() for kind, count in kinds.items()}
    corrupted = [
        "corrupted" in first or "corrupted" in second
        for first, second in zip(
            truth["defects_0"].to_pylist(), truth["defects_1"].to_pylist(), strict=True
        )
    ]
    vectors = embedding_matrix(embeddings)
    if selection is not None:
        vectors = vectors[_rows_of(selection, embeddings)]
    return {
        "num_pairs": len(truth),
        "labels_correct": {
            "share": right / total if total else float("nan"),
            "low": interval.low if interval else 0.0,
            "high": interval.high if interval else 1.0,
            "num_labels": total,
        },
        "pairs_by_kind": {
            kind: counts.get(kind, 0) for kind in ("normal", "near_duplicate", *UNWANTED_KINDS)
        },
        "distinct_prompts": len(vectors),
        "pairs_with_corrupted_image": sum(corrupted),
        "knn_entropy": knn_entropy(vectors, num_neighbors)
        if len(vectors) > num_neighbors
        else None,
    }


def _rows_of(selection: pa.Table, embeddings: pa.Table) -> np.ndarray:
    """Row in `embeddings` of each distinct prompt of a selection."""
    known = embeddings[PROMPT_ID].to_numpy()
    order = np.argsort(known)
    wanted = np.unique(selection[PROMPT_ID].to_numpy())
    at = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    if (unknown := known[at] != wanted).any():
        raise ValueError(
            f"expected an embedding of every selected prompt_id, found none of"
            f" {int(unknown.sum()):,} (first: {wanted[unknown][0]}); they are another run's"
        )
    return at
