"""How good the demo's reward model is on a world that it never saw, and its model card."""

from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scipy.stats import rankdata

from fifa_ray.demo.labelled_pairs import read_labelled_pairs
from fifa_ray.models.reward import build_image_transform, build_reward_model

TOP_SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)


class RewardMeasures(TypedDict):
    """Shares in [0, 1]; `labels_right_at_top` maps a share of the labelled pairs, those with the
    largest reward margin, to the share of right labels among them."""

    num_pairs: int
    truth_accuracy: float
    label_accuracy: float
    labels_right: float
    label_right_auc: float
    labels_right_at_top: dict[float, float]


def measure_reward_model(weights: Path, world: Path) -> RewardMeasures:
    """Score every labelled pair of a generated world as PickScore does, and compare.

    truth_accuracy: the better picture by utility gets the higher reward (all pairs, ties too);
    label_accuracy: so does the labelled one (ties left out); labels_right: what share of labels
    agrees with the truth at all; label_right_auc: chance that a right label has a larger
    reward_margin than a wrong one.
    """
    pairs = read_labelled_pairs(world)
    truth = pq.read_table(world / "truth" / "pairs.parquet")
    at = np.searchsorted(truth["ranking_id"].to_numpy(), pairs.ranking_id)
    gap = (truth["utility_0"].to_numpy() - truth["utility_1"].to_numpy())[at]
    transform = build_image_transform("pickscore", str(weights))
    model = build_reward_model("pickscore", str(weights), dtype="float32", batch_size=128)
    images = [transform(Image.fromarray(pixels.transpose(1, 2, 0))) for pixels in pairs.pixels]
    first, second = (
        model.score(images, pairs.prompts, pairs.image[:, side], pairs.prompt) for side in (0, 1)
    )
    preference = first.astype(np.float64) - second
    decided = pairs.label_0 != 0.5
    sign = np.where(pairs.label_0[decided] == 1.0, 1.0, -1.0)
    margin, right = sign * preference[decided], sign * gap[decided] > 0
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    best_first = np.argsort(-margin, kind="stable")
    auc = (rankdata(margin)[right].sum() - num_right * (num_right + 1) / 2) / (
        num_right * num_wrong
    )
    return {
        "num_pairs": len(gap),
        "truth_accuracy": float(np.mean((preference > 0) == (gap > 0))),
        "label_accuracy": float(np.mean(margin > 0)),
        "labels_right": float(right.mean()),
        "label_right_auc": float(auc),
        "labels_right_at_top": {
            share: float(right[best_first[: round(share * len(right))]].mean())
            for share in TOP_SHARES
        },
    }


def model_card(
    measures: RewardMeasures, *, command: str, training: str, num_parameters: int
) -> str:
    """The README.md of the weights folder."""
    rows = "\n".join(
        f"| labels right among the top {share:.0%} by reward margin | {value:.1%} |"
        for share, value in measures["labels_right_at_top"].items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# The demo world's reward model

A CLIP of {num_parameters / 1e6:.2f} million parameters for 64 px pictures of the demo world of
fifa-ray: `exp(logit_scale) * cos(image, prompt)`, as PickScore scores. It knows drawn scenes and
nothing else. Weights are stored in float16.

Made by `{command}`:
{training}.
Labels are the training world's noisy ones; its truth was not read, and the demo's own world
(another seed) was not used.

Measured on a held-out world of {measures["num_pairs"]:,} labelled pairs, which shares no prompt or
picture with the training world:

| | |
|---|---|
| better picture by truth gets the higher reward | {measures["truth_accuracy"]:.1%} |
| labelled picture gets the higher reward | {measures["label_accuracy"]:.1%} |
| labels that agree with the truth | {measures["labels_right"]:.1%} |
| AUC of the reward margin for a right label | {measures["label_right_auc"]:.3f} |
{rows}
"""
