"""Checkpoints on disk between attempts: which are whole, and Ray Train's note of them.

Ray Train keeps `checkpoint_manager_snapshot.json` beside the checkpoints and begins from the newest
one it names. It writes that file in place, so a driver killed in that moment leaves it broken, and
Ray would refuse to start. Then the newest whole checkpoint is found by looking at them.
"""

import json
import logging
from pathlib import Path

import pyarrow.fs as pafs

from fifa_ray.engine.train_checkpoint import STATE
from fifa_ray.engine.train_output import upload_folder
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
    return newest_checkpoint(run, stage)


def newest_checkpoint(run: RunDir, stage: str) -> str | None:
    """Path of the newest whole checkpoint of a training; None where there is none."""
    folder = f"{stage}/{CHECKPOINTS}"
    whole = [name for name in _folders(run, folder) if is_whole(run, folder, name)]
    return run.path(folder, whole[-1]) if whole else None


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after so many optimizer steps; names sort like steps."""
    return f"step-{step:08d}"


def keep_checkpoint(run: RunDir, stage: str, step: int, files: Path) -> None:
    """Copy a checkpoint's files to its place in the run, and drop those of earlier steps."""
    folder = f"{stage}/{CHECKPOINTS}"
    upload_folder(files, run, folder, checkpoint_name(step))
    for name in _folders(run, folder):
        if name != checkpoint_name(step):
            run.remove(folder, name)


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
