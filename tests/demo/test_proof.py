"""What the demo proves, on small tables whose facts are counted by hand."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import beta

from fifa_ray.demo.proof import proof_lines, prove
from fifa_ray.demo.world import TRUTH_PAIRS
from fifa_ray.schema import embeddings_schema
from fifa_ray.scoring.diversity import knn_entropy

NUM_PROMPTS = 20


def truth_table() -> pa.Table:
    """Forty pairs, two to a prompt: every fourth label wrong, one tie, kinds by prompt."""
    kinds = ["normal"] * 12 + ["harmful"] * 3 + ["junk"] * 3 + ["vague"] * 2
    return pa.Table.from_pylist(
        [
            {
                "ranking_id": 1_000 + i,
                "prompt": f"prompt {i // 2}",
                "prompt_kind": kinds[i // 2],
                "utility_0": 1.0,
                "utility_1": 2.0,
                "label_correct": None if i == 5 else i % 4 != 0,
                "defects_0": ["corrupted"] if i == 7 else [],
                "defects_1": ["blur"],
                "row_defect": "tie" if i == 5 else None,
            }
            for i in range(40)
        ],
        TRUTH_PAIRS,
    )


def embeddings_table() -> pa.Table:
    vectors = np.random.default_rng(0).normal(size=(NUM_PROMPTS, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return pa.table(
        {"prompt_id": np.arange(NUM_PROMPTS) * 7, "embedding": vectors.tolist()},
        embeddings_schema(3),
    )


def selection(pairs: Sequence[int]) -> pa.Table:
    """A selection of pairs by their number in `truth_table`."""
    return pa.table(
        {
            "source_id": [str(1_000 + i) for i in pairs],
            "prompt_id": pa.array([i // 2 * 7 for i in pairs], pa.int64()),
        }
    )


KEPT, RANDOM = [1, 2, 3, 5, 7, 9, 11, 13], [0, 4, 6, 8, 24, 26, 30, 31]


def test_facts_equal_those_counted_by_hand() -> None:
    proof = prove(
        selection(KEPT), selection(RANDOM), truth_table(), embeddings_table(), num_neighbors=2
    )
    kept, random, whole = proof["kept"], proof["random"], proof["whole"]
    assert kept["labels_correct"]["share"] == 1.0  # pair 5 is a tie and does not count
    assert kept["labels_correct"]["num_labels"] == 7
    assert random["labels_correct"]["share"] == pytest.approx(4 / 8)
    assert whole["labels_correct"]["share"] == pytest.approx(29 / 39)
    assert (kept["distinct_prompts"], random["distinct_prompts"]) == (7, 7)
    assert whole["distinct_prompts"] == NUM_PROMPTS
    assert kept["pairs_by_kind"]["harmful"] == kept["pairs_by_kind"]["junk"] == 0
    assert random["pairs_by_kind"]["harmful"] == 2
    assert random["pairs_by_kind"]["junk"] == 2
    assert whole["pairs_by_kind"]["vague"] == 4
    assert (kept["pairs_with_corrupted_image"], random["pairs_with_corrupted_image"]) == (1, 0)


def test_the_interval_is_clopper_and_pearsons() -> None:
    proof = prove(
        selection(KEPT), selection(RANDOM), truth_table(), embeddings_table(), num_neighbors=2
    )
    share = proof["whole"]["labels_correct"]
    assert share["low"] == pytest.approx(beta.ppf(0.025, 29, 39 - 29 + 1))
    assert share["high"] == pytest.approx(beta.ppf(0.975, 29 + 1, 39 - 29))


def test_the_entropy_is_that_of_the_distinct_prompts_of_the_set() -> None:
    embeddings = embeddings_table()
    proof = prove(selection(KEPT), selection(RANDOM), truth_table(), embeddings, num_neighbors=2)
    vectors = np.array(embeddings["embedding"].to_pylist(), np.float32)
    expected = knn_entropy(vectors[sorted({i // 2 for i in KEPT})], 2)
    assert proof["kept"]["knn_entropy"] == pytest.approx(expected)
    few = prove(selection([1, 2]), selection([3, 4]), truth_table(), embeddings, num_neighbors=2)
    assert few["kept"]["knn_entropy"] is None


def test_the_order_of_rows_does_not_matter() -> None:
    shuffled = np.random.default_rng(1).permutation(40)
    arguments = {"num_neighbors": 2}
    straight = prove(
        selection(KEPT), selection(RANDOM), truth_table(), embeddings_table(), **arguments
    )
    turned = prove(
        selection(KEPT[::-1]),
        selection(RANDOM[::-1]),
        truth_table().take(shuffled),
        embeddings_table().take(np.random.default_rng(2).permutation(NUM_PROMPTS)),
        **arguments,
    )
    assert turned["kept"] == straight["kept"]
    assert turned["random"] == straight["random"]


def test_the_lines_say_the_numbers() -> None:
    proof = prove(
        selection(KEPT), selection(RANDOM), truth_table(), embeddings_table(), num_neighbors=2
    )
    text = "\n".join(proof_lines(proof))
    assert "100.0% (59.0%-100.0%)" in text
    assert "50.0%" in text
    assert "74.4%" in text
    assert "pairs with a harmful prompt" in text


def test_tables_of_different_worlds_are_refused() -> None:
    truth, embeddings = truth_table(), embeddings_table()
    with pytest.raises(ValueError, match="as large as"):
        prove(selection(KEPT), selection([0]), truth, embeddings, num_neighbors=2)
    with pytest.raises(ValueError, match="another world's"):
        prove(selection([50]), selection([1]), truth, embeddings, num_neighbors=2)
    with pytest.raises(ValueError, match="another run's"):
        prove(selection([1]), selection([2]), truth, embeddings.slice(5), num_neighbors=2)
