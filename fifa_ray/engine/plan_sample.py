"""The sample that a plan is measured on: the real stages on some rows, in a sub-run of the run.

    plan/<key>/sample/     every stage that has to be measured, of few rows
    plan/<key>/metadata/   ingest alone, of many rows: how often prompts repeat, and more prompts

The key covers the cluster and the sizes, so that the same command on the same machines measures
nothing twice, and on others everything. Rows are spread over the whole source.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fifa_ray import schema
from fifa_ray.config import ActorsConfig, ConfigError, FifaConfig, JudgeConfig, NodeGroup
from fifa_ray.engine.cluster import actor_need
from fifa_ray.engine.embed import run_embed
from fifa_ray.engine.evaluate import run_evaluate
from fifa_ray.engine.ingest import ingest_fingerprint, run_ingest
from fifa_ray.engine.judge import run_judge
from fifa_ray.engine.neighbors import run_neighbors
from fifa_ray.engine.node_seconds import group_of
from fifa_ray.engine.nodes import alive_nodes, room
from fifa_ray.engine.rewards import run_rewards
from fifa_ray.engine.select import run_select
from fifa_ray.engine.train import run_train
from fifa_ray.engine.train_metrics import read_metrics
from fifa_ray.planning.estimates import Estimate, distinct_prompts
from fifa_ray.run_dir import Manifest, RunDir, fingerprint, part_name
from fifa_ray.sources import SampledSource, count_rows, open_source

logger = logging.getLogger(__name__)

# Rows that lie together in the source: as many images as most models take at once.
PIECE = 64
METADATA_PIECES = 16
# A worker needs a block to warm up and some to be measured.
BLOCKS_PER_WORKER = 3
TRAIN_STEPS = 6
EVALUATION_PROMPTS = 32
SELECTED = "selected"
SMALL_SELECTION = 8


@dataclass(frozen=True, kw_only=True)
class DatasetSize:
    """Pairs and distinct prompts of the whole dataset, and how each is known.

    prompt_bytes: of the text of a prompt; None where none was read.
    """

    rows: int
    pairs: Estimate
    prompts: Estimate
    pairs_from: str
    prompts_from: str
    prompt_bytes: float | None = None

    def with_given(self, num_pairs: int | None, num_prompts: int | None) -> "DatasetSize":
        """The same with what is known from elsewhere; prompts follow the pairs' number."""
        size = self
        if num_pairs is not None:
            share = num_pairs / self.pairs.value
            size = replace(
                size,
                rows=round(self.rows * share),
                pairs=Estimate.sure(num_pairs),
                pairs_from="given",
                prompts=self.prompts * share,
                prompts_from=f"{self.prompts_from}; then scaled with the pairs",
            )
        if num_prompts is not None:
            size = replace(size, prompts=Estimate.sure(num_prompts), prompts_from="given")
        return size


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Manifests of the stages that ran on the sample, and what they do not say themselves.

    metadata: of the ingest of many rows. select_seconds: of two sizes of selection, (pairs kept,
    seconds). train_lines: metrics of a few optimizer steps. seconds: of all of it.
    """

    run: RunDir
    metadata: Manifest
    manifests: dict[str, Manifest]
    select_seconds: tuple[tuple[int, float], ...]
    train_lines: list[dict[str, Any]]


def cluster_groups() -> list[NodeGroup]:
    """The nodes that are there now as groups without prices, for a plan without a price list."""
    found: Counter[tuple[str, float, float, float]] = Counter()
    for node in alive_nodes():
        has = node["Resources"]
        if has.get("CPU", 0):
            shape = (has["CPU"], has.get("GPU", 0.0), round(has.get("memory", 0) / 1e9, 1))
            found[group_of(node), *shape] += 1
    if not found:
        raise ConfigError("the cluster has no node with a core; start one, or set cost.prices_file")
    names = Counter(name for name, *_ in found)
    return [
        NodeGroup(
            name=name if names[name] == 1 else f"{name}-{index}",
            max_nodes=count,
            cpus=cpus,
            gpus=gpus,
            memory_gb=memory or None,
        )
        for index, ((name, cpus, gpus, memory), count) in enumerate(sorted(found.items()))
    ]


def sample_folder(run: RunDir, config: FifaConfig) -> str:
    """URI of the folder of this cluster's measurements."""
    nodes = sorted([n["Resources"].get(kind, 0) for kind in ("CPU", "GPU")] for n in alive_nodes())
    cost = config.cost
    key = fingerprint(nodes, cost.sample_pairs, cost.sample_prompts, cost.sample_rows)
    return f"{run.uri.rstrip('/')}/plan/{key[:8]}"


