"""A stage's work on a cluster: where it runs, for how long, and what that costs.

A stage starts once, then works through its rows with as many workers as its node group holds, as
the configuration allows, and as there are pieces of work for. Nodes are taken to join when a stage
asks for them and to leave before the next one that does not, as an autoscaler does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fifa_ray.planning.estimates import Estimate, Rate, Source

HOUR = 3600.0
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Group:
    """Nodes of one kind; `stages` None: it runs all, empty: none, but it is paid throughout."""

    name: str
    max_nodes: int
    cpus: float
    gpus: float = 0.0
    memory: float | None = None
    price_per_hour: float | None = None
    spot: bool = False
    stages: tuple[str, ...] | None = None
    overhead_seconds: float = 0.0

    def runs(self, stage: str) -> bool:
        """Whether the stage, or the first word of its name, is listed."""
        return self.stages is None or stage in self.stages or stage.split("/")[0] in self.stages


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one actor, training worker or task asks for; memory in bytes, where it is known."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: float | None = None

    def per_node(self, group: Group) -> int:
        """How many a node of a group holds."""
        room = [group.cpus / self.cpus]
        if self.gpus:
            room.append(group.gpus / self.gpus)
        if self.memory and group.memory:
            room.append(group.memory / self.memory)
        return int(min(room) + 1e-9)


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What a stage has to do: rows of `unit`, at a rate of one worker, after one start-up.

    pieces: the units of work that cannot be shared by two workers. start: seconds of start-up and
    of whatever else does not grow. decoding: core seconds a row beside the workers, on other cores.
    """

    stage: str
    unit: str
    rows: Estimate
    rate: Rate
    start: Estimate
    start_source: Source
    worker: Worker
    pieces: float
    min_workers: int = 1
    max_workers: int | None = None
    decoding: Rate | None = None
    bytes_per_row: float | None = None
    # Groups that may hold the workers; None: any that lists the stage.
    groups: tuple[str, ...] | None = None
    # What the numbers rest on, and why they may be far off.
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def bytes(self) -> Estimate | None:
        """What it writes to the run directory."""
        return None if self.bytes_per_row is None else self.rows * self.bytes_per_row


@dataclass(frozen=True, kw_only=True)
class StagePrediction:
    """What a stage will take. `nodes` and `node_seconds` by group; cost None: a price is missing.

    `seconds` includes the start-up; `gpu_seconds` are those that its workers hold.
    """

    work: StageWork
    workers: int
    nodes: dict[str, int]
    seconds: Estimate
    gpu_seconds: Estimate
    node_seconds: dict[str, Estimate]
    cost: Estimate | None
    warnings: tuple[str, ...] = ()


