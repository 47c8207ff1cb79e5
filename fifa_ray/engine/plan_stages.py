"""What each stage of a configuration has to do: rows, rates and workers, each with its source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fifa_ray.config import ActorsConfig, FifaConfig, NodeGroup
from fifa_ray.engine.embed import ROWS_PER_ITEM
from fifa_ray.engine.evaluate_prompts import IMAGES_PER_PART
from fifa_ray.engine.evaluate_rewards import PARTS_PER_TASK
from fifa_ray.engine.judge import rows_per_item
from fifa_ray.engine.latents import ITEMS_PER_READ
from fifa_ray.engine.neighbors import chosen_method
from fifa_ray.engine.node_seconds import GROUP_LABEL
from fifa_ray.engine.nodes import matches
from fifa_ray.engine.plan_measured import (
    bytes_per_row,
    folder_bytes,
    measured_training,
    measured_work,
    sampled_manifest,
)
from fifa_ray.engine.plan_sample import Sample, cluster_groups
from fifa_ray.engine.plan_scope import scorer_names
from fifa_ray.engine.plan_size import DatasetSize
from fifa_ray.engine.rewards import pairs_per_item
from fifa_ray.planning.estimates import (
    INGEST_SECONDS,
    JOIN_ANCHOR_ROWS,
    JOIN_DIMENSION,
    SELECT_SECONDS,
    Estimate,
    Rate,
    Source,
    assumed_rate,
    given_rate,
    measured_rate,
    self_join_seconds,
)
from fifa_ray.planning.stages import Group, StageWork, Worker
from fifa_ray.run_dir import Manifest

# Rows of the tables that were never written here: bytes, from their schemas.
ASSUMED_BYTES = {"pairs": 80.0, "rewards": 20.0, "quality": 150.0, "neighbors": 16.0}
# A held-out pair is measured forward alone, about a third of an update.
VALIDATION_SHARE = 1 / 3
TOO_SMALL = (
    "so few blocks do not tell start-up from work: raise cost.sample_pairs and cost.sample_prompts"
)
ASSUMED: Source = "assumed"
# Start-up of a stage without models, where none was measured.
CPU_STAGE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Builds the work of every stage. sample None: nothing was measured."""

    config: FifaConfig
    size: DatasetSize
    groups: Sequence[Group]
    sample: Sample | None

    def work(self, *, train: bool) -> Iterator[StageWork]:
        """In the order in which the stages run; training and evaluation where `train`."""
        config = self.config
        yield self._ingest()
        for reward in config.rewards:
            name = f"rewards/{reward.name}"
            yield self._model_stage(
                name,
                "pairs",
                self.size.pairs,
                reward.actors,
                pieces_of=pairs_per_item(round(self.size.pairs.value)),
            )
        if config.judge.enabled:
            yield self._judge()
        yield self._model_stage(
            "embeddings", "prompts", self.size.prompts, config.embed.actors, pieces_of=ROWS_PER_ITEM
        )
        yield self._neighbors()
        yield self._select()
        if train:
            yield from self._training()
            yield from self._evaluation()

    # Stages of the filter

    def _ingest(self) -> StageWork:
        rows, given = self.size.rows, self._given("pairs")
        rate = given or assumed_rate(INGEST_SECONDS)
        if self.sample is not None and given is None:
            many = self.sample.metadata
            rate = measured_rate([many.seconds * self._cores()], [many.rows_in])
        per_prompt = self.size.prompts.value / self.size.pairs.value
        written = self._bytes("pairs") or 0.0
        written += per_prompt * ((self._bytes("prompts") or self.size.prompt_bytes or 100.0) + 16)
        work = self._cpu_stage(
            "pairs", "rows", Estimate.sure(rows), rate, pieces_of=self.config.ingest.rows_per_part
        )
        return replace(work, bytes_per_row=written * self.size.pairs.value / rows)

    def _judge(self) -> StageWork:
        judge = self.config.judge
        actors = judge.actors
        if judge.engine == "openai":
            size = actors.max_actors or actors.min_actors
            actors = actors.model_copy(update={"num_gpus": 0.0, "max_actors": size})
        elif judge.engine == "vllm":
            size = actors.max_actors or actors.min_actors
            actors = actors.model_copy(update={"max_actors": size})
        prompts = self.size.prompts
        pieces = rows_per_item(round(prompts.value), judge)
        return self._model_stage("quality", "prompts", prompts, actors, pieces_of=pieces)

    def _neighbors(self) -> StageWork:
        prompts, settings = self.size.prompts, self.config.neighbors
        method, _ = chosen_method(settings, round(prompts.value))
        measured = self._bytes("embeddings")
        dimension = round(measured / 4) if measured else JOIN_DIMENSION
        anchor = self_join_seconds(JOIN_ANCHOR_ROWS, dimension, exact=method == "exact")
        given = self.config.cost.rates.get("neighbors")
        # How much faster or slower than the machine that the growth was measured on.
        scale = JOIN_ANCHOR_ROWS / given / anchor if given else 1.0

        def seconds(count: float) -> float:
            return scale * self_join_seconds(count, dimension, exact=method == "exact")

        per_row = seconds(prompts.value) / prompts.value
        rate = given_rate(1 / per_row) if given else assumed_rate(per_row)
        work = self._cpu_stage("neighbors", "prompts", prompts, rate, pieces_of=8192)
        growth = "prompts squared" if method == "exact" else "prompts to the power 1.35"
        return replace(work, notes=(f"{method} search: work grows with {growth}",))

    def _select(self) -> StageWork:
        pairs, kept = self.size.pairs, self.config.select.selection_size
        rate = self._given("selected") or assumed_rate(SELECT_SECONDS)
        work = self._cpu_stage(
            "selected", "pairs", pairs, rate, pieces_of=self.config.ingest.rows_per_part
        )
        notes: tuple[str, ...] = ()
        if self.sample is not None and self.size.groups and self._manifest("selected"):
            # The kept pairs' images lie scattered: it is groups of the source that are read.
            groups = max(1.0, self.size.groups)
            touched = groups * (1 - (1 - 1 / groups) ** min(kept, pairs.value))
            start = work.start * max(1.0, touched / self.sample.groups)
            work = replace(work, start=start)
            notes = (f"most of it reads {touched:,.0f} groups of the source for the kept images",)
        per_pair = self._bytes("selected")
        if per_pair is None:
            notes += ("bytes of the kept images are not known without a sample",)
            return replace(work, notes=notes, bytes_per_row=None)
        return replace(work, notes=notes, bytes_per_row=per_pair * kept / pairs.value)

    # Training and evaluation

    def _training(self) -> Iterator[StageWork]:
        train = self.config.train
        pairs = self.config.select.selection_size
        if train.data == "pairs":
            pairs = round(self.size.pairs.value)
        pairs = min(pairs, train.max_pairs or pairs, round(self.size.pairs.value))
        if train.cache_latents:
            yield self._latents(pairs)
        held_out = train.validation_pairs * train.validation_draws
        validations = train.max_steps // train.validation_every
        updates = train.max_steps * train.global_batch_size
        updates += round(held_out * validations * VALIDATION_SHARE)
        rate, start, source = self._given("training"), *self._start()
        if rate is None:
            assert self.sample is not None
            rate, seconds = measured_training(self.sample)
            start, source = Estimate.unsure(seconds), "measured"
        yield StageWork(
            stage="training",
            unit="pair updates",
            rows=Estimate.sure(updates),
            rate=rate,
            start=start,
            start_source=source,
            worker=Worker(
                cpus=train.num_cpus_per_worker,
                gpus=self._gpus(
                    "training", None if train.use_gpu is None else float(train.use_gpu)
                ),
            ),
            pieces=train.num_workers,
            min_workers=train.min_workers or train.num_workers,
            max_workers=train.num_workers,
            bytes_per_row=self._training_bytes(updates),
            notes=("early stopping is not foreseen",) if train.early_stop_patience else (),
        )

    def _training_bytes(self, updates: int) -> float | None:
        """Of the model and its checkpoints, as the sample's training left them."""
        if self.sample is None or self._manifest("training") is None:
            return None
        return folder_bytes(self.sample.run, "training", self.config.train.name) / updates

    def _latents(self, pairs: int) -> StageWork:
        per_pair, found = 3.0, self._manifest("training_data")
        if found is not None:
            counts = found.details
            per_pair = (counts["images"] + counts["prompts"]) / max(1, counts["pairs"])
        items = Estimate.sure(per_pair * pairs)
        actors = self.config.train.cache_actors
        return self._model_stage(
            "latents", "images and prompts", items, actors, pieces_of=ITEMS_PER_READ
        )

    def _evaluation(self) -> Iterator[StageWork]:
        settings = self.config.evaluate
        models = 1 + len(settings.trainings or (self.config.train.name,))
        prompts = settings.num_prompts or round(self.size.prompts.value)
        images = Estimate.sure(models * prompts * settings.images_per_prompt)
        yield self._model_stage(
            "evaluation/images", "images", images, settings.actors, pieces_of=IMAGES_PER_PART
        )
        by_name = {r.name: r for r in (*self.config.rewards, *settings.extra_rewards)}
        for name in scorer_names(self.config):
            yield self._model_stage(
                f"evaluation/rewards/{name}",
                "images",
                images,
                by_name[name].actors,
                pieces_of=IMAGES_PER_PART * PARTS_PER_TASK,
            )

    # What stages have in common

    def _cpu_stage(
        self, name: str, unit: str, rows: Estimate, rate: Rate, *, pieces_of: int
    ) -> StageWork:
        """A stage of one-core tasks; its start-up is what it took for the sample's few rows."""
        start, source = Estimate.unsure(CPU_STAGE_SECONDS), ASSUMED
        measured = self._manifest(name)
        if measured is not None:
            start, source = Estimate.unsure(measured.seconds), "measured"
        return StageWork(
            stage=name,
            unit=unit,
            rows=rows,
            rate=rate,
            start=start,
            start_source=source,
            worker=Worker(),
            pieces=rows.value / pieces_of,
            bytes_per_row=self._bytes(name),
        )

    def _model_stage(
        self, name: str, unit: str, rows: Estimate, actors: ActorsConfig, *, pieces_of: int
    ) -> StageWork:
        """A stage whose actors hold a model: its rate is given, or measured on the sample."""
        gpus = self._gpus(name, actors.num_gpus)
        rate, start, source = self._given(name), *self._start()
        decoding = memory = None
        doubts: tuple[str, ...] = ()
        if rate is None:
            manifest = self._manifest(name)
            assert manifest is not None, name
            rate, seconds, times, decoding = measured_work(manifest)
            start, source = Estimate.unsure(seconds), "measured"
            memory = times["peak_memory_bytes"]
            if rate.blocks < 2 or not times["tasks_warming_up"]:
                doubts = (TOO_SMALL,)
            if gpus and not manifest.details.get("gpu_seconds"):
                doubts += (
                    "measured without a GPU but planned on one: give its rate in cost.rates",
                )
        return StageWork(
            stage=name,
            unit=unit,
            rows=rows,
            rate=rate,
            start=start,
            start_source=source,
            worker=Worker(cpus=actors.num_cpus, gpus=gpus, memory=memory),
            pieces=rows.value / pieces_of,
            max_workers=actors.max_actors,
            decoding=decoding,
            bytes_per_row=self._bytes(name),
            groups=self._groups_of(actors.label_selector),
            doubts=doubts,
        )

    def _given(self, stage: str) -> Rate | None:
        rate = self.config.cost.rates.get(stage)
        return None if rate is None else given_rate(rate)

    def _start(self) -> tuple[Estimate, Source]:
        """Start-up of a stage whose rate is given."""
        cost = self.config.cost
        if "start_seconds" in cost.model_fields_set:
            return Estimate.sure(cost.start_seconds), "given"
        return Estimate.unsure(cost.start_seconds), "assumed"

    def _gpus(self, stage: str, configured: float | None) -> float:
        if configured is not None:
            return configured
        first = next((group for group in self.groups if group.runs(stage)), None)
        return 1.0 if first is not None and first.gpus else 0.0

    def _groups_of(self, selector: Mapping[str, str] | None) -> tuple[str, ...] | None:
        if not selector:
            return None
        names = [group.name for group in self.groups]
        return tuple(name for name in names if matches({GROUP_LABEL: name}, selector))

    def _cores(self) -> float:
        """Of the cluster that the sample ran on, which ran its tasks on all of them."""
        return sum(group.cpus * group.max_nodes for group in cluster_groups())

    def _manifest(self, stage: str) -> Manifest | None:
        return sampled_manifest(self.sample, stage)

    def _bytes(self, stage: str) -> float | None:
        """Of a row of the stage's table: as the sample wrote it, else from its schema."""
        manifest = self._manifest(stage)
        if self.sample is not None and manifest is not None:
            return bytes_per_row(self.sample.run, [manifest.stage])
        if stage == "embeddings":
            return 8.0 + 4.0 * JOIN_DIMENSION
        return ASSUMED_BYTES.get(stage.split("/")[0])


def to_groups(groups: Sequence[NodeGroup]) -> tuple[Group, ...]:
    """Node groups of the configuration as plain values."""
    return tuple(
        Group(
            name=group.name,
            max_nodes=group.max_nodes,
            cpus=group.cpus,
            gpus=group.gpus,
            memory=None if group.memory_gb is None else group.memory_gb * 1e9,
            price_per_hour=group.price_per_hour,
            spot=group.spot,
            stages=group.stages,
            overhead_seconds=group.overhead_seconds,
        )
        for group in groups
    )