def measure_size(run: RunDir, config: FifaConfig, folder: str) -> tuple[DatasetSize, Manifest]:
    """Count the dataset's rows, and estimate its pairs and prompts from many rows' metadata.

    A complete ingest of the same source, or a sample of all rows, leaves nothing to estimate.
    """
    source = open_source(config.ingest, config.images)
    rows, exact = count_rows(source)
    if not rows:
        raise ValueError(f"{config.ingest.source} holds no rows")
    # The small one first: like that of a run it starts Ray's workers, the second one does not.
    _ingest_sample(RunDir(f"{folder}/sample"), config, rows, config.cost.sample_pairs, PIECE)
    metadata = RunDir(f"{folder}/metadata")
    wanted = min(rows, config.cost.sample_rows)
    manifest = _ingest_sample(metadata, config, rows, wanted, -(-wanted // METADATA_PIECES))
    texts = metadata.read_table("prompts", columns=["prompt"]).column("prompt")
    prompt_bytes = texts.nbytes / max(1, len(texts))
    whole = run.manifest("pairs")
    if whole is not None and whole.fingerprint == ingest_fingerprint(config, source):
        prompts = whole.details["distinct_prompts"]
        known = "counted: ingest is complete"
        size = DatasetSize(
            rows=rows,
            pairs=Estimate.sure(whole.rows_out),
            prompts=Estimate.sure(prompts),
            pairs_from=known,
            prompts_from=known,
            prompt_bytes=prompt_bytes,
        )
        return size, manifest
    pieces = [
        metadata.read_table("pairs", name, columns=[schema.PROMPT_ID]).column(0).to_numpy()
        for name in metadata.list("pairs")
    ]
    pairs_per_row = manifest.rows_out / wanted
    counted = "counted" if exact else "estimated from some shards"
    how = f"{rows:,} rows {counted}, usable pairs a row from the metadata of {wanted:,}"
    size = DatasetSize(
        rows=rows,
        pairs=Estimate.sure(pairs_per_row * rows),
        prompts=distinct_prompts(pieces, round(pairs_per_row * rows)),
        pairs_from=how,
        prompts_from=f"estimated from {wanted:,} of {rows:,} rows, taking prompts to repeat in "
        "the rest as they do across the sample's pieces (first-order jackknife); low: those seen, "
        "high: no other repeats"
        if wanted < rows
        else "counted in the metadata of all rows",
        prompt_bytes=prompt_bytes,
    )
    return size, manifest


def _ingest_sample(
    run: RunDir, config: FifaConfig, rows: int, num_rows: int, piece: int
) -> Manifest:
    """Ingest up to `num_rows` of `rows` rows in pieces spread over the source."""
    num_rows = min(rows, num_rows)
    pieces = max(1, -(-num_rows // piece))
    # Chunks as large as the pieces allow: a piece is the head of one, and of its row group.
    ingest = config.ingest.model_copy(update={"rows_per_part": max(piece, rows // pieces)})
    config = config.model_copy(update={"ingest": ingest, "max_quarantine_fraction": 1.0})
    source = SampledSource(open_source(ingest, config.images), num_rows, piece)
    return run_ingest(run, config, source)


def run_sample(
    config: FifaConfig, folder: str, rows: int, metadata: Manifest, stages: Collection[str]
) -> Sample:
    """Run the stages named on a sample: rewards/<name>, quality, embeddings, and, where they can
    be had, neighbors, selected, training, evaluation."""
    run = RunDir(f"{folder}/sample")
    num_rows = min(rows, config.cost.sample_pairs)
    _add_prompts(run, RunDir(f"{folder}/metadata"), config.cost.sample_prompts)
    config = sample_config(config, run, num_rows)
    rewards = tuple(r for r in config.rewards if f"rewards/{r.name}" in stages)
    if rewards:
        run_rewards(run, config.model_copy(update={"rewards": rewards}))
    if "quality" in stages:
        run_judge(run, config)
    if "embeddings" in stages:
        run_embed(run, config)
        if run.num_rows("prompts") > config.neighbors.num_neighbors:
            run_neighbors(run, config)
    select_seconds: list[tuple[int, float]] = []
    if SELECTED in stages:
        for size in (SMALL_SELECTION, max(2 * SMALL_SELECTION, num_rows // 2)):
            select = config.select.model_copy(update={"selection_size": size})
            config = config.model_copy(update={"select": select})
            manifest = run_select(run, config)
            select_seconds.append((manifest.rows_out, manifest.seconds))
    lines: list[dict[str, Any]] = []
    if "training" in stages:
        run_train(run, config)
        lines = [
            line
            for line in read_metrics(run, f"training/{config.train.name}")
            if line["kind"] == "train"
        ]
    if "evaluation" in stages:
        run_evaluate(run, config)
    return Sample(
        run=run,
        metadata=metadata,
        manifests=run.manifests(),
        select_seconds=tuple(select_seconds),
        train_lines=lines,
    )


def _add_prompts(run: RunDir, metadata: RunDir, count: int) -> None:
    """Fill up the sample's prompts to `count` with others of the dataset.

    Rows that stand together share prompts, so the pairs of a few pieces have few. Ids are hashes:
    the first ones of the metadata's are as good as drawn at random.
    """
    manifest = run.manifest("prompts")
    assert manifest is not None
    prompts = run.read_table("prompts").combine_chunks()
    if len(prompts) >= count:
        return
    others = metadata.read_table("prompts").combine_chunks()
    ids = others.column(schema.PROMPT_ID)
    new = others.filter(pc.invert(pc.is_in(ids, prompts.column(schema.PROMPT_ID))))
    added = pa.concat_tables([prompts, new.slice(0, count - len(prompts))])
    run.remove("prompts")
    run.write_table(added.sort_by(schema.PROMPT_ID), "prompts", part_name(0))
    run.publish(replace(manifest, rows_in=len(added), rows_out=len(added)))


def sample_config(config: FifaConfig, run: RunDir, num_rows: int) -> FifaConfig:
    """The configuration with everything that decides speed as it is, and less to do.

    All workers start together and at most so many that each gets a few blocks: a pool that grows
    while it is measured measures its growth. No shared cache answers for the judge, no hard filter
    empties the selection.
    """
    workers = max(1, num_rows // PIECE // BLOCKS_PER_WORKER)

    def fixed(actors: ActorsConfig) -> ActorsConfig:
        need = actor_need(actors, wait_seconds=config.ray.wait_seconds)
        size = max(1, min(workers, actors.max_actors or workers, room(alive_nodes(), need)))
        return actors.model_copy(update={"min_actors": size, "max_actors": size})

    def fixed_in(section: Any, name: str = "actors", **changes: Any) -> Any:
        return section.model_copy(update={name: fixed(getattr(section, name)), **changes})

    train = config.train
    num_workers = max(1, min(train.num_workers, workers))
    return config.model_copy(
        update={
            "run_dir": run.uri,
            "max_quarantine_fraction": 1.0,
            "rewards": tuple(fixed_in(reward) for reward in config.rewards),
            "judge": _sampled_judge(config.judge, fixed),
            "embed": fixed_in(config.embed),
            "select": config.select.model_copy(
                update={"min_quality": None, "exclude_harmful": False, "strategy": "fifa"}
            ),
            "report": config.report.model_copy(update={"enabled": False}),
            "train": fixed_in(
                train,
                "cache_actors",
                data=SELECTED,
                max_pairs=None,
                max_steps=TRAIN_STEPS,
                num_workers=num_workers,
                min_workers=None,
                global_batch_size=min(
                    train.global_batch_size, num_workers * train.per_device_batch_size
                ),
                validation_pairs=0,
                early_stop_patience=None,
                sample_prompts=(),
                log_every=1,
                checkpoint_every=TRAIN_STEPS,
                loggers=(),
            ),
            "evaluate": fixed_in(
                config.evaluate,
                trainings=None,
                prompts="general",
                num_prompts=EVALUATION_PROMPTS,
                images_per_prompt=1,
                extra_rewards=tuple(fixed_in(r) for r in config.evaluate.extra_rewards),
            ),
        }
    )


def _sampled_judge(
    judge: JudgeConfig, fixed: Callable[[ActorsConfig], ActorsConfig]
) -> JudgeConfig:
    """An endpoint's clients stay as they are; of vLLM, whose batches overlap, one engine."""
    actors = judge.actors
    if judge.engine == "transformers":
        actors = fixed(actors)
    elif judge.engine == "vllm":
        actors = actors.model_copy(update={"min_actors": 1, "max_actors": 1})
    return judge.model_copy(update={"actors": actors, "cache_dir": None})
