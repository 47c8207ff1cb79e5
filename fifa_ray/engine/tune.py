"""A search from its prompts to its winner: the base, the configured settings, trials, the re-run.

    tuning/<name>/  identity.json  ledger.jsonl  prompts/  trials/  scores/  final/
                    best.yaml  results.json

Scores of pairs come from the run's tables. Prompts that models are judged on are trained on by no
trial, and those of the re-run are drawn by no trial. All of it is paid from one budget.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from fifa_ray.config import ConfigError, FifaConfig, dump_config
from fifa_ray.config.suggestions import suggest
from fifa_ray.engine.evaluate_prompts import HELD_OUT, held_out_prompts, image_rows
from fifa_ray.engine.evaluate_scorers import ImageScorer, Scorer, resolve_scorers, took_part
from fifa_ray.engine.nodes import alive_nodes, check_possible, room
from fifa_ray.engine.train import OutOfTime, absolute_run, trains_on_gpu, workers_need
from fifa_ray.engine.train_model import describe_model
from fifa_ray.engine.training_data import prepare_training_data
from fifa_ray.engine.tune_budget import budget_of
from fifa_ray.engine.tune_devices import num_devices
from fifa_ray.engine.tune_latents import LatentCache
from fifa_ray.engine.tune_ledger import Ledger, Purpose
from fifa_ray.engine.tune_results import RESULTS, best_record, read_trials, write_results
from fifa_ray.engine.tune_search import run_search, take_devices, task_of
from fifa_ray.engine.tune_space import (
    Params,
    Space,
    configured_params,
    grace_steps,
    is_inside,
    search_space,
    with_params,
)
from fifa_ray.engine.tune_trial import (
    BASE,
    SearchJob,
    Task,
    TrialRecord,
    branch_of,
    draw_base,
    read_record,
    run_task,
)
from fifa_ray.run_dir import Manifest, RunDir, fingerprint
from fifa_ray.sources.prompt_sets import read_prompt_set, sample_prompts

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
BEST_FILE = "best.yaml"


def run_tune(
    run: RunDir, config: FifaConfig, extra_scorers: Mapping[str, ImageScorer] | None = None
) -> dict[str, Any]:
    """Search what `config.tune` says, or the rest of it; returns the results.

    `extra_scorers`: further scorers by name, which `tune.objective` may name. Raises ConfigError
    before anything is paid for where the settings cannot be used, or the search's folder holds
    another search; RuntimeError where the budget does not reach for the configured settings.
    """
    started = time.monotonic()
    run = absolute_run(run)
    settings = config.tune
    stage = f"tuning/{settings.name}"
    space = search_space(config)
    use_gpu = trains_on_gpu(config.train, config.ray.wait_seconds)
    money = budget_of(config, use_gpu=use_gpu)
    train = _plain_training(config, use_gpu)
    scorer = objective(run, config, extra_scorers or {})
    one = workers_need(config.train, use_gpu)
    check_possible(stage, one)
    weights = describe_model(config.train)
    identity = _identity(run, config, scorer, weights)
    _check_identity(run, stage, identity)
    whole = fingerprint(identity, settings.model_dump(mode="json"))
    found = run.manifest(stage)
    if found is not None and found.fingerprint == whole:
        logger.info("%s: already complete", stage)
        return dict(json.loads(run.read_text(stage, RESULTS)))
    data = prepare_training_data(run, _of_whole_dataset(config))
    job = SearchJob(
        run=run,
        config=config.model_copy(update={"train": train}),
        weights=weights,
        data=data,
        cache=LatentCache.of(run, config, data, weights),
        scorer=scorer,
        use_gpu=use_gpu,
    )
    write_prompts(job)
    ledger = ray.remote(Ledger).options(num_cpus=0, max_concurrency=1).remote(
        run, stage, budget=money.device_seconds, final_share=settings.final_share,
        safety=settings.safety,
    )  # fmt: skip
    seed = config.seed if settings.seed is None else settings.seed
    grace = grace_steps(config, space)
    at_once = settings.max_concurrent or max(1, room(alive_nodes(), one) // one.count)
    try:
        default = _try_configured(job, space, ledger, grace, seed)
        run_search(
            job,
            space,
            ledger,
            grace=grace,
            known=_known_params(job, space, default),
            seed=seed,
            max_concurrent=at_once,
        )
        final = run_final(job, ledger, default, seed, at_once)
    finally:
        with contextlib.suppress(ray.exceptions.RayError):  # it has gone with the cluster
            take_devices(job, ledger)
    results = write_results(job, space, money, default, final, ray.get(ledger.charges.remote()))
    best = read_record(run, job.folder, "trials", results["best"], "trial.json")
    assert best is not None
    run.write_text(dump_config(best_config(config, best.params)), job.folder, BEST_FILE)
    trials = len(results["trials"])
    run.publish(
        Manifest(
            stage=stage,
            fingerprint=whole,
            rows_in=trials,
            rows_out=trials,
            seconds=time.monotonic() - started,
            config=settings.model_dump(mode="json"),
            details={"device": money.unit, "device_seconds": results["spent"]},
        )
    )
    return results


# What is searched, with what


def objective(run: RunDir, config: FifaConfig, extra: Mapping[str, ImageScorer]) -> Scorer:
    """Who judges: `tune.objective`, or the first that took no part in filtering.

    Raises ConfigError where that is nobody, or it cannot be loaded beside the models.
    """
    configured = (*config.rewards, *config.evaluate.extra_rewards)
    neutral = [reward.name for reward in configured if not took_part(config, reward)] + list(extra)
    names = [reward.name for reward in configured] + list(extra)
    name = config.tune.objective or next(iter(neutral), None)
    if name is None:
        raise ConfigError(
            f"every reward took part in filtering ({', '.join(names)}), so none is a neutral "
            "judge: add one to evaluate.extra_rewards, or name one in tune.objective all the same"
        )
    if name not in names:
        raise ConfigError(
            f"tune.objective: no reward is named {name!r}; there are {', '.join(names)}"
            f"{suggest(name, names)}"
        )
    rewards = () if name in extra else (name,)
    named = config.evaluate.model_copy(update={"rewards": rewards})
    own = {name: extra[name]} if name in extra else {}
    (found,) = resolve_scorers(run, config.model_copy(update={"evaluate": named}), own)
    if found.actors.runtime_env:
        raise ConfigError(
            f"tune.objective: {name} needs a runtime_env of its own, which trials cannot give it; "
            "name another one"
        )
    if found.took_part:
        logger.warning(
            "tuning: %s took part in filtering: what it likes is selected for, so it is no neutral "
            "judge of what to select",
            name,
        )
    return found


def _of_whole_dataset(config: FifaConfig) -> FifaConfig:
    train = config.train.model_copy(update={"data": "pairs", "max_pairs": None})
    return config.model_copy(update={"train": train})


def _plain_training(config: FifaConfig, use_gpu: bool) -> Any:
    """The settings of training as trials have them: on the selection, from cached latents."""
    settings = config.train
    if settings.data != "selected" or settings.max_pairs is not None:
        raise ConfigError(
            f"tuning trains on selections: leave out train.data={settings.data} and train.max_pairs"
        )
    if not settings.cache_latents:
        raise ConfigError("trials share cached latents: leave out train.cache_latents=false")
    return settings.model_copy(update={"use_gpu": use_gpu})


def _identity(run: RunDir, config: FifaConfig, scorer: Scorer, weights: Mapping[str, Any]) -> str:
    """Of what the win rate of a trial depends on, besides its own parameters."""
    stages = {"pairs", "neighbors", "quality"} | {f"rewards/{r.name}" for r in config.rewards}
    tables = {s: m.fingerprint for s, m in sorted(run.manifests().items()) if s in stages}
    unused = {"num_workers", "min_workers", "num_cpus_per_worker", "use_gpu", "label_selector",
              "loader_memory", "checkpoint_every", "keep_checkpoints", "max_failures", "loggers",
              "cache_actors", "name", "log_every"}  # fmt: skip
    sampler = {"prompts", "images_per_prompt", "num_inference_steps", "guidance_scale",
               "resolution", "precision"}  # fmt: skip
    return fingerprint(
        "tuning",
        tables,
        weights["sha256"],
        config.select.model_dump(mode="json", exclude={"images", "compare", "column_names"}),
        config.train.model_dump(mode="json", exclude=unused),
        config.evaluate.model_dump(mode="json", include=sampler),
        config.seed,
        config.tune.model_dump(include={"seed", "search_prompts", "final_prompts"}),
        [scorer.name, scorer.identity],
    )


def _check_identity(run: RunDir, stage: str, identity: str) -> None:
    if not run.exists(stage, IDENTITY_FILE):
        run.write_text(json.dumps({"fingerprint": identity}), stage, IDENTITY_FILE)
        return
    if json.loads(run.read_text(stage, IDENTITY_FILE))["fingerprint"] != identity:
        raise ConfigError(
            f"{run.path(stage)} holds a search of other tables, models or settings, whose results "
            "cannot be mixed with these; give this one another tune.name, or delete that folder "
            "(only tune's space, budget, number of trials and algorithm may change)"
        )


def write_prompts(job: SearchJob) -> None:
    """prompts/search.parquet and prompts/final.parquet, which have no prompt in common.

    Raises ConfigError where there are too few.
    """
    if all(job.run.exists(job.folder, "prompts", f"{p}.parquet") for p in ("search", "final")):
        return
    tune, evaluate = job.config.tune, job.config.evaluate
    wanted = tune.search_prompts + tune.final_prompts
    if evaluate.prompts == HELD_OUT:
        counted = evaluate.model_copy(update={"num_prompts": wanted})
        # A run of no selection: its own trials keep these prompts out of what they train on.
        empty = branch_of(job, BASE)
        prompts = held_out_prompts(empty, job.config.model_copy(update={"evaluate": counted}), [])
    else:
        prompts = sample_prompts(read_prompt_set(evaluate.prompts), wanted, job.config.seed)
    if len(prompts) < wanted:
        raise ConfigError(
            f"{len(prompts):,} prompts are there to judge models on (evaluate.prompts="
            f"{evaluate.prompts}), tune.search_prompts and tune.final_prompts want {wanted:,}"
        )
    parts: dict[Purpose, pa.Table] = {
        "search": prompts.slice(0, tune.search_prompts),
        "final": prompts.slice(tune.search_prompts),
    }
    for index, (purpose, part) in enumerate(parts.items()):
        rows = image_rows(part, evaluate.images_per_prompt, job.config.seed + index)
        job.run.write_table(rows, job.folder, "prompts", f"{purpose}.parquet")


# The search


def _try_configured(
    job: SearchJob, space: Space, ledger: Any, grace: int, seed: int
) -> TrialRecord:
    """The base's images, and the trial of the configured settings: they measure what things cost.

    Raises RuntimeError where it fails, or the budget does not reach so far.
    """
    task = task_of(job, configured_params(job.config, space), grace, seed)
    try:
        draw_base(job, "search", ledger)
        record = run_task(job, task, ledger, report=_say_rung)
    except OutOfTime as error:
        raise RuntimeError(_too_small(job, ledger, str(error))) from None
    if not record.rungs:
        if record.status == "budget":
            raise RuntimeError(_too_small(job, ledger, "the configured settings did not finish"))
        raise RuntimeError(
            f"tuning: the trial of the configured settings {record.status}: {record.reason}"
        )
    return record


def _say_rung(rung: Mapping[str, Any]) -> None:
    logger.info(
        "tuning: configured settings, step %s: win rate %.1f%%",
        f"{rung['steps']:,}",
        100 * rung["win_rate"],
    )


def _too_small(job: SearchJob, ledger: Any, what: str) -> str:
    spent = ray.get(ledger.spent.remote())
    return (
        f"tune.budget is too small for one trial: {what}; {spent:.0f} device-seconds are spent, "
        f"and {job.config.tune.final_share:.0%} are kept for the re-run. Raise the budget: the "
        "same command goes on from here"
    )


def _known_params(job: SearchJob, space: Space, default: TrialRecord) -> list[Params]:
    """Parameters of the trials that have begun, the configured ones first, as they can be proposed
    again.
    """
    trials = [default, *(t for t in read_trials(job) if t.trial != default.trial)]
    return [trial.params for trial in trials if is_inside(space, trial.params)]


# The re-run


def run_final(
    job: SearchJob, ledger: Any, default: TrialRecord, seed: int, at_once: int
) -> dict[str, list[str]]:
    """Train the winner and the configured settings again, with other seeds, and judge them on the
    other prompts: for as many seeds as the budget has room for.

    Returns the accounts of the trainings of each, "best" and "default", seed by seed.
    """
    best = best_record(read_trials(job))
    models = {"best": best} | ({"default": default} if best.trial != default.trial else {})
    done: dict[str, list[str]] = {label: [] for label in models}
    try:
        draw_base(job, "final", ledger)
    except OutOfTime:
        logger.warning("tuning: the budget has no room for a re-run of the winner")
        return done
    for number in range(job.config.tune.final_seeds):
        tasks = [
            _final_task(job, label, record, seed + 1 + number) for label, record in models.items()
        ]
        if not _all_fit(job, ledger, tasks):
            logger.warning(
                "tuning: the budget has room for %d of %d seeds of the re-run; raise it, or "
                "tune.final_share",
                number,
                job.config.tune.final_seeds,
            )
            break
        with ThreadPoolExecutor(min(at_once, len(tasks))) as pool:
            records = list(
                pool.map(lambda task: run_task(job, task, ledger, report=_say_nothing), tasks)
            )
        unfinished = [record for record in records if record.status != "complete"]
        if unfinished:
            logger.warning(
                "tuning: the re-run ended with seed %d: %s",
                tasks[0].seed,
                ", ".join(record.reason or record.status for record in unfinished),
            )
            break
        for label, task in zip(models, tasks, strict=True):
            done[label].append(task.account)
    return done


def _final_task(job: SearchJob, label: str, record: TrialRecord, seed: int) -> Task:
    steps = int(record.params.get("train.max_steps", job.config.train.max_steps))
    return Task(
        trial=record.trial,
        params=record.params,
        rungs=(steps,),
        seed=seed,
        purpose="final",
        account=f"final-{label}-{record.trial}-s{seed}",
        training=f"final-s{seed}",
    )


def _all_fit(job: SearchJob, ledger: Any, tasks: list[Task]) -> bool:
    """Whether the budget has room for all of these: half a comparison is none."""
    total: dict[str, float] = {}
    for task in tasks:
        if read_record(job.run, job.folder, "final", f"{task.account}.json") is not None:
            continue
        config = with_params(job.config, task.params)
        units = {
            "selecting": 0.0 if job.use_gpu else 1.0,
            "start": 1.0,
            "training": 1.0,
            "pair": float(task.rungs[-1] * config.train.global_batch_size),
            "drawing": 1.0,
            "image": float(len(job.prompts("final"))),
        }
        for part, count in units.items():
            total[part] = total.get(part, 0.0) + count
    devices = num_devices(job.config, use_gpu=job.use_gpu)
    return not total or bool(ray.get(ledger.room.remote("final", total, devices)) == "yes")


def _say_nothing(rung: Mapping[str, Any]) -> None:
    pass


def best_config(config: FifaConfig, params: Params) -> FifaConfig:
    """The configuration of the winner, to be run as it is: its training is called tuned."""
    found = with_params(config, params)
    return found.model_copy(update={"train": found.train.model_copy(update={"name": "tuned"})})
