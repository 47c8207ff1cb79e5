"""The search itself on Ray Tune: who proposes trials, who stops them, and when there is no more.

Tune's own snapshots are not used to go on after an interruption: they are pickles, and they lag
behind. Instead the trials that are known are proposed again, first of all, and report what is in
their records at no cost; so every algorithm and the halving know what they knew.
"""

import contextlib
import inspect
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
import ray.tune.schedulers
from ray.tune.search import SEARCH_ALG_IMPORT, Searcher
from ray.tune.search.optuna import OptunaSearch

from fifa_ray.config import ConfigError, FifaConfig
from fifa_ray.engine.tune_conductor import METRIC, TIME, start_conductor
from fifa_ray.engine.tune_devices import num_devices
from fifa_ray.engine.tune_records import SearchJob
from fifa_ray.engine.tune_space import Params, Space, most_steps

logger = logging.getLogger(__name__)

TUNE_FOLDER = "ray_tune"
# A trial's own process only waits for others, on the head node; Tune needs it to hold something.
PLACE = ray.tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_search(
    job: SearchJob,
    space: Space,
    ledger: Any,
    *,
    grace: int,
    known: Sequence[Params],
    seed: int,
    max_concurrent: int,
) -> None:
    """Try what the algorithm proposes until the budget of the search, or the trials, are used up.

    `known`: parameters of trials that have begun before, in their order. Raises RuntimeError where
    the algorithm's package is not installed.
    """
    settings = job.config.tune
    factor = settings.asha.reduction_factor
    scheduler = (
        ray.tune.schedulers.AsyncHyperBandScheduler(
            time_attr=TIME,
            grace_period=grace,
            max_t=most_steps(job.config, space) + 1,  # the last step is not "beyond the last"
            reduction_factor=factor,
        )
        if settings.asha.enabled
        else None
    )
    conductor = start_conductor(job, ledger, grace, seed, max_concurrent)
    searcher = build_searcher(job.config, known, seed)
    job.run.remove(job.folder, TUNE_FOLDER)
    try:
        # Tune's reporters print to the terminal whatever they are told.
        with _environment(_SETTINGS), contextlib.redirect_stdout(io.StringIO()):
            ray.tune.Tuner(
                ray.tune.with_resources(_trainable(conductor), PLACE),
                param_space={key: _domain(dimension) for key, dimension in space.items()},
                tune_config=ray.tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    num_samples=max(settings.num_trials, len(known)),
                    search_alg=WithinBudget(searcher, len(known), ledger, _least_work(job, grace)),
                    scheduler=scheduler,
                    max_concurrent_trials=max_concurrent,
                ),
                run_config=ray.tune.RunConfig(
                    name=TUNE_FOLDER,
                    storage_path=job.run.path(job.folder),
                    storage_filesystem=job.run.filesystem,
                    verbose=0,
                    callbacks=[EndTrials(conductor, ledger)],
                ),
            ).fit()
    finally:
        ray.kill(conductor)
        ray.get(ledger.close_trial.remote())
    job.run.remove(job.folder, TUNE_FOLDER)


def build_searcher(config: FifaConfig, known: Sequence[Params], seed: int) -> Searcher:
    """Tune's searcher of `tune.algorithm`, which proposes the known parameters first.

    Raises ConfigError for options that it does not have, RuntimeError where it needs a package that
    is not installed.
    """
    settings = config.tune
    points = [dict(params) for params in known] or None
    # What is known draws nothing: with the same seed its first proposals would come once more.
    seed += len(known)
    try:
        if settings.algorithm in ("optuna", "random"):
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            samplers = {
                "optuna": optuna.samplers.TPESampler,
                "random": optuna.samplers.RandomSampler,
            }
            sampler = samplers[settings.algorithm](seed=seed, **settings.algorithm_options)
            return OptunaSearch(sampler=sampler, points_to_evaluate=points)
        kind = SEARCH_ALG_IMPORT[settings.algorithm]()
        options: dict[str, Any] = {"points_to_evaluate": points}
        if "random_state_seed" in inspect.signature(kind).parameters:
            options["random_state_seed"] = seed
        found: Searcher = kind(**options, **settings.algorithm_options)
    except (ImportError, AssertionError) as error:
        raise RuntimeError(
            f"tune.algorithm={settings.algorithm} needs another package: {error}; or use optuna"
        ) from None
    except TypeError as error:
        raise ConfigError(f"tune.algorithm_options: {error}") from None
    return found


