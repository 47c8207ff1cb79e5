"""All terms -> selected/: the K pairs of highest importance, and the baselines to compare with.

Two or three streaming passes over small columns, one Ray task a part: exact moments of each term,
(where several reward models vote, those of their average,) then the score and a bounded top-K.
Nothing but these columns is read until K is known; then only the row groups of the K pairs' images.
Changing a weight or K runs this stage alone.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from fifa_ray.config import ConfigError, FifaConfig, Strategy
from fifa_ray.engine import selection_tables
from fifa_ray.engine.greedy import choose_greedily
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
from fifa_ray.engine.terms import DROP_REASONS, PromptTerms, Terms, read_prompt_terms, read_terms
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.scoring.importance import TopK, empty_statistics, select_top_k
from fifa_ray.scoring.moments import Moments

logger = logging.getLogger(__name__)

SAMPLE_PAIRS = 20_000


def run_select(run: RunDir, config: FifaConfig) -> Manifest:
    """Choose the K pairs and write selected/, selected_ids/, baselines/, gallery/, scored_sample/.

    The hard filters (quality, harmful) belong to the method, so baselines choose among all scored
    pairs. Raises ValueError when no pair is left to choose from, naming what dropped them.
    """
    upstream = _upstream(run, config)
    stage_fingerprint = fingerprint(
        "selected",
        upstream,
        config.select.model_dump(mode="json"),
        [reward.vote_weight for reward in config.rewards],
        config.seed,
        config.report.model_dump(include={"enabled", "gallery_size"}),
    )
    found = run.manifest("selected")
    if found is not None and found.fingerprint == stage_fingerprint:
        logger.info("selected: already complete, %s pairs", f"{found.rows_out:,}")
        return found
    run.invalidate("selected")
    for table in ("selected_ids", "baselines", "gallery", "scored_sample"):
        run.remove(table)
    started = time.monotonic()
    parts = run.list("pairs")
    shared = ray.put(read_prompt_terms(run, config))
    strategies = _strategies(config)
    populations, counts = collect_statistics(run, config, parts, shared, strategies)
    total = sum(counts.values())
    _check_any_left(config, counts)
    tops = rank_pairs(run, config, parts, shared, strategies, populations)
    sets = {name: _chosen(run, config, name, tops[name].best(), populations) for name in strategies}
    kept = sets[config.select.strategy]
    if len(kept["pair_id"]) < config.select.selection_size:
        logger.warning(
            "select.selection_size is %s but only %s pairs can be chosen: all of them are kept",
            f"{config.select.selection_size:,}",
            f"{len(kept['pair_id']):,}",
        )
    details = selection_tables.write_selection(run, config, sets, _extras(config, tops, kept))
    dropped = {reason: n for reason, n in counts.items() if reason and n}
    manifest = Manifest(
        stage="selected",
        fingerprint=stage_fingerprint,
        rows_in=total,
        rows_out=len(kept["pair_id"]),
        quarantined=dropped | {"not_selected": counts[""] - len(kept["pair_id"])}
        if config.select.strategy == "fifa"
        else {"not_selected": total - len(kept["pair_id"])},
        seconds=time.monotonic() - started,
        config=config.select.model_dump(mode="json"),
        details=details
        | {
            "num_scored": total - counts["unscored"],
            "dropped": dropped,
            "threshold": float(kept["importance_score"].min()),
            "terms": _describe(populations["eligible"]),
            "reward_models": tops["agreement"],
        },
    )
    return run.publish(manifest)


def _upstream(run: RunDir, config: FifaConfig) -> dict[str, str]:
    stages = ["pairs", *(f"rewards/{reward.name}" for reward in config.rewards), "neighbors"]
    if config.judge.enabled:
        stages.append("quality")
    found = {stage: run.manifest(stage) for stage in stages}
    missing = [stage for stage, manifest in found.items() if manifest is None]
    if missing:
        raise ConfigError(
            f"{run.uri} lacks the complete stages {missing}; run `fifa filter` with the same "
            "configuration, it does only what is missing"
        )
    return {stage: manifest.fingerprint for stage, manifest in found.items() if manifest}


def _strategies(config: FifaConfig) -> list[Strategy]:
    wanted = [config.select.strategy, *config.select.compare]
    if not config.judge.enabled:
        wanted = [strategy for strategy in wanted if strategy != "quality_only"]
    return list(dict.fromkeys(wanted))


def _check_any_left(config: FifaConfig, counts: Mapping[str, int]) -> None:
    left = counts[""] if config.select.strategy == "fifa" else sum(counts.values())
    if not left:
        raise ValueError(
            f"no pair is left to choose from: {dict(counts)}; loosen select.min_quality or "
            "select.exclude_harmful, or look at quarantine/ for why pairs have no score"
        )


def collect_statistics(
    run: RunDir,
    config: FifaConfig,
    parts: Sequence[str],
    shared: "ray.ObjectRef[PromptTerms]",
    strategies: Sequence[Strategy],
) -> tuple[dict[str, Population], dict[str, int]]:
    """Statistics of each population, and the number of pairs by drop reason ("" = eligible)."""
    names = {population_of(strategy) for strategy in strategies} | {"eligible"}
    populations = {name: Population() for name in names}
    counts = dict.fromkeys(DROP_REASONS, 0)
    for found, dropped in _each(_statistics_of_part, parts, run, config, shared, sorted(names)):
        for name in names:
            _merge_population(populations[name], found[name])
        for reason, count in zip(DROP_REASONS, dropped, strict=True):
            counts[reason] += int(count)
    if margin_needs_a_pass(config):
        for by_name in _each(_vote_of_part, parts, run, config, shared, populations):
            for name, statistics in by_name.items():
                mine = populations[name].margin
                populations[name].margin = statistics if mine is None else mine.merge(statistics)
    else:
        for population in populations.values():
            population.margin = population.margins[config.rewards[0].name]
    return populations, counts


def _merge_population(mine: Population, other: Population) -> None:
    for name, moments in other.margins.items():
        mine.margins[name] = mine.margins[name].merge(moments) if name in mine.margins else moments
    for term in ("prompt_quality", "log_kth_neighbor_distance"):
        old, new = getattr(mine, term), getattr(other, term)
        setattr(mine, term, new if old is None else old.merge(new))


def _each(task: Any, parts: Sequence[str], *arguments: Any) -> Iterable[Any]:
    """Results of one task a part, in order of the parts, a bounded number in flight."""
    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    queue = [task.remote(part, *arguments) for part in parts[:limit]]
    for part in (*parts[limit:], *[None] * min(limit, len(parts))):
        result = ray.get(queue.pop(0))
        if part is not None:
            queue.append(task.remote(part, *arguments))
        yield result


@ray.remote(num_cpus=1)
def _statistics_of_part(
    part: str,
    run: RunDir,
    config: FifaConfig,
    shared: PromptTerms,
    names: list[str],
) -> tuple[dict[str, Population], np.ndarray]:
    terms = read_terms(run, part, config, shared)
    rule = config.select.standardization
    found = {}
    for name in names:
        rows = terms.where(candidates(terms, name))
        found[name] = Population(
            margins={model: Moments.of(values) for model, values in rows.margins.items()},
            prompt_quality=empty_statistics(rule).update(rows.prompt_quality),
            log_kth_neighbor_distance=empty_statistics(rule).update(rows.log_kth_neighbor_distance),
        )
    return found, np.bincount(terms.dropped, minlength=len(DROP_REASONS))


@ray.remote(num_cpus=1)
def _vote_of_part(
    part: str,
    run: RunDir,
    config: FifaConfig,
    shared: PromptTerms,
    populations: dict[str, Population],
) -> dict[str, Statistics]:
    terms = read_terms(run, part, config, shared)
    found: dict[str, Statistics] = {}
    for name, population in populations.items():
        rows = terms.where(candidates(terms, name))
        values = margin_values(rows, population, config)
        found[name] = empty_statistics(config.select.standardization).update(values)
    return found


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


@ray.remote(num_cpus=1)
def _rank_part(
    part: str,
    run: RunDir,
    config: FifaConfig,
    shared: PromptTerms,
    strategies: list[Strategy],
    populations: dict[str, Population],
) -> tuple[dict[str, TopK], dict[str, float], int]:
    terms = read_terms(run, part, config, shared)
    tops = _accumulators(config, strategies)
    part_index = int(part.removesuffix(".parquet").rpartition("-")[2])
    for strategy in strategies:
        population = population_of(strategy)
        scoring = Scoring(strategy, populations[population], config)
        rows = np.flatnonzero(candidates(terms, population))
        chosen = terms.where(rows)
        score = scoring.importance(chosen)
        _offer(tops[strategy], score, chosen, rows, part_index, scoring)
        if strategy == config.select.strategy and config.report.enabled:
            _offer(tops["worst"], -score, chosen, rows, part_index, scoring)
    rows = np.flatnonzero(candidates(terms, "scored"))
    scored = terms.where(rows)
    if config.report.enabled:
        main = config.select.strategy
        scoring = Scoring(main, populations[population_of(main)], config)
        first = scored.margins[config.rewards[0].name].astype(np.float64)
        _offer(tops["disagrees"], -first, scored, rows, part_index, scoring)
        draw = uniform_hash(scored.pair_id, config.seed + 1)
        _offer(tops["sample"], draw, scored, rows, part_index, scoring)
    agreement = {
        name: float((values > 0).sum() + 0.5 * (values == 0).sum())
        for name, values in scored.margins.items()
    }
    return tops, agreement, len(rows)


def _offer(
    top: TopK, key: np.ndarray, terms: Terms, rows: np.ndarray, part_index: int, scoring: Scoring
) -> None:
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
        row=rows[best],
        prompt_quality=chosen.prompt_quality,
        log_kth_neighbor_distance=chosen.log_kth_neighbor_distance,
        dropped=chosen.dropped,
        **scoring.columns(chosen),
        **{f"reward_margin_{name}": values for name, values in chosen.margins.items()},
    )


def _chosen(
    run: RunDir,
    config: FifaConfig,
    strategy: Strategy,
    ranked: dict[str, np.ndarray],
    populations: Mapping[str, Population],
) -> dict[str, np.ndarray]:
    """The K of one strategy, best first."""
    if strategy == config.select.strategy and config.select.selector == "greedy":
        return choose_greedily(run, config, ranked, populations[population_of(strategy)])
    return {name: values[: config.select.selection_size] for name, values in ranked.items()}


def _extras(
    config: FifaConfig, tops: Mapping[str, Any], kept: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """What the report shows beside the selection; nothing where there is to be none."""
    if not config.report.enabled:
        return {}
    gallery = config.report.gallery_size
    ranked = tops[config.select.strategy].best()
    missed = np.flatnonzero(~np.isin(ranked["pair_id"], kept["pair_id"]))[:gallery]
    return {
        "best": {name: values[:gallery] for name, values in kept.items()},
        "just_missed": {name: values[missed] for name, values in ranked.items()},
        "worst": tops["worst"].best(),
        "disagrees": tops["disagrees"].best(),
        "sample": tops["sample"].best(),
    }


def _describe(population: Population) -> dict[str, dict[str, float]]:
    described = {
        f"reward_margin_{name}": {"mean": m.mean, "std": m.std}
        for name, m in population.margins.items()
    }
    for term in ("prompt_quality", "log_kth_neighbor_distance"):
        statistics = getattr(population, term)
        if isinstance(statistics, Moments):
            described[term] = {"mean": statistics.mean, "std": statistics.std}
    return described
