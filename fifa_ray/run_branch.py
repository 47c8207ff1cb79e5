"""A run that shares the scored tables of another: its own selection, nothing scored again.

    RUN/tuning/<name>/trials/<id>/   selected/ training/ ...   its own
    RUN/                             pairs/ rewards/ ...       borrowed, never written

A stage reads and writes through a `RunDir` and need not know which of its tables are borrowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from fifa_ray.run_dir import Manifest, RunDir

# What selections and trainings read; `training_data` and `latents` are named by their content.
BORROWED = (
    "pairs",
    "prompts",
    "rewards",
    "quality",
    "embeddings",
    "neighbors",
    "training_data",
    "latents",
)


class BranchDir(RunDir):
    """A run directory that reads the tables of BORROWED, and their manifests, from `base`."""

    def __init__(self, uri: str, base: RunDir) -> None:
        super().__init__(uri)
        self.base = base

    def __reduce__(self) -> tuple[type["BranchDir"], tuple[str, RunDir]]:  # type: ignore[override]
        return BranchDir, (self.uri, self.base)

    def path(self, *parts: str) -> str:
        """Path inside the filesystem, of the base for what is borrowed."""
        return self.base.path(*parts) if _is_borrowed(*parts) else super().path(*parts)

    def manifests(self) -> dict[str, Manifest]:
        """Manifests of the base's stages that are borrowed, and of its own."""
        borrowed = {s: m for s, m in self.base.manifests().items() if _is_borrowed(s)}
        return borrowed | super().manifests()

    @contextmanager
    def open_atomic(self, *parts: str) -> Iterator[pa.NativeFile]:
        """See `RunDir`; RuntimeError for what is borrowed."""
        self._refuse(*parts)
        with super().open_atomic(*parts) as stream:
            yield stream

    def remove(self, *parts: str) -> None:
        """See `RunDir`; RuntimeError for what is borrowed."""
        self._refuse(*parts)
        super().remove(*parts)

    def invalidate(self, stage: str) -> None:
        """See `RunDir`; RuntimeError for what is borrowed."""
        self._refuse(stage)
        super().invalidate(stage)

    def _refuse(self, *parts: str) -> None:
        if _is_borrowed(*parts):
            raise RuntimeError(
                f"{'/'.join(parts)} belongs to {self.base.uri}, from which {self.uri} borrows it; "
                "change it there: `fifa filter` with the same configuration"
            )


def _is_borrowed(*parts: str) -> bool:
    """Whether a place is in a borrowed table, or is the manifest of one."""
    steps = _steps(parts)
    first = next(steps, "")
    if first == "manifests":
        first = next(steps, "").partition(".")[0]
    return first in BORROWED


def _steps(parts: tuple[str, ...]) -> Iterator[str]:
    return (step for part in parts for step in part.split("/"))
