"""All terms -> selected/: the K pairs of highest importance, and the baselines to compare with.

Two or three streaming passes over small columns (`select_passes`): exact moments of each term,
(where several reward models vote, those of their average,) then the score and a bounded top-K.
Nothing but these columns is read until K is known; then only the row groups of the K pairs' images.
Changing a weight or K runs this stage alone.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fifa_ray.config import ConfigError, FifaConfig, Strategy
from fifa_ray.engine import selection_tables
from fifa_ray.engine.greedy import choose_greedily
from fifa_ray.engine.observed import observed, publish
from fifa_ray.engine.select_passes import collect_statistics, rank_pairs
from fifa_ray.engine.strategies import Population, population_of
from fifa_ray.engine.terms import read_prompt_terms
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.scoring.moments import Moments

logger = logging.getLogger(__name__)


@observed(lambda *_: "selected")
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
    shared = read_prompt_terms.remote(run, config)
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
    return publish(run, manifest)


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
