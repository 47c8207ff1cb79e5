"""An estimate of the demo world's truth for images that have no scene behind them.

A drawn picture comes with its scene; a generated one does not. The reader is a small network that
was shown pictures with known scenes and says of any picture how probable each setting, layout,
shape, colour, size and count is, and what technical quality to expect. From that follows the
world's own utility in expectation:

    4 * E[alignment(asked, shown)] + 2 * E[technical quality]        (0 to 6)

It exists to measure the demo, and nothing that filters or trains may ask it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fifa_ray.demo.known_drawings import DEFECT_NAMES, IMAGE_SIZE, ITEM_FIELDS, LAYOUTS
from fifa_ray.demo.pictures import ALIGNMENT_UTILITY, QUALITY_UTILITY
from fifa_ray.demo.scenes import (
    COLOURS,
    MAX_COUNT,
    OPPOSITE,
    SETTINGS,
    SHAPES,
    SIZES,
    WEIGHTS,
    Relation,
    Scene,
)

TRUTH_READER_WEIGHTS = Path(__file__).parent / "weights" / "truth_reader"
WEIGHTS_FILE = "model.safetensors"
# Sizes of the classifying heads, in the order of a scene's codes.
HEADS = (
    len(SETTINGS), len(LAYOUTS),
    *(2 * (len(SHAPES), len(COLOURS), len(SIZES), MAX_COUNT)),
)  # fmt: skip
NUM_OUTPUTS = sum(HEADS) + len(DEFECT_NAMES) + 1
READ_BATCH = 64


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x + self.inner(x))


def build_reader() -> nn.Sequential:
    """An untrained network: float32 (B, 3, 64, 64) in [-1, 1] to (B, NUM_OUTPUTS).

    Batch rather than group normalisation: how bright and how rough a picture is must survive it.
    The outputs are the logits of `HEADS`, a severity for each defect, and the technical quality.
    """
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(24), nn.SiLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.SiLU(),
        _Residual(48),
        nn.Conv2d(48, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        _Residual(64),
        nn.Conv2d(64, 24, 1), nn.SiLU(), nn.Flatten(),
        nn.Linear(24 * (IMAGE_SIZE // 8) ** 2, NUM_OUTPUTS),
    )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What the reader makes of one picture.

    probabilities: of each head's classes, in the order of `HEADS` (a second item's mean nothing
    where the layout is single); severity: expected one of each of `DEFECT_NAMES`;
    technical_quality: expected, in [0, 1].
    """

    probabilities: tuple[np.ndarray, ...]
    severity: np.ndarray
    technical_quality: float

    def expected_alignment(self, asked: Scene) -> float:
        """`scenes.alignment(asked, shown)` in expectation, attributes being independent.

        Of the two orders of a picture's items the one with the better expectation counts.
        """
        if not asked.items and asked.setting is None:
            return 0.5
        setting, layout = self.probabilities[:2]
        first, second = self.probabilities[2:6], self.probabilities[6:]
        expected = layout[0] * self._in_order(asked, (first,), None)
        relations: tuple[Relation, Relation] = ("left of", "above")
        for probability, relation in zip(layout[1:], relations, strict=True):
            expected += probability * max(
                self._in_order(asked, (first, second), relation),
                self._in_order(asked, (second, first), OPPOSITE[relation]),
            )
        total = expected
        if asked.setting is not None:
            total += WEIGHTS["setting"] * setting[SETTINGS.index(asked.setting)]
        return float(total / _total_weight(asked))

    def _in_order(
        self, asked: Scene, items: tuple[tuple[np.ndarray, ...], ...], relation: Relation | None
    ) -> float:
        """Expected weight of what is right with the items and their relation."""
        right, all_present = 0.0, 1.0
        for index, item in enumerate(asked.items):
            if index >= len(items):
                all_present = 0.0
                continue
            shape, colour, size, count = items[index]
            present = shape[SHAPES.index(item.shape or "")]
            all_present *= present
            right += WEIGHTS["shape"] * present
            if item.colour is not None:
                right += WEIGHTS["colour"] * present * colour[COLOURS.index(item.colour)]
            if item.size is not None:
                right += WEIGHTS["size"] * present * size[SIZES.index(item.size)]
            if item.count is not None:
                right += WEIGHTS["count"] * present * count[item.count - 1]
        if asked.relation is not None:
            allowed = ("left of", "right of") if asked.relation == "beside" else (asked.relation,)
            right += WEIGHTS["relation"] * all_present * (relation in allowed)
        return right

    def expected_utility(self, asked: Scene) -> float:
        """The world's utility in expectation, 0 to 6."""
        aligned = self.expected_alignment(asked)
        return ALIGNMENT_UTILITY * aligned + QUALITY_UTILITY * self.technical_quality


