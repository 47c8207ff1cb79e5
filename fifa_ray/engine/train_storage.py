"""Checkpoints on disk between attempts: which are whole, and Ray Train's note of them.

Ray Train keeps `checkpoint_manager_snapshot.json` beside the checkpoints and begins from the newest
one it names. It writes that file in place, so a driver killed in that moment leaves it broken, and
Ray would refuse to start. Then the newest whole checkpoint is found by looking at them.
"""

import json
import logging

import pyarrow.fs as pafs

from fifa_ray.engine.train_checkpoint import STATE
from fifa_ray.run_dir import RunDir

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"


def mend_snapshot(run: RunDir, stage: str) -> str | None:
    """Path of the checkpoint to begin from where Ray Train's own note cannot be used, else None.

    Checkpoints that the note does not name were cut off while they were written: they are removed.
    """
    folder = f"{stage}/{CHECKPOINTS}"
    present = _folders(run, folder)
    if not run.exists(folder, SNAPSHOT):
        named: set[str] | None = set()
    else:
        named = _named(run.read_text(folder, SNAPSHOT))
    if named is not None and named <= set(present):
        for name in set(present) - named:
            run.remove(folder, name)
        return None
    logger.warning("%s: Ray Train's note of its checkpoints is broken; looking at them", stage)
    run.filesystem.delete_file(run.path(folder, SNAPSHOT))
    for name in sorted(present, reverse=True):
        if is_whole(run, folder, name):
            return run.path(folder, name)
    return None


def is_whole(run: RunDir, folder: str, name: str) -> bool:
    """Whether a checkpoint has all its files, in the sizes that its state names."""
    if not run.exists(folder, name, STATE):
        return False
    try:
        sizes = json.loads(run.read_text(folder, name, STATE))["sizes"]
    except (ValueError, KeyError):
        return False
    infos = run.filesystem.get_file_info([run.path(folder, name, file) for file in sizes])
    return all(info.size == size for info, size in zip(infos, sizes.values(), strict=True))


def _named(snapshot: str) -> set[str] | None:
    """Names of the checkpoints in Ray's note; None where it cannot be read."""
    try:
        found = json.loads(snapshot)
        results = [*found["checkpoint_results"], found["latest_checkpoint_result"]]
        return {result["checkpoint_dir_name"] for result in results if result is not None}
    except (ValueError, KeyError, TypeError):
        return None


def _folders(run: RunDir, folder: str) -> list[str]:
    infos = run.filesystem.get_file_info(pafs.FileSelector(run.path(folder), allow_not_found=True))
    return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)
