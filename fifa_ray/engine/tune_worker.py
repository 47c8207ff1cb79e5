"""The process of a trial that holds its devices: it encodes, trains, draws and scores there.

It asks the ledger for more time when what was set aside runs out, and ends itself where it gets
none and does not stop in time: whatever hangs, the budget holds.
"""

import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import pyarrow as pa
import ray
from PIL import Image

from fifa_ray import schema
from fifa_ray.config import FifaConfig
from fifa_ray.engine.evaluate_models import local_copy
from fifa_ray.engine.evaluate_rewards import score_each
from fifa_ray.engine.evaluate_scorers import ImageScorer, Scorer
from fifa_ray.engine.train import OutOfTime, PreparedPairs, run_train
from fifa_ray.engine.tune_latents import LatentCache
from fifa_ray.models.image_generator import GeneratorWeights, ImageGenerator, Sampling
from fifa_ray.run_dir import Manifest, RunDir

# The process ends itself this long before its lease does.
GRACE_SECONDS = 0.75
POLL_SECONDS = 0.25
# Seconds asked for at once beyond what was set aside, and as a share of what was held.
LEAST_MORE, MORE_SHARE = 2.0, 0.1


class Allowance:
    """Says whether there is time for more work like the last; asks the ledger for some if not.

    Picklable: the workers of a training ask for themselves.
    """

    def __init__(self, ledger: Any, lease: str) -> None:
        self.ledger, self.lease = ledger, lease
        self.began = self.last = time.monotonic()
        self.deadline = 0.0

    def __reduce__(self) -> tuple[type["Allowance"], tuple[Any, str]]:
        return Allowance, (self.ledger, self.lease)

    def __call__(self) -> bool:
        """Whether the work may go on; called before each piece of it."""
        now = time.monotonic()
        # The longest piece is not known: twice the last one, and time to give back.
        needed = 2 * (now - self.last) + 2 * GRACE_SECONDS
        self.last = now
        if now + needed < self.deadline:
            return True
        remaining = ray.get(self.ledger.remaining.remote(self.lease))
        if remaining <= needed:
            more = max(LEAST_MORE, needed, MORE_SHARE * (now - self.began))
            remaining = ray.get(self.ledger.prolong.remote(self.lease, more))
        self.deadline = time.monotonic() + remaining
        return bool(remaining > needed)

    def require(self) -> None:
        """Raise OutOfTime where the work may not go on."""
        if not self():
            raise OutOfTime("the budget has no more time for it")


@dataclass(frozen=True)
class Drawn:
    """EVALUATION_REWARDS of what a model drew, reasons of what failed, and seconds it took."""

    rewards: pa.Table
    failed: dict[str, int]
    loading_seconds: float
    drawing_seconds: float


