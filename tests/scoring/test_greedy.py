"""Greedy set selection against brute force, and against top-K on clustered prompts."""

import math

import numpy as np
import pytest

from fifa_ray.scoring import greedy
from fifa_ray.scoring.diversity import knn_entropy, kth_neighbor_distance
from fifa_ray.scoring.greedy import select_greedy, set_objective
from fifa_ray.scoring.importance import importance_score, select_top_k, standardize

FLOOR = 1e-3


def unit_vectors(rng, num_rows, width):
    vectors = rng.normal(size=(num_rows, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def small_pool(seed, num_pairs=40, num_prompts=25, width=3):
    """Pairs of shared prompts, two prompts of them duplicates, ids in no order."""
    rng = np.random.default_rng(seed)
    embeddings = unit_vectors(rng, num_prompts, width)
    embeddings[1] = embeddings[0]
    prompts = rng.integers(0, num_prompts, num_pairs)
    return rng.normal(size=num_pairs), embeddings, prompts, rng.permutation(num_pairs) + 100


def objective_by_definition(rows, base, embeddings, prompts, weight, num_neighbors):
    """Straight from the module's docstring, with no code shared."""
    total = sum(base[row] for row in rows)
    distinct = sorted({prompts[row] for row in rows})
    for prompt in distinct:
        others = [math.dist(embeddings[prompt], embeddings[q]) for q in distinct if q != prompt]
        nearest = sorted([*others, *[2.0] * num_neighbors])[num_neighbors - 1]
        total += weight * math.log(max(nearest, FLOOR))
    return total + weight * math.log(FLOOR) * (len(rows) - len(distinct))


def plain_greedy(pool, selection_size, weight, num_neighbors, limit=math.inf):
    """Try every pair at every turn; equal values go to the smaller pair_id."""
    base, embeddings, prompts, pair_id = pool
    chosen: list[int] = []
    while len(chosen) < selection_size:
        allowed = [
            row
            for row in range(len(base))
            if row not in chosen and sum(prompts[c] == prompts[row] for c in chosen) < limit
        ]
        if not allowed:
            break
        values = {
            row: objective_by_definition(
                [*chosen, row], base, embeddings, prompts, weight, num_neighbors
            )
            for row in allowed
        }
        best = max(values.values())
        ties = [row for row in allowed if values[row] > best - 1e-9]
        chosen.append(min(ties, key=lambda row: pair_id[row]))
    return chosen


@pytest.mark.parametrize("num_neighbors", [1, 2, 4])
@pytest.mark.parametrize("weight", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("limit", [None, 1])
def test_choices_are_those_of_plain_greedy(num_neighbors, weight, limit, monkeypatch):
    # Rounds of a few prompts, so that a small pool goes through all that a large one does.
    monkeypatch.setattr(greedy, "_FEWEST_ACTIVE", 3)
    monkeypatch.setattr(greedy, "_FEWEST_PICKS", 2)
    monkeypatch.setattr(greedy, "_CHUNK_ROWS", 5)
    for seed in range(4):
        pool = small_pool(seed)
        chosen = select_greedy(
            *pool,
            15,
            diversity_weight=weight,
            num_neighbors=num_neighbors,
            distance_floor=FLOOR,
            max_pairs_per_prompt=limit,
        )
        assert chosen.tolist() == plain_greedy(pool, 15, weight, num_neighbors, limit or math.inf)


@pytest.mark.parametrize("num_neighbors", [1, 3, 30])
def test_the_objective_is_its_definition(num_neighbors):
    base, embeddings, prompts, _ = small_pool(9)
    got = set_objective(
        base,
        embeddings,
        prompts,
        diversity_weight=0.7,
        num_neighbors=num_neighbors,
        distance_floor=FLOOR,
    )
    rows = range(len(base))
    expected = objective_by_definition(rows, base, embeddings, prompts, 0.7, num_neighbors)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def clustered():
    """Prompts in clusters of very different sizes, in float32 as they come from an encoder."""
    rng = np.random.default_rng(0)
    sizes = rng.zipf(1.3, 60).clip(max=120)
    centers = np.repeat(rng.normal(size=(60, 8)), sizes, axis=0)
    inner = (centers + 0.3 * rng.normal(size=centers.shape)) @ rng.normal(size=(8, 64))
    embeddings = (inner / np.linalg.norm(inner, axis=1, keepdims=True)).astype(np.float32)
    margin, quality = rng.normal(size=(2, len(embeddings)))
    return margin + 0.5 * quality, embeddings


def test_clustered_prompts_get_a_higher_objective_and_entropy_than_top_k(clustered):
    base, embeddings = clustered
    everyone = np.arange(len(base))
    log_distance = np.log(np.maximum(kth_neighbor_distance(embeddings, 5), FLOOR))
    score = importance_score(
        base, None, standardize(log_distance), quality_weight=0, diversity_weight=1.0
    )
    top = select_top_k(score, everyone, 200)
    settings = {
        "diversity_weight": 1.0 / log_distance.std(),
        "num_neighbors": 5,
        "distance_floor": FLOOR,
    }
    chosen = select_greedy(base, embeddings, everyone, everyone, 200, **settings)
    assert len(set(chosen)) == len(top) == 200

    def objective(rows):
        return set_objective(base[rows], embeddings, rows, **settings)

    assert objective(chosen) > objective(top)
    assert knn_entropy(embeddings[chosen], 5) > knn_entropy(embeddings[top], 5)


def test_the_input_order_does_not_matter(clustered):
    base, embeddings = clustered
    rng = np.random.default_rng(1)
    pair_id = rng.permutation(len(base)) << 42
    settings = {"diversity_weight": 2.0, "num_neighbors": 3, "distance_floor": FLOOR}
    chosen = select_greedy(base, embeddings, np.arange(len(base)), pair_id, 300, **settings)
    pairs, prompts = rng.permutation(len(base)), rng.permutation(len(base))
    shuffled = select_greedy(
        base[pairs],
        embeddings[prompts],
        np.argsort(prompts)[pairs],
        pair_id[pairs],
        300,
        **settings,
    )
    np.testing.assert_array_equal(pair_id[chosen], pair_id[pairs][shuffled])


def test_without_diversity_it_is_top_k():
    base, embeddings, prompts, pair_id = small_pool(3)
    base = np.round(base)  # ties
    chosen = select_greedy(
        base,
        embeddings,
        prompts,
        pair_id,
        20,
        diversity_weight=0.0,
        num_neighbors=2,
        distance_floor=FLOOR,
    )
    np.testing.assert_array_equal(chosen, select_top_k(base, pair_id, 20))


def test_a_second_pair_of_a_prompt_waits_until_the_prompts_run_out():
    """At equal scores, with any weight on diversity."""
    embeddings = unit_vectors(np.random.default_rng(4), 6, 3)
    prompts = np.repeat(np.arange(6), 3)
    chosen = select_greedy(
        np.zeros(18),
        embeddings,
        prompts,
        np.arange(18),
        8,
        diversity_weight=0.1,
        num_neighbors=1,
        distance_floor=FLOOR,
    )
    assert sorted(prompts[chosen[:6]]) == [0, 1, 2, 3, 4, 5]
    assert chosen[6:].tolist() == [1, 2]


def test_pairs_without_a_score_are_not_chosen_and_small_pools_are_used_up():
    settings = {"diversity_weight": 1.0, "num_neighbors": 5, "distance_floor": FLOOR}
    base, prompts = [1.0, math.nan, 2.0, math.inf], [0, 0, 1, 1]
    chosen = select_greedy(base, np.eye(2), prompts, [1, 2, 3, 4], 10, **settings)
    assert sorted(chosen) == [0, 2]
    assert not len(select_greedy([math.nan], np.eye(1), [0], [1], 1, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_score": [1.0]}, "for each pair"),
        ({"prompt_index": [0, 2]}, "0 to 1, got 0 to 2"),
        ({"prompt_index": [-1, 0]}, "0 to 1, got -1 to 0"),
        ({"pair_id": [1]}, "pair_id for each"),
        ({"embeddings": 3 * np.eye(2)}, "unit vectors, got one of length 3"),
        ({"embeddings": np.full((2, 2), np.nan)}, "NaN"),
        ({"selection_size": 0}, "selection_size must be at least 1, got 0"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt must be at least 1, got 0"),
        ({"diversity_weight": -1.0}, "diversity_weight must be 0 or more"),
        ({"distance_floor": 0.0}, "distance_floor must be between 0 and 2"),
    ],
)
def test_senseless_pools_and_settings_are_refused(change, message):
    arguments = {
        "base_score": [1.0, 2.0],
        "embeddings": np.eye(2),
        "prompt_index": [0, 1],
        "pair_id": [1, 2],
        "selection_size": 1,
        "diversity_weight": 1.0,
        "num_neighbors": 1,
        "distance_floor": FLOOR,
    }
    with pytest.raises(ValueError, match=message):
        select_greedy(**(arguments | change))
