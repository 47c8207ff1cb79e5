"""A file of the dataset that is damaged while the run reads it."""

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fifa_ray.run_dir import RunDir
from tests.chaos.scene import Scene


@contextlib.contextmanager
def mended_afterwards(scene: Scene) -> Iterator[None]:
    """The dataset may be damaged; afterwards it is whole, with the times that it had."""
    backup = scene.folder / "backup"
    backup.mkdir()
    shutil.copy2(shard(scene), backup)
    try:
        yield
    finally:
        restore_shard(scene)


def shard(scene: Scene) -> Path:
    """The one that is damaged: the last one, which is read late."""
    return sorted(scene.workload.data.glob("*.parquet"))[-1]


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
    shutil.copy2(scene.folder / "backup" / shard(scene).name, shard(scene))


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