class TrialWorker:
    """An actor. Its lease begins with its process, or with the request where that is older."""

    def __init__(
        self, ledger: Any, lease: str, device: str, num_threads: int, asked: float
    ) -> None:
        """`device`: cpu or cuda; `asked`: when it was asked for, seconds since the epoch."""
        if device == "cpu":
            import torch

            torch.set_num_threads(num_threads)
        self.ledger, self.lease, self.device = ledger, lease, device
        self.scorers: dict[str, ImageScorer] = {}
        held = time.time() - max(asked, psutil.Process().create_time())
        self.start_seconds = max(0.0, held)
        remaining = ray.get(ledger.start.remote(lease, self.start_seconds))
        threading.Thread(target=self._watch, args=(remaining,), daemon=True).start()

    def ready(self) -> float:
        """Seconds that it took to start."""
        return self.start_seconds

    def encode(
        self, cache: LatentCache, config: FifaConfig, source: Any, items: pa.Table
    ) -> tuple[float, float]:
        """Encode images and prompts (TRAINING_ITEMS) into the shared latents.

        Returns the seconds that it took, and those of them before the first batch.
        """
        began = time.monotonic()
        allowance = Allowance(self.ledger, self.lease)
        encoders = cache.encoders(config, source, self.device)
        loading = time.monotonic() - began
        for _ in cache.encode(encoders, items):
            allowance.require()
        self._free()
        return time.monotonic() - began, loading

    def train(
        self, run: RunDir, config: FifaConfig, prepared: PreparedPairs, until: int, alone: bool
    ) -> tuple[Manifest, float]:
        """Train until so many optimizer steps; the manifest, and the seconds taken in all.

        `alone`: on the devices of this process, else on those of workers of Ray Train.
        """
        began = time.monotonic()
        manifest = run_train(
            run,
            config,
            in_process=alone,
            prepared=prepared,
            until=until,
            may_go_on=Allowance(self.ledger, self.lease),
        )
        self._free()
        return manifest, time.monotonic() - began

    def draw(
        self, weights: GeneratorWeights, config: FifaConfig, prompts: pa.Table, scorer: Scorer
    ) -> Drawn:
        """Draw rows of EVALUATION_PROMPTS and score them."""
        began = time.monotonic()
        settings = config.evaluate
        allowance = Allowance(self.ledger, self.lease)
        side = settings.resolution or config.train.resolution
        with tempfile.TemporaryDirectory(prefix="trial-model-") as copies:
            generator = ImageGenerator(
                _local(weights, copies),
                Sampling(side, settings.num_inference_steps, settings.guidance_scale),
                device=self.device,
                precision=settings.precision,
                batch_size=settings.batch_size,
            )
        if scorer.name not in self.scorers:
            self.scorers[scorer.name] = scorer.load(self.device)
        loaded = time.monotonic()
        tables, failed = [schema.EVALUATION_REWARDS.empty_table()], dict[str, int]()
        for start in range(0, len(prompts), settings.batch_size):
            allowance.require()
            rows = prompts.slice(start, settings.batch_size)
            tables.append(self._draw_rows(generator, self.scorers[scorer.name], rows, failed))
        del generator
        self._free()
        return Drawn(pa.concat_tables(tables), failed, loaded - began, time.monotonic() - loaded)

    def _draw_rows(
        self, generator: ImageGenerator, scorer: ImageScorer, rows: pa.Table, failed: dict[str, int]
    ) -> pa.Table:
        texts = rows.column("prompt").to_pylist()
        drawings = generator.draw(texts, rows.column("image_seed").to_pylist())
        images = {
            i: Image.fromarray(drawing.pixels)
            for i, drawing in enumerate(drawings)
            if drawing.pixels is not None
        }
        good = list(images)
        outcomes = score_each(scorer, list(images.values()), [texts[i] for i in good])
        rewards = dict(zip(good, (reward for reward, _, _ in outcomes), strict=True))
        errors = dict(zip(good, (error for _, error, _ in outcomes), strict=True))
        for i, drawing in enumerate(drawings):
            if reason := drawing.error or errors.get(i):
                failed[reason] = failed.get(reason, 0) + 1
        kept = [i for i in good if rewards[i] is not None]
        return pa.table(
            [
                rows.column("image_id").take(pa.array(kept, pa.int64())),
                rows.column(schema.PROMPT_ID).take(pa.array(kept, pa.int64())),
                pa.array([rewards[i] for i in kept], pa.float64()),
            ],
            schema=schema.EVALUATION_REWARDS,
        )

    def _free(self) -> None:
        """Give back the memory of what is not used any more."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _watch(self, remaining: float, end: Callable[[int], Any] = os._exit) -> None:
        """End the process before its lease does, or where nobody says how long that is."""
        while True:
            deadline = time.monotonic() + remaining
            try:
                remaining = ray.get(
                    self.ledger.remaining.remote(self.lease),
                    timeout=max(POLL_SECONDS, deadline - GRACE_SECONDS - time.monotonic()),
                )
            except Exception:  # whatever it is, nobody keeps the account any more
                end(1)
                return
            if remaining <= GRACE_SECONDS + POLL_SECONDS:
                end(1)
                return
            time.sleep(POLL_SECONDS)


def _local(weights: GeneratorWeights, copies: str) -> GeneratorWeights:
    """Weights in folders of this machine; hub names stay what they are."""
    if weights.lora is not None:
        lora = local_copy(weights.lora, copies)
        return GeneratorWeights(weights.model, weights.revision, weights.variant, lora)
    if "://" in weights.model:
        return GeneratorWeights(local_copy(weights.model, copies))
    return weights
