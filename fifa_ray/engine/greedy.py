"""Set-level selection on the candidates that the importance score ranks highest."""

import logging
from typing import Any

import numpy as np

from fifa_ray.config import FifaConfig
from fifa_ray.engine.row_lookup import read_embeddings
from fifa_ray.engine.strategies import Population
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.greedy import select_greedy
from fifa_ray.scoring.moments import Moments

logger = logging.getLogger(__name__)


def choose_greedily(
    run: RunDir, config: FifaConfig, candidates: dict[str, np.ndarray], population: Population
) -> dict[str, np.ndarray]:
    """The K of the candidates (columns of a `TopK`) that maximise the set objective, best first.

    The margin and quality terms count as they do in the importance score; diversity is measured
    among the chosen prompts themselves, on the same scale.
    """
    select = config.select
    size = int(select.greedy_pool * select.selection_size)
    pool = {name: values[:size] for name, values in candidates.items()}
    prompts, prompt_index = np.unique(pool["prompt_id"], return_inverse=True)
    weight = select.diversity_weight / _log_distance_spread(population, config)
    logger.info(
        "selected: greedy over %s candidates of %s prompts",
        f"{len(prompt_index):,}",
        f"{len(prompts):,}",
    )
    chosen = select_greedy(
        pool["margin_term"] + pool["quality_term"],
        read_embeddings(run, prompts),
        prompt_index,
        pool["pair_id"],
        select.selection_size,
        diversity_weight=weight,
        num_neighbors=config.neighbors.num_neighbors,
        distance_floor=config.neighbors.distance_floor,
        max_pairs_per_prompt=select.max_pairs_per_prompt,
    )
    return {name: values[chosen] for name, values in pool.items()}


def _log_distance_spread(population: Population, config: FifaConfig) -> float:
    """Standard deviation that the importance score divides log distances by; 1 for raw sums."""
    statistics: Any = population.log_kth_neighbor_distance
    if config.select.standardization == "none":
        return 1.0
    if not isinstance(statistics, Moments):
        raise ValueError(
            "select.selector=greedy needs select.standardization=zscore or none: a rank of the "
            "distance in the dataset says nothing about distances within a set"
        )
    return statistics.std or 1.0
