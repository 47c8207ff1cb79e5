"""How each strategy scores a pair: the method, and the baselines by the same code path."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from fifa_ray.config import FifaConfig, SelectConfig, Strategy
from fifa_ray.engine.terms import DROP_REASONS, Terms
from fifa_ray.scoring.importance import (
    Standardization,
    empty_statistics,
    importance_score,
    standardize,
)
from fifa_ray.scoring.margin import apply_margin_rule, average_margins
from fifa_ray.scoring.moments import Moments, Ranks

Statistics = Moments | Ranks

_PROMPT_TERMS = ("prompt_quality", "log_kth_neighbor_distance")


@dataclass
class Population:
    """Statistics of the pairs that one kind of strategy may choose from."""

    margins: dict[str, Moments]
    prompt_quality: Statistics
    log_kth_neighbor_distance: Statistics
    margin: Statistics | None = None  # of the vote under the margin rule

    @classmethod
    def empty(cls, config: FifaConfig) -> Self:
        """Statistics of no pair yet, of the kind that the configuration needs."""
        rule = config.select.standardization
        margins = {reward.name: Moments() for reward in config.rewards}
        return cls(margins, empty_statistics(rule), empty_statistics(rule))

    def update(self, terms: Terms) -> None:
        """Take in some pairs."""
        self.margins = {
            name: moments.update(terms.margins[name]) for name, moments in self.margins.items()
        }
        for name in _PROMPT_TERMS:
            setattr(self, name, getattr(self, name).update(getattr(terms, name)))

    def merge(self, other: Self) -> None:
        """Take in what was collected of other pairs."""
        self.margins = {
            name: moments.merge(other.margins[name]) for name, moments in self.margins.items()
        }
        for name in _PROMPT_TERMS:
            setattr(self, name, getattr(self, name).merge(getattr(other, name)))


@dataclass(frozen=True)
class Weights:
    """Weights of the three terms under one strategy."""

    margin: float
    quality: float
    diversity: float


def weights_of(strategy: Strategy, config: SelectConfig) -> Weights:
    """A baseline keeps one term; `random` keeps none."""
    return {
        "fifa": Weights(config.margin_weight, config.quality_weight, config.diversity_weight),
        "margin_only": Weights(1.0, 0.0, 0.0),
        "quality_only": Weights(0.0, 1.0, 0.0),
        "diversity_only": Weights(0.0, 0.0, 1.0),
        "random": Weights(0.0, 0.0, 0.0),
    }[strategy]


def population_of(strategy: Strategy) -> str:
    """Baselines see every scored pair; the method's hard filters are its own."""
    return "eligible" if strategy == "fifa" else "scored"


def candidates(terms: Terms, population: str) -> np.ndarray:
    """Bool mask of the pairs that a population holds."""
    if population == "eligible":
        return terms.dropped == 0
    return terms.dropped != DROP_REASONS.index("unscored")


def margin_needs_a_pass(config: FifaConfig) -> bool:
    """Whether what is standardised is not simply one model's margin."""
    select = config.select
    return (
        len(config.rewards) > 1
        or select.margin_rule == "absolute"
        or select.standardization == "rank"
    )


def vote(
    terms: Terms, population: Population, config: FifaConfig
) -> tuple[np.ndarray, float, float]:
    """One signed margin a pair (float64), the only model's or the average, its mean and spread."""
    models = list(population.margins)
    if len(models) == 1:
        moments = population.margins[models[0]]
        return np.asarray(terms.margins[models[0]], np.float64), moments.mean, moments.std
    weights = {reward.name: reward.vote_weight for reward in config.rewards}
    margin = average_margins(
        [terms.margins[model] for model in models],
        [population.margins[model] for model in models],
        [weights[model] for model in models],
    )
    return margin, 0.0, 1.0


def margin_values(terms: Terms, population: Population, config: FifaConfig) -> np.ndarray:
    """The vote under the margin rule; the band of `clipped` is in standard deviations."""
    margin, mean, std = vote(terms, population, config)
    low, high = config.select.margin_clip
    if config.select.margin_rule == "clipped" and not std > 0:
        return margin
    return apply_margin_rule(
        margin, config.select.margin_rule, (mean + low * std, mean + high * std)
    )


@dataclass(frozen=True)
class Scoring:
    """Scores pairs under one strategy, by the statistics of the population it chooses from."""

    strategy: Strategy
    population: Population
    config: FifaConfig

    def importance(self, terms: Terms) -> np.ndarray:
        """Importance score, float64 (P,); NaN for a pair that cannot be chosen."""
        if self.strategy == "random":
            return uniform_hash(terms.pair_id, self.config.seed)
        weights = weights_of(self.strategy, self.config.select)
        return importance_score(
            self._margin(terms) if weights.margin else None,
            self._quality(terms) if weights.quality else None,
            self._diversity(terms) if weights.diversity else None,
            margin_weight=weights.margin,
            quality_weight=weights.quality,
            diversity_weight=weights.diversity,
        )

    def columns(self, terms: Terms) -> dict[str, np.ndarray]:
        """The score, the vote's raw margin and each weighted term, float64 (P,)."""
        weights = weights_of(self.strategy, self.config.select)
        zeros = np.zeros(len(terms.pair_id))
        return {
            "score": self.importance(terms),
            "reward_margin": vote(terms, self.population, self.config)[0],
            "margin_term": weights.margin * self._margin(terms) if weights.margin else zeros,
            "quality_term": weights.quality * self._quality(terms) if weights.quality else zeros,
            "diversity_term": (
                weights.diversity * self._diversity(terms) if weights.diversity else zeros
            ),
        }

    @property
    def _rule(self) -> Standardization:
        return self.config.select.standardization

    def _margin(self, terms: Terms) -> np.ndarray:
        values = margin_values(terms, self.population, self.config)
        return standardize(values, self._rule, self.population.margin)

    def _quality(self, terms: Terms) -> np.ndarray:
        rated = self.population.prompt_quality
        quality = standardize(terms.prompt_quality, self._rule, rated)
        if self.config.select.quality_error_policy == "neutral":
            return np.where(np.isnan(quality), _neutral(rated, self._rule), quality)
        return quality

    def _diversity(self, terms: Terms) -> np.ndarray:
        return standardize(
            terms.log_kth_neighbor_distance,
            self._rule,
            self.population.log_kth_neighbor_distance,
        )


def _neutral(statistics: Statistics | None, rule: str) -> float:
    """What an unrated prompt's quality counts as: the mean of the rated ones."""
    return statistics.mean if rule == "none" and isinstance(statistics, Moments) else 0.0


def uniform_hash(pair_id: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random float64 in [0, 1) of each id: SplitMix64's finaliser, so no order matters."""
    x = pair_id.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
