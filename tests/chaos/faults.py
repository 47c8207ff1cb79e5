"""What can go wrong, when it strikes, and how the run has to come out of it."""

import contextlib
import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fifa_ray.run_dir import RunDir
from tests.chaos.judge_server import Mode
from tests.chaos.scene import Fault, Moments, Scene
from tests.chaos.slow_store import SlowProxy

Strike = Callable[[Scene], bool | None]
SCORER, JUDGE, ENCODER, TRAINER = "LoadAndScore", "JudgePrompts", "EncodeItems", "RayTrainWorker"
REWARDS, QUALITY = "partial/rewards.tiny-*/*.parquet", "partial/quality-*/*.parquet"
CHECKPOINT = "training/policy/checkpoints/step-000000{:02d}"
TMPFS_BYTES = 64_000_000


def at(*patterns: str) -> Moments:
    """As soon as a file of the first pattern is there, then of the second, and so on."""
    return lambda scene: [(pattern, 1) for pattern in patterns]


def anywhere(count: int) -> Moments:
    """At random places of the work, in their order."""

    def moments(scene: Scene) -> list[tuple[str, int]]:
        stages = scene.workload.moments
        places = sorted(scene.random.sample(range(len(stages)), min(count, len(stages))))
        return [(stages[place], scene.random.randint(1, 3)) for place in places]

    return moments


def kill_worker(*names: str) -> Strike:
    """SIGKILL to a random process that does such work, or any."""

    def strike(scene: Scene) -> bool:
        found = scene.nodes.workers(*names)
        if found:
            scene.random.choice(found).kill()
        return bool(found)

    return strike


def kill_node(*names: str, replaced: bool) -> Strike:
    """A node that does such work is gone; `replaced`: another one comes."""

    def strike(scene: Scene) -> bool:
        node = scene.nodes.busiest(*names)
        if node is None:
            return False
        scene.nodes.kill(node)
        if replaced:
            scene.nodes.add()
        return True

    return strike


def judge_goes(mode: Mode, seconds: float | None = None) -> Strike:
    """The endpoint misbehaves, for good or for so long."""

    def strike(scene: Scene) -> None:
        if seconds is None:
            scene.judge.set(mode)
        else:
            scene.judge.set_for(mode, seconds)

    return strike


def judge_is_back(scene: Scene) -> None:
    """The endpoint answers."""
    scene.judge.set("up")


# A full disk


@contextlib.contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    """The run directory is a file system of its own, with little room."""
    scene.run_dir.mkdir()
    options = ["-o", f"size={TMPFS_BYTES}", "tmpfs", str(scene.run_dir)]
    subprocess.run(["mount", "-t", "tmpfs", *options], check=True)
    try:
        yield
    finally:
        kept = scene.folder / "kept"
        shutil.copytree(scene.run_dir, kept, ignore=shutil.ignore_patterns("filler"))
        subprocess.run(["umount", "--lazy", str(scene.run_dir)], check=True)
        scene.run_dir.rmdir()
        kept.rename(scene.run_dir)


