"""Preference losses on denoising errors: Diffusion-DPO and its variants.

Every loss is a function of four numbers per pair: how badly the policy and the frozen reference
denoise the chosen and the rejected image, at the same timestep and under the same noise.

How results add up. A loss and its metrics are sums over pairs, each weighted by `pair_weight`, so
they add over micro-batches of any sizes. For G pairs per optimizer step, give every pair the weight
1/G (times the number of workers where gradients are averaged over them, as DDP does): the gradient
is then that of the mean over the G pairs, however they were split. Every metric comes beside the
sum of weights, `pair_weight`; sum both over micro-batches and workers, then divide.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossKind = Literal["dpo", "ipo", "margin_weighted", "sft"]
Metrics = dict[str, Tensor]


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each prediction: (N, ...) twice -> float32 (N,).

    In float32 whatever comes in: two errors differ by far less than a bfloat16 can tell apart.
    Raises ValueError when the shapes differ (they would broadcast) or have no axis but the batch's.
    """
    if prediction.shape != target.shape or prediction.ndim < 2:
        raise ValueError(
            "expected a prediction and a target of one shape (N, ...), got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def implicit_rewards(
    error_chosen: Tensor,
    error_rejected: Tensor,
    ref_error_chosen: Tensor,
    ref_error_rejected: Tensor,
    *,
    dpo_beta: float,
) -> Tensor:
    """The logit of Diffusion-DPO, float32 (B,): implicit reward of chosen minus that of rejected.

    An image's implicit reward is dpo_beta * (reference's error - policy's error).
    """
    chosen = error_chosen.float() - ref_error_chosen.float()
    rejected = error_rejected.float() - ref_error_rejected.float()
    return -dpo_beta * (chosen - rejected)