def _total_weight(asked: Scene) -> float:
    """Weight of everything that a prompt's scene states."""
    stated = [
        *("shape" for _ in asked.items),
        *(
            field
            for item in asked.items
            for field in ITEM_FIELDS[1:]
            if getattr(item, field) is not None
        ),
        *(field for field in ("setting", "relation") if getattr(asked, field) is not None),
    ]
    return sum(WEIGHTS[field] for field in stated)


class TruthReader:
    """The trained network, and the scenes that prompts ask for."""

    def __init__(self, network: nn.Module, scenes: Mapping[str, Scene], version: str = "") -> None:
        """`version`: of the weights; an evaluation scores again when it changes."""
        self.network = network.eval()
        self.scenes, self.version = scenes, version

    @classmethod
    def load(
        cls, scenes: Mapping[str, Scene], folder: Path = TRUTH_READER_WEIGHTS
    ) -> "TruthReader":
        """The reader of a folder; `scenes` maps prompts to what they ask for.

            TruthReader.load({prompt.text: prompt.scene for prompt in prompt_catalogue(2_200, 0)})

        Raises FileNotFoundError where the folder holds no weights.
        """
        network = build_reader()
        state = load_file(folder / WEIGHTS_FILE)
        network.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(
            network, scenes, hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        )

    @torch.inference_mode()
    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """What each picture shows.

        Raises ValueError for pictures that are not 64 by 64 pixels, which the reader never saw.
        """
        readings: list[Reading] = []
        for at in range(0, len(images), READ_BATCH):
            outputs = self.network(network_input(images[at : at + READ_BATCH]))
            *logits, severity, quality = outputs.split([*HEADS, len(DEFECT_NAMES), 1], dim=1)
            probabilities = [head.softmax(dim=1).double().numpy() for head in logits]
            for row in range(len(outputs)):
                readings.append(
                    Reading(
                        tuple(head[row] for head in probabilities),
                        severity[row].clamp(0, 1).numpy(),
                        float(quality[row].clamp(0, 1)),
                    )
                )
        return readings

    def utility(self, image: Image.Image, asked: Scene) -> float:
        """Expected utility of one picture for a scene, 0 to 6."""
        return self.read([image])[0].expected_utility(asked)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Expected utility of each image for its prompt, float32 (N,), 0 to 6.

        Raises KeyError for a prompt without a known scene.
        """
        unknown = [prompt for prompt in prompts if prompt not in self.scenes]
        if unknown:
            raise KeyError(
                f"expected prompts of the {len(self.scenes):,} with a known scene, found"
                f" {unknown[0]!r}; load the reader with the scenes of the catalogue in use"
            )
        readings = self.read(images)
        return np.array(
            [
                reading.expected_utility(self.scenes[prompt])
                for reading, prompt in zip(readings, prompts, strict=True)
            ],
            np.float32,
        )


def network_input(images: Sequence[Image.Image]) -> torch.Tensor:
    """float32 (B, 3, 64, 64) in [-1, 1]; see `TruthReader.read`."""
    for image in images:
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"expected pictures of {IMAGE_SIZE} by {IMAGE_SIZE} pixels, found {image.size};"
                " resize them, or draw them at that size"
            )
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
