"""Implicit accuracy on held-out pairs, and sample images, while a training runs."""

from collections.abc import Iterator

import numpy as np
import torch

from fifa_ray.dpo.loss import Metrics
from fifa_ray.engine.train_batch import PairBatch, make_batch, with_posteriors
from fifa_ray.engine.train_inputs import TrainJob, open_reader
from fifa_ray.engine.train_order import split_batches
from fifa_ray.engine.train_pairs import PairTable
from fifa_ray.engine.train_step import PairLoss
from fifa_ray.models.diffusion import DiffusionModel


class Validation:
    """Held-out pairs under the same noises and timesteps every time.

    Pairs are shared out among the workers. Errors of one pair are averaged over its draws before
    the logit is formed, as the paper's own classification by implicit reward does.
    """

    def __init__(
        self,
        job: TrainJob,
        pairs: PairTable,
        model: DiffusionModel,
        worker: int,
        num_workers: int,
    ) -> None:
        self.job, self.pairs, self.model = job, pairs, model
        self.reader = open_reader(job, pairs, model)
        self.mine = np.arange(worker, len(pairs), num_workers)
        # Positions of a sequence of their own: no training pair shares its noise.
        self.seed = -1 - job.seed
        self.reference: torch.Tensor | None = None

    @torch.no_grad()
    def measure(self, loss: PairLoss, batch_size: int) -> Metrics:
        """Sums over this worker's pairs, as in `fifa_ray.dpo.loss`, with the weight 1 a pair."""
        policy, reference, margins = self._errors(loss, batch_size)
        weights = torch.ones(policy.shape[1])
        _, metrics = loss.of_errors(
            (policy[0], policy[1]), (reference[0], reference[1]), margins, weights
        )
        return metrics

    def _errors(
        self, loss: PairLoss, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 (2, pairs) errors of policy and reference, averaged over draws, and margins."""
        policy: list[torch.Tensor] = []
        reference: list[torch.Tensor] = []
        margins: list[torch.Tensor] = []
        for batch in self._batches(batch_size):
            batch = with_posteriors(batch.to(self.model.device), self.model)
            policy.append(torch.stack(loss.errors(self.model.denoiser, batch)).cpu())
            if self.reference is None:
                reference.append(torch.stack(loss.reference_errors(batch)).cpu())
            margins.append(batch.reward_margin.cpu())
        if not policy:
            self.reference = torch.zeros(2, 0)
            return torch.zeros(2, 0), self.reference, torch.zeros(0)
        draws = self.job.settings.validation_draws
        if self.reference is None:  # the reference never changes
            self.reference = torch.cat(reference, 1).unflatten(1, (-1, draws)).mean(2)
        errors = torch.cat(policy, 1).unflatten(1, (-1, draws)).mean(2)
        return errors, self.reference, torch.cat(margins).unflatten(0, (-1, draws))[:, 0]

    def _batches(self, batch_size: int) -> Iterator[PairBatch]:
        """Each usable pair `validation_draws` times in a row."""
        draws = self.job.settings.validation_draws
        pairs = np.repeat(self.mine, draws)
        positions = pairs * draws + np.tile(np.arange(draws), len(self.mine))
        for part in split_batches(len(pairs), batch_size):
            inputs = self.reader.read(pairs[part], [None] * len(pairs[part]))
            if inputs.usable:
                at = [int(position) for position in positions[part]]
                yield make_batch(inputs, at, self.model, self.seed)
