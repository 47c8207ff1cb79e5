"""The passes over all scored pairs: statistics of each term, then the best under each strategy.

One Ray task a part, each a block of rows at a time; what they send back is small and is merged in
the order of the parts.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from fifa_ray.config import FifaConfig, Strategy
from fifa_ray.engine.cluster import tasks_in_flight
from fifa_ray.engine.part_reader import part_task
from fifa_ray.engine.strategies import (
    Population,
    Scoring,
    Statistics,
    candidates,
    margin_needs_a_pass,
    margin_values,
    population_of,
    uniform_hash,
)
from fifa_ray.engine.terms import DROP_REASONS, PromptTerms, Terms, read_terms
from fifa_ray.run_dir import RunDir
from fifa_ray.scoring.importance import TopK, empty_statistics, select_top_k

SAMPLE_PAIRS = 20_000


def collect_statistics(
    run: RunDir,
    config: FifaConfig,
    parts: Sequence[str],
    shared: "ray.ObjectRef[PromptTerms]",
    strategies: Sequence[Strategy],
) -> tuple[dict[str, Population], dict[str, int]]:
    """Statistics of each population, and the number of pairs by drop reason ("" = eligible)."""
    names = sorted({population_of(strategy) for strategy in strategies} | {"eligible"})
    populations = {name: Population.empty(config) for name in names}
    counts = np.zeros(len(DROP_REASONS), np.int64)
    for found, dropped in _each(_statistics_of_part, parts, run, config, shared, names):
        for name in names:
            populations[name].merge(found[name])
        counts += dropped
    if margin_needs_a_pass(config):
        votes = _empty_votes(names, config)
        for by_name in _each(_vote_of_part, parts, run, config, shared, populations):
            votes = {name: merged.merge(by_name[name]) for name, merged in votes.items()}
        for name in names:
            populations[name].margin = votes[name]
    else:
        for population in populations.values():
            population.margin = population.margins[config.rewards[0].name]
    return populations, dict(zip(DROP_REASONS, counts.tolist(), strict=True))


def _empty_votes(names: Iterable[str], config: FifaConfig) -> dict[str, Any]:
    return {name: empty_statistics(config.select.standardization) for name in names}


def _each(task: Any, parts: Sequence[str], *arguments: Any) -> Iterable[Any]:
    """Results of one task a part, in order of the parts, a bounded number in flight."""
    left, flying = deque(parts), deque[Any]()
    while left or flying:
        while left and len(flying) < tasks_in_flight():
            flying.append(task.remote(left.popleft(), *arguments))
        yield ray.get(flying.popleft())


@part_task
def _statistics_of_part(
    part: str, run: RunDir, config: FifaConfig, shared: PromptTerms, names: list[str]
) -> tuple[dict[str, Population], np.ndarray]:
    found = {name: Population.empty(config) for name in names}
    dropped = np.zeros(len(DROP_REASONS), np.int64)
    for terms in read_terms(run, part, config, shared):
        for name, population in found.items():
            population.update(terms.where(candidates(terms, name)))
        dropped += np.bincount(terms.dropped, minlength=len(DROP_REASONS))
    return found, dropped


@part_task
def _vote_of_part(
    part: str,
    run: RunDir,
    config: FifaConfig,
    shared: PromptTerms,
    populations: dict[str, Population],
) -> dict[str, Statistics]:
    votes = _empty_votes(populations, config)
    for terms in read_terms(run, part, config, shared):
        for name, population in populations.items():
            rows = terms.where(candidates(terms, name))
            votes[name] = votes[name].update(margin_values(rows, population, config))
    return votes


def rank_pairs(
    run: RunDir,
    config: FifaConfig,
    parts: Sequence[str],
    shared: "ray.ObjectRef[PromptTerms]",
    strategies: Sequence[Strategy],
    populations: Mapping[str, Population],
) -> dict[str, Any]:
    """Bounded best-of accumulators of every strategy, of the galleries and of the sample."""
    wanted = _accumulators(config, strategies)
    agree = dict.fromkeys((reward.name for reward in config.rewards), 0.0)
    scored = 0
    for tops, agreement, count in _each(
        _rank_part, parts, run, config, shared, list(strategies), dict(populations)
    ):
        scored += count
        for name, top in tops.items():
            wanted[name].merge(top)
        for name, value in agreement.items():
            agree[name] += value
    shares = {name: {"agreement": value / max(1, scored)} for name, value in agree.items()}
    return {**wanted, "agreement": shares}


def _accumulators(config: FifaConfig, strategies: Sequence[Strategy]) -> dict[str, TopK]:
    select, gallery = config.select, max(1, config.report.gallery_size)
    sizes = {strategy: select.selection_size for strategy in strategies}
    pool = select.greedy_pool if select.selector == "greedy" else 1
    sizes[select.strategy] = int(select.selection_size * pool) + gallery
    tops: dict[str, TopK] = {
        name: TopK(size, max_pairs_per_prompt=select.max_pairs_per_prompt)
        for name, size in sizes.items()
    }
    if config.report.enabled:
        tops |= {
            "worst": TopK(gallery),
            "disagrees": TopK(gallery),
            "sample": TopK(SAMPLE_PAIRS),
        }
    return tops


@part_task
def _rank_part(
    part: str,
    run: RunDir,
    config: FifaConfig,
    shared: PromptTerms,
    strategies: list[Strategy],
    populations: dict[str, Population],
) -> tuple[dict[str, TopK], dict[str, float], int]:
    tops = _accumulators(config, strategies)
    agreement = dict.fromkeys((reward.name for reward in config.rewards), 0.0)
    count = 0
    part_index = int(part.removesuffix(".parquet").rpartition("-")[2])
    scorings = {
        strategy: Scoring(strategy, populations[population_of(strategy)], config)
        for strategy in strategies
    }
    for terms in read_terms(run, part, config, shared):
        for strategy, scoring in scorings.items():
            rows = terms.where(candidates(terms, population_of(strategy)))
            score = scoring.importance(rows)
            _offer(tops[strategy], score, rows, part_index, scoring)
            if strategy == config.select.strategy and config.report.enabled:
                _offer(tops["worst"], -score, rows, part_index, scoring)
        scored = terms.where(candidates(terms, "scored"))
        if config.report.enabled:
            scoring = scorings[config.select.strategy]
            first = scored.margins[config.rewards[0].name].astype(np.float64)
            _offer(tops["disagrees"], -first, scored, part_index, scoring)
            draw = uniform_hash(scored.pair_id, config.seed + 1)
            _offer(tops["sample"], draw, scored, part_index, scoring)
        for name, values in scored.margins.items():
            agreement[name] += float((values > 0).sum() + 0.5 * (values == 0).sum())
        count += len(scored.pair_id)
    return tops, agreement, count


def _offer(top: TopK, key: np.ndarray, terms: Terms, part_index: int, scoring: Scoring) -> None:
    """Offer pairs under a key; columns are made only of those that can matter."""
    best = select_top_k(
        key,
        terms.pair_id,
        top.selection_size,
        prompt_id=terms.prompt_id,
        max_pairs_per_prompt=top.max_pairs_per_prompt,
    )
    chosen = terms.where(best)
    top.push(
        key[best],
        chosen.pair_id,
        prompt_id=chosen.prompt_id,
        part=np.full(len(best), part_index, np.int32),
        row=chosen.row,
        prompt_quality=chosen.prompt_quality,
        log_kth_neighbor_distance=chosen.log_kth_neighbor_distance,
        dropped=chosen.dropped,
        **scoring.columns(chosen),
        **{f"reward_margin_{name}": values for name, values in chosen.margins.items()},
    )