def fill_disk(scene: Scene) -> None:
    """To the last byte."""
    handle = os.open(scene.run_dir / "filler", os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(handle, b"\0" * size)
    os.close(handle)


def free_disk(scene: Scene) -> None:
    """As before."""
    (scene.run_dir / "filler").unlink(missing_ok=True)


# A damaged shard


@contextlib.contextmanager
def own_data(scene: Scene) -> Iterator[None]:
    """A copy of the dataset that may be damaged; names, sizes and times are the original's."""
    copy = shutil.copytree(scene.workload.data, scene.folder / "data")
    scene.config["ingest"]["source"] = str(copy)
    yield


def shard(scene: Scene) -> Path:
    """The one that is damaged: the last one, which is read late."""
    return sorted(Path(scene.config["ingest"]["source"]).glob("*.parquet"))[-1]


def truncate_shard(scene: Scene) -> None:
    """Its second half is gone, and with it the footer."""
    path = shard(scene)
    data = path.read_bytes()
    status = path.stat()
    path.write_bytes(data[: len(data) // 2])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_bits(scene: Scene) -> None:
    """Noise over the first half of its pages; the footer is whole."""
    path = shard(scene)
    data = bytearray(path.read_bytes())
    status = path.stat()
    noise = random.Random(0).randbytes(len(data) // 2)
    data[4 : 4 + len(noise)] = noise
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def restore_shard(scene: Scene) -> None:
    """The file as it was, with its old time."""
    shutil.copy2(scene.workload.data / shard(scene).name, shard(scene))


def all_but_the_shard(scene: Scene, run: RunDir, reference: RunDir) -> list[str]:
    """Rewards of the other files are the same; of the damaged one, rows are put aside by name."""
    bad = run.read_table("quarantine", "rewards", "tiny").to_pandas()
    new = bad[bad.reason.isin(["unreadable_source", "corrupt_image"])]
    name = shard(scene).name
    if name not in set(new.source_file):
        return [f"no row of {name} was put aside"]
    pairs = run.read_table("pairs").to_pandas()
    others = set(pairs.pair_id[pairs.source_file.astype(str) != name])
    found, expected = (r.read_table("rewards", "tiny").to_pandas() for r in (run, reference))
    same = found[found.pair_id.isin(others)].reset_index(drop=True)
    wanted = expected[expected.pair_id.isin(others)].reset_index(drop=True)
    lost = len(expected) - len(found)
    scene.notes.append(f"{lost} of {len(expected)} pairs put aside, all of that file")
    if not np.array_equal(same.to_numpy(), wanted.to_numpy()):
        return ["rewards of other files differ"]
    if not set(expected.pair_id) - set(found.pair_id) <= set(pairs.pair_id) - others:
        return ["pairs of other files are missing"]
    return []


# A slow store


def slow_store(delay: float, cuts: float) -> Callable[[Scene], Any]:
    """Run directory and dataset on S3, behind a proxy that is late and cuts connections."""

    @contextlib.contextmanager
    def prepare(scene: Scene) -> Iterator[None]:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        proxy = SlowProxy(f"{host}:{port}", delay=delay, cuts=cuts, seed=scene.random.randrange(99))
        bucket = "s3://chaos/{}?endpoint_override={}&scheme=http&region=us-east-1"
        direct = RunDir(bucket.format("", f"{host}:{port}") + "&allow_bucket_creation=true")
        direct.filesystem.create_dir("chaos")
        for file in sorted(scene.workload.data.glob("*.parquet")):
            with direct.filesystem.open_output_stream(f"chaos/data/{file.name}") as stream:
                stream.write(file.read_bytes())
        scene.config["ingest"]["source"] = bucket.format("data", proxy.address)
        scene.config["run_dir"] = bucket.format("run", proxy.address)
        scene.result = bucket.format("run", f"{host}:{port}")
        try:
            yield
        finally:
            scene.notes.append(f"{proxy.connections:,} connections, {proxy.cut} cut")
            proxy.close()
            server.stop()

    return prepare


SCORING = ("rewards/tiny", "selected")
JUDGING = ("quality", "selected")
NO_SPACE = r"Error: .*no space left to write .*same command again"

FAULTS = (
    Fault(
        name="kill 3 scorers",
        workload="filter",
        redo=SCORING,
        when=lambda scene: [(REWARDS, 1), (REWARDS, 3), (REWARDS, 5)],
        strike=kill_worker(SCORER),
    ),
    Fault(
        name="kill a scorer while it loads its model",
        workload="filter",
        redo=SCORING,
        when=at("manifests/pairs.json"),
        strike=kill_worker(SCORER),
    ),
    Fault(
        name="kill the judge's actor twice",
        workload="filter",
        redo=JUDGING,
        when=lambda scene: [(QUALITY, 1), (QUALITY, 3)],
        strike=kill_worker(JUDGE),
    ),
    Fault(
        name="kill 4 worker processes at random moments",
        workload="filter",
        when=anywhere(4),
        strike=kill_worker(),
    ),
    Fault(
        name="lose a worker node for good",
        workload="filter",
        redo=SCORING,
        when=at(REWARDS),
        strike=kill_node(SCORER, replaced=False),
    ),
    Fault(
        name="lose 3 nodes at random moments, each replaced",
        workload="filter",
        when=anywhere(3),
        strike=kill_node(replaced=True),
    ),
    *(
        Fault(
            name=f"judge: {what} for 8 s",
            workload="filter",
            redo=JUDGING,
            when=at(QUALITY),
            strike=judge_goes(mode, 8.0),
        )
        for mode, what in (
            ("refuse", "connections refused"),
            ("hang", "answers hang"),
            ("500", "status 500"),
            ("garbage", "HTML instead of answers"),
            ("429", "status 429"),
        )
    ),
    Fault(
        name="judge: flaky, a third of the first tries fail",
        workload="filter",
        redo=JUDGING,
        when=None,
        strike=judge_goes("flaky"),
    ),
    Fault(
        name="judge: down for good, then restarted",
        workload="filter",
        redo=JUDGING,
        when=at(QUALITY),
        strike=judge_goes("refuse"),
        settings={"judge.max_outage_seconds": 5.0},
        expected="resumes",
        mend=judge_is_back,
        says=r"Error: the judge's endpoint .* stopped answering: connection_error",
    ),
    *(
        Fault(
            name=f"disk of the run full while {what}",
            workload="filter",
            when=at(pattern),
            strike=fill_disk,
            expected="resumes",
            mend=free_disk,
            says=NO_SPACE,
            prepare=small_disk,
            redo=redo,
            needs_root=True,
        )
        for what, pattern, redo in (
            ("ingest maps", "partial/ingest/rows/*.parquet", ("pairs", "prompts")),
            ("images are scored", REWARDS, SCORING),
            ("prompts are judged", QUALITY, JUDGING),
            ("neighbours are joined", "partial/neighbors-*/*.parquet", ("neighbors", "selected")),
            ("the selection is written", "selected/*.parquet", ("selected",)),
        )
    ),
    *(
        Fault(
            name=f"a shard {what} while images are scored, within the allowed share",
            workload="filter",
            when=at(REWARDS),
            strike=strike,
            settings={"max_quarantine_fraction": 0.5},
            prepare=own_data,
            check=all_but_the_shard,
        )
        for what, strike in (("is cut short", truncate_shard), ("gets noise", flip_bits))
    ),
    Fault(
        name="a shard is cut short, beyond the allowed share, then restored",
        workload="filter",
        when=at(REWARDS),
        strike=truncate_shard,
        settings={"max_quarantine_fraction": 0.02},
        expected="resumes",
        mend=restore_shard,
        says=r"Error: stage rewards/tiny quarantined .*unreadable_source",
        prepare=own_data,
    ),
    Fault(
        name="a shard is cut short before ingest reads it, then restored",
        workload="filter",
        when=None,
        strike=truncate_shard,
        expected="resumes",
        mend=restore_shard,
        says=r"Error: .*train-.*parquet is not a readable parquet file",
        prepare=own_data,
    ),
    Fault(
        name="store: every answer 50 ms late",
        workload="filter",
        when=None,
        strike=lambda scene: None,
        prepare=slow_store(0.05, 0.0),
    ),
    Fault(
        name="store: 20 ms late, 3% of connections cut",
        workload="filter",
        when=None,
        strike=lambda scene: None,
        prepare=slow_store(0.02, 0.03),
    ),
    Fault(
        name="kill the driver at 3 random moments",
        workload="filter",
        when=anywhere(3),
        strike=Scene.kill_driver,
        expected="resumes",
    ),
    Fault(
        name="kill the driver as it publishes each stage",
        workload="filter",
        when=at(
            "pairs/*.parquet", "rewards/tiny/*.parquet", "quality/*.parquet", "selected/*.parquet"
        ),
        strike=Scene.kill_driver,
        expected="resumes",
    ),
    Fault(
        name="kill a training worker twice",
        workload="train",
        when=at(CHECKPOINT.format(10), CHECKPOINT.format(40)),
        strike=kill_worker(TRAINER),
    ),
    Fault(
        name="lose a training worker's node, replaced",
        workload="train",
        when=at(CHECKPOINT.format(20)),
        strike=kill_node(TRAINER, replaced=True),
    ),
    Fault(
        name="kill an encoder of latents",
        workload="train",
        when=at("partial/latents*/model.json"),
        strike=kill_worker(ENCODER),
    ),
    Fault(
        name="disk of the run full while training",
        workload="train",
        when=at(CHECKPOINT.format(20)),
        strike=fill_disk,
        settings={"train.max_failures": 1},
        expected="resumes",
        mend=free_disk,
        says=r"Error: training/policy failed: .*[Nn]o space left",
        prepare=small_disk,
        needs_root=True,
    ),
    Fault(
        name="kill the driver of a training at 3 random moments",
        workload="train",
        when=anywhere(3),
        strike=Scene.kill_driver,
        expected="resumes",
    ),
)