def diffusion_dpo_loss(
    error_chosen: Tensor,
    error_rejected: Tensor,
    ref_error_chosen: Tensor,
    ref_error_rejected: Tensor,
    *,
    dpo_beta: float,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, equation 14): loss () and metrics.

        logit = -dpo_beta * [ (error_chosen - error_rejected)
                              - (ref_error_chosen - ref_error_rejected) ]
        loss  = -log sigmoid(logit)

    Errors are (B,), each the mean over an image's values (`denoising_error`); the paper's T and
    lambda weighting are folded into `dpo_beta`. There is no half in front, so of what public
    scripts call beta

        original script (Salesforce train.py):  dpo_beta = 0.5 * beta, its 5000 is 2500 here
        diffusers, Stable Diffusion script:     dpo_beta = beta,       its 2500 is 2500 here
        diffusers, SDXL script:                 dpo_beta = 0.5 * beta, its 5000 is 2500 here

    Where policy and reference agree the loss is ln 2. See `preference_loss` for `pair_weight`, the
    metrics and the errors raised.
    """
    return preference_loss(
        "dpo",
        error_chosen,
        error_rejected,
        ref_error_chosen,
        ref_error_rejected,
        dpo_beta=dpo_beta,
        pair_weight=pair_weight,
    )


def preference_loss(
    kind: LossKind,
    error_chosen: Tensor,
    error_rejected: Tensor,
    ref_error_chosen: Tensor,
    ref_error_rejected: Tensor,
    *,
    dpo_beta: float,
    anchor_weight: float = 0.0,
    reward_margin: Tensor | None = None,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss () of one kind, float32, and metrics. All arguments of pairs are (B,), any dtype.

    With the logit of `diffusion_dpo_loss`:

    - dpo: -log sigmoid(logit).
    - ipo: (logit - 1/2)^2, the loss of Azar et al. 2023 (arXiv 2310.12036) times dpo_beta^2, so
      that its gradient at the start is twice dpo's whatever dpo_beta is. The logit is drawn to
      1/2 instead of growing for ever.
    - margin_weighted: -log sigmoid(logit - reward_margin), DPO with an offset (Amini et al. 2024,
      arXiv 2402.10571, with an offset linear in the rewards' difference). A pair pushes with
      sigmoid(reward_margin - logit): at the start the harder the larger its margin, and less and
      less as its implicit margin outgrows it; with a margin of 0 it is dpo. `reward_margin` is in
      logits: a Bradley-Terry model's as they are, another reward model's divided by their spread,
      so that usual ones are about 1. At the start the loss is ln 2 only for a margin of 0.
    - sft: error_chosen; the rejected image and the reference play no part.

    `anchor_weight` > 0 adds anchor_weight * error_chosen: it holds the chosen image's own error
    down where a difference alone would let both errors grow (as the likelihood term does in
    Pang et al. 2024, arXiv 2404.19733).

    `pair_weight` (B,) weighs pairs in the sums; None: 1/B each, the mean (see the module).

    Metrics, 0-dim float32 without gradient, each the weighted sum over pairs: `loss`;
    `implicit_accuracy` (1 where the logit is positive, 1/2 where it is 0), `implicit_reward_margin`
    (the logit), `policy_error_chosen`, `policy_error_rejected`, `reference_error_chosen`,
    `reference_error_rejected`; and `pair_weight`, the sum of the weights.

    Raises ValueError for another kind, for shapes other than one (B,), for integers, for a dpo_beta
    that is not positive, and when margin_weighted has no margins.
    """
    errors = {
        "policy_error_chosen": error_chosen,
        "policy_error_rejected": error_rejected,
        "reference_error_chosen": ref_error_chosen,
        "reference_error_rejected": ref_error_rejected,
    }
    _check_pairs(errors, reward_margin, pair_weight)
    if not dpo_beta > 0:
        raise ValueError(f"expected a dpo_beta above 0, got {dpo_beta}")
    errors = {name: values.float() for name, values in errors.items()}
    logit = implicit_rewards(*errors.values(), dpo_beta=dpo_beta)
    per_pair = _loss_per_pair(kind, logit, errors["policy_error_chosen"], reward_margin)
    if anchor_weight:
        per_pair = per_pair + anchor_weight * errors["policy_error_chosen"]
    if pair_weight is None:
        pair_weight = torch.full_like(logit, 1 / len(logit))
    pair_weight = pair_weight.to(logit)
    loss = (pair_weight * per_pair).sum()
    with torch.no_grad():
        accuracy = torch.where(logit > 0, 1.0, torch.where(logit == 0, 0.5, 0.0))
        of_pairs = {"implicit_accuracy": accuracy, "implicit_reward_margin": logit, **errors}
        metrics = {name: (pair_weight * values).sum() for name, values in of_pairs.items()}
        metrics |= {"loss": loss.detach(), "pair_weight": pair_weight.sum()}
    return loss, metrics


def _loss_per_pair(
    kind: LossKind, logit: Tensor, error_chosen: Tensor, reward_margin: Tensor | None
) -> Tensor:
    if kind == "dpo":
        return -functional.logsigmoid(logit)
    if kind == "ipo":
        return (logit - 0.5).square()
    if kind == "margin_weighted":
        if reward_margin is None:
            raise ValueError("the loss margin_weighted needs the pairs' reward_margin, got None")
        return -functional.logsigmoid(logit - reward_margin.to(logit))
    if kind == "sft":
        return error_chosen
    raise ValueError(f"unknown loss {kind!r}; expected dpo, ipo, margin_weighted or sft")


def _check_pairs(errors: Metrics, reward_margin: Tensor | None, pair_weight: Tensor | None) -> None:
    given = dict(errors)
    if reward_margin is not None:
        given["reward_margin"] = reward_margin
    if pair_weight is not None:
        given["pair_weight"] = pair_weight
    shapes = {values.shape for values in given.values()}
    floating = all(values.is_floating_point() for values in given.values())
    if len(shapes) > 1 or len(next(iter(shapes))) != 1 or not floating:
        found = {name: f"{v.dtype} {tuple(v.shape)}" for name, v in given.items()}
        raise ValueError(f"expected floating tensors of one shape (B,), one value a pair: {found}")
