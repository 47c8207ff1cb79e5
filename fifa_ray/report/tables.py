"""Bounded reads of a run's tables: counts, samples, extremes; never a whole big table at once.

Prompt ids are hashes, so the prompts with the smallest ids are a uniform sample of them: the same
one in every report, and it lies in the first parts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import yaml

from fifa_ray.config import ReportConfig
from fifa_ray.report.section import Absent
from fifa_ray.run_dir import Manifest, RunDir
from fifa_ray.schema import PROMPT_ID, SELECTED_TERMS

CONFIG_FILE = "config.yaml"
HIDDEN_PROMPT = "(flagged as harmful, text hidden)"
TOOLTIP_CHARS = 140
# Column of the tables -> what it is called on the page.
TERMS = {
    "reward_margin": "reward margin",
    "prompt_quality": "prompt quality (0 to 10)",
    "log_kth_neighbor_distance": "log distance to the k-th nearest prompt",
    "importance_score": "importance score",
}


class RunTables:
    """One run, read for showing. Tables and manifests may all be missing."""

    def __init__(self, run: RunDir, settings: ReportConfig | None = None) -> None:
        self.run = run
        self.manifests: dict[str, Manifest] = run.manifests()
        self._settings = settings

    @cached_property
    def config_text(self) -> str | None:
        """The configuration that was saved with the run, as YAML."""
        if not self.run.exists(CONFIG_FILE):
            return None
        return self.run.read_text(CONFIG_FILE)

    @cached_property
    def settings(self) -> ReportConfig:
        """Settings of the report: those given, else the run's, else the defaults."""
        if self._settings is not None:
            return self._settings
        config = yaml.safe_load(self.config_text) if self.config_text else None
        return ReportConfig.model_validate((config or {}).get("report") or {})

    def details(self, stage: str) -> dict[str, Any]:
        """`details` of a stage's manifest; empty where the stage is not complete."""
        manifest = self.manifests.get(stage)
        return manifest.details if manifest else {}

    def has(self, *parts: str) -> bool:
        """Whether a table has at least one part."""
        return bool(self.run.list(*parts))

    def require(self, *parts: str, writer: str) -> None:
        """Raise Absent where a table is not there, naming the stage that writes it."""
        if not self.has(*parts):
            raise Absent(f"{'/'.join(parts)}/ is not in this run; the stage {writer} writes it.")

    def dataset(self, *parts: str) -> ds.Dataset:
        """A table, sub-folders included, to scan; hidden and unfinished files are left out."""
        return ds.dataset(self.run.path(*parts), filesystem=self.run.filesystem, format="parquet")

    def batches(self, *parts: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Stream columns of a table in the order of its parts; nothing where it is absent."""
        dataset = self.dataset(*parts) if self.run.exists(*parts) else None
        if dataset is not None and dataset.files:
            yield from dataset.to_batches(columns=list(columns))

    def rows_of(self, *parts: str, key: str, ids: Iterable[int]) -> pa.Table:
        """The rows of a table whose `key` is among `ids`, sorted by key."""
        wanted = pa.array(sorted(set(ids)), pa.int64())
        rows = self.dataset(*parts).to_table(filter=pc.field(key).isin(wanted))
        return rows.sort_by(key)

    def prompt_texts(self, ids: Iterable[int], *, reveal: bool = False) -> dict[int, str]:
        """Text of each prompt that is in prompts/; flagged ones hidden unless `reveal`."""
        ids = {int(i) for i in ids}
        if not ids or not self.has("prompts"):
            return {}
        rows = self.rows_of("prompts", key=PROMPT_ID, ids=ids)
        texts = dict(
            zip(rows.column(PROMPT_ID).to_pylist(), rows.column("prompt").to_pylist(), strict=True)
        )
        if not reveal:
            texts.update({i: HIDDEN_PROMPT for i in texts.keys() & self.harmful_ids})
        return texts

    @cached_property
    def harmful_ids(self) -> set[int]:
        """Ids of the prompts that the judge flagged."""
        found: set[int] = set()
        for batch in self.batches("quality", columns=[PROMPT_ID, "harmful"]):
            found.update(batch.filter(pc.fill_null(batch["harmful"], False))[PROMPT_ID].to_pylist())
        return found

    @cached_property
    def selected(self) -> pa.Table:
        """Every term of the kept pairs, without their images, best first. Raises Absent."""
        self.require("selected", writer="select")
        dataset = self.dataset("selected")
        names = [f.name for f in SELECTED_TERMS if f.name in dataset.schema.names]
        return dataset.to_table(columns=names).sort_by("rank")

    @cached_property
    def selected_prompt_ids(self) -> np.ndarray:
        """Sorted distinct prompt ids of the kept pairs, int64. Raises Absent."""
        return np.unique(self.selected.column(PROMPT_ID).to_numpy())

    @cached_property
    def sample(self) -> pa.Table:
        """The seeded uniform sample of all scored pairs. Raises Absent."""
        self.require("scored_sample", writer="select")
        return self.run.read_table("scored_sample")

    @cached_property
    def baselines(self) -> dict[str, pa.Table]:
        """Terms of each baseline's pairs by strategy; empty where none was kept."""
        if not self.run.exists("baselines"):
            return {}
        files = self.dataset("baselines").files
        strategies = sorted({path.rsplit("/", 2)[-2] for path in files})
        return {name: self.run.read_table("baselines", name) for name in strategies}

    @cached_property
    def proof(self) -> dict[str, dict[str, Any]]:
        """`proof.json`: label -> {value, low, high, note}; empty where there is none."""
        if not self.run.exists("proof.json"):
            return {}
        return dict(json.loads(self.run.read_text("proof.json")))

    @property
    def strategy(self) -> str:
        """How the kept pairs were chosen; `fifa` unless the manifest says otherwise."""
        manifest = self.manifests.get("selected")
        return str((manifest.config if manifest else {}).get("strategy", "fifa"))

    def reward_names(self) -> list[str]:
        """Reward models with a table or a manifest, sorted."""
        stages = {s.split("/", 1)[1] for s in self.manifests if s.startswith("rewards/")}
        if self.run.exists("rewards"):
            stages |= {path.rsplit("/", 2)[-2] for path in self.dataset("rewards").files}
        return sorted(stages)

    def extremes(
        self, *parts: str, column: str, count: int, exclude: set[int] | frozenset[int] = frozenset()
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The `count` lowest and highest (prompt_id, value) of a column; ties by prompt_id.

        Lowest come lowest first and highest highest first; nulls and excluded ids take no part.
        """
        low = high = (np.empty(0, np.int64), np.empty(0))
        hidden = np.array(sorted(exclude), np.int64)
        for batch in self.batches(*parts, columns=[PROMPT_ID, column]):
            batch = batch.filter(pc.is_valid(batch[column]))
            ids = batch[PROMPT_ID].to_numpy()
            values = batch[column].to_numpy().astype(np.float64)
            seen = ~np.isin(ids, hidden)
            ids, values = ids[seen], values[seen]
            low = _first(np.append(low[0], ids), np.append(low[1], values), count)
            high_ids, negated = _first(np.append(high[0], ids), np.append(-high[1], -values), count)
            high = (high_ids, -negated)
        return (
            list(zip(low[0].tolist(), low[1].tolist(), strict=True)),
            list(zip(high[0].tolist(), high[1].tolist(), strict=True)),
        )


def finite_values(table: pa.Table, column: str) -> np.ndarray:
    """A column's values that are neither null nor infinite, float64; empty where it is absent."""
    if column not in table.column_names:
        return np.empty(0)
    values = table.column(column).drop_null().cast(pa.float64()).to_numpy()
    return values[np.isfinite(values)]


def shorten(text: str, limit: int = TOOLTIP_CHARS) -> str:
    """Text cut to `limit` characters, with an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _first(ids: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((ids, values))[:count]
    return ids[order], values[order]
