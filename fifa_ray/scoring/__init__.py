"""The mathematics of the filter on numpy arrays: no Ray, no torch, no files, no configuration."""

from fifa_ray.scoring.diversity import (
    knn_entropy,
    knn_entropy_from_distances,
    kth_neighbor_distance,
    log_kth_neighbor_distance,
)
from fifa_ray.scoring.greedy import select_greedy, set_objective
from fifa_ray.scoring.importance import (
    TopK,
    empty_statistics,
    importance_score,
    select_top_k,
    standardize,
)
from fifa_ray.scoring.margin import (
    apply_margin_rule,
    average_margins,
    disagrees_with_human,
    reward_margin,
)
from fifa_ray.scoring.moments import Moments, Ranks

__all__ = [
    "Moments",
    "Ranks",
    "TopK",
    "apply_margin_rule",
    "average_margins",
    "disagrees_with_human",
    "empty_statistics",
    "importance_score",
    "knn_entropy",
    "knn_entropy_from_distances",
    "kth_neighbor_distance",
    "log_kth_neighbor_distance",
    "reward_margin",
    "select_greedy",
    "select_top_k",
    "set_objective",
    "standardize",
]