def predict_stage(
    work: StageWork, groups: Sequence[Group], held: Mapping[str, int] | None = None
) -> StagePrediction | str:
    """Place a stage on its group and reckon, or say why it fits nowhere.

    held: nodes by group that the stage before leaves: they need not join.
    """
    listed = [group for group in groups if group.runs(work.stage)]
    allowed = [g for g in listed if work.groups is None or g.name in work.groups]
    main = next((group for group in allowed if work.worker.per_node(group)), None)
    if main is None:
        return _no_room(work, allowed)
    per_node = work.worker.per_node(main)
    limits = [main.max_nodes * per_node, max(1, math.ceil(work.pieces))]
    workers = max(1, min(limits if work.max_workers is None else [*limits, work.max_workers]))
    if workers < work.min_workers:
        return (
            f"{work.stage} does not fit: it needs {work.min_workers} workers, {main.name} holds "
            f"{workers}"
        )
    nodes = {main.name: math.ceil(workers / per_node)}
    share = rounds(work.pieces, workers) / work.pieces
    busy = work.rows * work.rate.seconds_per_row * share
    warnings = list(work.doubts)
    if work.decoding is not None:
        needed = work.rows * work.decoding.seconds_per_row
        cores = nodes[main.name] * main.cpus - workers * work.worker.cpus
        helpers = [group for group in listed if group is not main and not group.gpus]
        for group in helpers:
            short = needed.value / max(busy.value, 1e-9) - cores
            if short > 0:
                nodes[group.name] = min(group.max_nodes, math.ceil(short / group.cpus))
                cores += nodes[group.name] * group.cpus
        decoding = needed * (1 / max(cores, 1.0))
        if decoding.value > busy.value:
            warnings.append(
                f"decoding is slower than scoring: {decoding.value / HOUR:.2g} h on {cores:g} "
                f"cores against {busy.value / HOUR:.2g} h; give it more cores"
            )
            busy = decoding
    seconds = busy + work.start
    node_seconds = {}
    for group in listed:
        if count := nodes.get(group.name):
            joining = max(0, count - (held or {}).get(group.name, 0))
            overhead = Estimate.sure(group.overhead_seconds * joining)
            node_seconds[group.name] = seconds * count + overhead
    return StagePrediction(
        work=work,
        workers=workers,
        nodes=nodes,
        seconds=seconds,
        gpu_seconds=seconds * (workers * work.worker.gpus),
        node_seconds=node_seconds,
        cost=money(node_seconds, groups),
        warnings=tuple(warnings),
    )


def rounds(pieces: float, workers: int) -> float:
    """How many pieces the busiest worker takes in turn; of a fraction, the last piece is one."""
    whole = math.ceil(pieces) - 1
    full, left = divmod(whole, workers)
    return full + (1.0 if left else pieces - whole)


def _no_room(work: StageWork, listed: Sequence[Group]) -> str:
    wants = f"{work.worker.cpus:g} CPU"
    if work.worker.gpus:
        wants += f" and {work.worker.gpus:g} GPU"
    if work.worker.memory:
        wants += f" and {work.worker.memory / GB:.1f} GB of memory"
    if not listed:
        return f"{work.stage} does not fit: no node group is for it"
    names = ", ".join(
        f"{g.name} ({g.cpus:g} CPU, {g.gpus:g} GPU"
        + (f", {g.memory / GB:g} GB)" if g.memory else ")")
        for g in listed
    )
    return f"{work.stage} does not fit: a worker asks for {wants}, a node of {names} has less"


def money(node_seconds: dict[str, Estimate], groups: Sequence[Group]) -> Estimate | None:
    """Price of node-seconds by group; None where a group that was used has no price."""
    prices = {group.name: group.price_per_hour for group in groups}
    total = Estimate.sure(0.0)
    for name, seconds in node_seconds.items():
        price = prices.get(name)
        if price is None:
            return None
        total = total + seconds * (price / HOUR)
    return total


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the stages, which run one after another. `node_seconds` by group."""

    seconds: Estimate
    gpu_seconds: Estimate
    node_seconds: dict[str, Estimate]
    bytes: Estimate
    cost: Estimate | None


def total(predictions: Sequence[StagePrediction], groups: Sequence[Group]) -> Totals:
    """Sum the stages, and what groups that run none of them cost all the while."""
    seconds = gpu_seconds = written = Estimate.sure(0.0)
    node_seconds: dict[str, Estimate] = {}
    for prediction in predictions:
        seconds = seconds + prediction.seconds
        gpu_seconds = gpu_seconds + prediction.gpu_seconds
        written = written + (prediction.work.bytes or Estimate.sure(0.0))
        for name, of_group in prediction.node_seconds.items():
            node_seconds[name] = node_seconds.get(name, Estimate.sure(0.0)) + of_group
    for group in groups:
        if group.stages == ():
            always = (seconds + Estimate.sure(group.overhead_seconds)) * group.max_nodes
            node_seconds[group.name] = always
    return Totals(
        seconds=seconds,
        gpu_seconds=gpu_seconds,
        node_seconds=node_seconds,
        bytes=written,
        cost=money(node_seconds, groups),
    )