@dataclass(frozen=True)
class Work:
    """What a trial costs at least: units of the ledger's parts, on so many devices."""

    units: dict[str, float]
    devices: float


class WithinBudget(Searcher):
    """A searcher that proposes nothing more when there is no room for another trial."""

    def __init__(self, inner: Searcher, num_known: int, ledger: Any, work: Work) -> None:
        """`num_known`: its first proposals, which may cost nothing any more."""
        super().__init__(metric=METRIC, mode="max")
        self.inner, self.num_known, self.ledger, self.work = inner, num_known, ledger, work

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Tune tells what is searched."""
        return bool(self.inner.set_search_properties(metric, mode, config, **spec))

    def suggest(self, trial_id: str) -> Any:
        """Parameters; None: not now; FINISHED: never again."""
        if self.num_known > 0:
            self.num_known -= 1
            return self.inner.suggest(trial_id)
        room = ray.get(self.ledger.room.remote("search", self.work.units, self.work.devices))
        if room == "no":
            return Searcher.FINISHED
        return self.inner.suggest(trial_id) if room == "yes" else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A rung of a trial."""
        if METRIC in result:
            self.inner.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The last of a trial; one without any rung has failed."""
        known = result if result and METRIC in result else None
        self.inner.on_trial_complete(trial_id, known, error=error or known is None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: known trials are proposed again."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class EndTrials(ray.tune.Callback):
    """When Tune ends a trial, its devices are taken at once, and it is charged for them."""

    def __init__(self, conductor: Any, ledger: Any) -> None:
        self.conductor, self.ledger = conductor, ledger

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has ended by itself, or the scheduler has stopped it."""
        self._end(trial.trial_id, "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial's process has died."""
        self._end(trial.trial_id, "crashed")

    def _end(self, trial_id: str, status: str) -> None:
        became = ray.get(self.conductor.end.remote(trial_id, status))
        if became is not None:
            spent = ray.get(self.ledger.spent.remote())
            logger.info("tuning: trial %s; %.0f device-seconds spent", became, spent)


def _trainable(conductor: Any) -> Any:
    def trial(params: Params) -> None:
        trial_id = ray.tune.get_context().get_trial_id()
        while rung := ray.get(conductor.next_rung.remote(trial_id, params)):
            ray.tune.report(rung)
        if ray.get(conductor.failed_at_once.remote(trial_id)):
            # Nothing can be worse: the algorithm learns to keep away.
            ray.tune.report({METRIC: 0.0, TIME: 0})

    return trial


def _least_work(job: SearchJob, grace: int) -> Work:
    """A trial's first rung, when all its latents are there."""
    units: dict[str, float] = {
        "selecting": 0 if job.use_gpu else 1,
        "start": 1,
        "training": 1,
        "pair": grace * job.config.train.global_batch_size,
        "drawing": 1,
        "image": len(job.prompts("search")),
    }
    return Work(units, num_devices(job.config, use_gpu=job.use_gpu))


def _domain(dimension: Any) -> Any:
    """Tune's domain; its whole numbers leave out the upper end."""
    if dimension.choice is not None:
        return ray.tune.choice(list(dimension.choice))
    low, high = dimension.bounds
    if dimension.uniform is not None:
        return ray.tune.uniform(low, high)
    if dimension.loguniform is not None:
        return ray.tune.loguniform(low, high)
    if dimension.integer is not None:
        return ray.tune.randint(int(low), int(high) + 1)
    return ray.tune.lograndint(int(low), int(high) + 1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
