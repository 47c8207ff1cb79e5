"""The reader of generated images: its arithmetic, its training, and the weights that ship."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fifa_ray.demo.known_drawings import (
    DEFECT_NAMES,
    KnownDrawings,
    decode_scene,
    encode_scene,
    prompts_of,
)
from fifa_ray.demo.pictures import technical_quality
from fifa_ray.demo.resumable import run_steps
from fifa_ray.demo.scenes import alignment, random_image_scene, random_prompt_scene
from fifa_ray.demo.train_truth_reader import qualities, reader_loss, save_reader, train_reader
from fifa_ray.demo.truth_reader import HEADS, NUM_OUTPUTS, Reading, TruthReader, build_reader
from fifa_ray.demo.truth_reader_card import (
    ReaderMeasures,
    compare,
    held_out_drawings,
    true_utilities,
)

# Floors for the shipped weights on fresh drawings; the model card has what was measured.
FLOORS = {
    "setting": 0.99, "layout": 0.98, "first shape": 0.87, "first colour": 0.95, "first size": 0.94,
    "first count": 0.94, "second shape": 0.81, "second colour": 0.93, "second size": 0.92,
    "second count": 0.94,
}  # fmt: skip
CORRELATION, QUALITY_CORRELATION, PAIRWISE_CLEAR = 0.87, 0.93, 0.92
# Seed of pictures that neither training nor the model card's figures used.
FRESH_SEED = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small products are no faster on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> KnownDrawings:
    folder = tmp_path_factory.mktemp("drawings")
    return held_out_drawings(folder, seed=FRESH_SEED, num_prompts=150)


@pytest.fixture(scope="module")
def measures(drawings: KnownDrawings) -> ReaderMeasures:
    return compare(TruthReader.load({}), drawings, drawings.pixels)


def certain(codes: np.ndarray, quality: float) -> Reading:
    """A reading without doubt of a scene's codes."""
    probabilities = tuple(
        np.eye(size)[max(int(code), 0)] for size, code in zip(HEADS, codes, strict=True)
    )
    return Reading(probabilities, np.zeros(len(DEFECT_NAMES)), quality)


def test_codes_keep_all_of_a_scene_that_matters_to_alignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shown, asked = random_image_scene(rng), random_prompt_scene(rng)
        codes = encode_scene(shown)
        assert alignment(asked, decode_scene(codes))[0] == alignment(asked, shown)[0]
        assert np.array_equal(encode_scene(decode_scene(codes)), codes)


def test_without_doubt_the_expected_utility_is_the_worlds_own() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        shown, asked = random_image_scene(rng), random_prompt_scene(rng)
        if rng.random() < 0.3:  # much of it right
            asked = shown
        quality = float(rng.random())
        expected = 4 * alignment(asked, shown)[0] + 2 * quality
        assert certain(encode_scene(shown), quality).expected_utility(asked) == pytest.approx(
            expected
        )


def test_in_doubt_about_one_attribute_the_utility_is_the_mean() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        shown, asked = random_image_scene(rng), random_prompt_scene(rng)
        first, second = encode_scene(shown), encode_scene(shown)
        second[0] = (first[0] + 3) % HEADS[0]  # another setting
        both = [
            0.25 * a + 0.75 * b
            for a, b in zip(
                certain(first, 1).probabilities, certain(second, 1).probabilities, strict=True
            )
        ]
        doubtful = Reading(tuple(both), np.zeros(6), 1.0)
        wanted = 0.25 * alignment(asked, decode_scene(first))[0]
        wanted += 0.75 * alignment(asked, decode_scene(second))[0]
        assert doubtful.expected_alignment(asked) == pytest.approx(wanted)


def test_loss_ignores_what_a_picture_does_not_have() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(1, NUM_OUTPUTS)
    codes = torch.tensor([[3, 0, 1, 2, 1, 0, -1, -1, -1, -1]])
    severity, quality = torch.zeros(1, len(DEFECT_NAMES)), torch.ones(1)
    loss, figures = reader_loss(outputs, codes, severity, quality)
    at = sum(HEADS[:6])
    changed = outputs.clone()
    changed[:, at : sum(HEADS)] += torch.randn(sum(HEADS) - at)
    assert reader_loss(changed, codes, severity, quality)[0].item() == pytest.approx(loss.item())
    log = [
        head.log_softmax(1)[0, code].item()
        for head, code in zip(outputs.split([*HEADS, 7], 1)[:6], codes[0], strict=False)
    ]
    assert figures["naming loss"] == pytest.approx(-sum(log), rel=1e-5)


def test_qualities_are_the_worlds() -> None:
    severity = np.random.default_rng(0).uniform(0, 0.6, (20, len(DEFECT_NAMES)))
    rows = [dict(zip(DEFECT_NAMES, row, strict=True)) for row in severity]
    assert qualities(severity) == pytest.approx([technical_quality(row) for row in rows])


def test_training_learns_and_goes_on_exactly_where_it_was_killed(
    drawings: KnownDrawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fifa_ray.demo.train_truth_reader.BATCH_SIZE", 16)
    some = KnownDrawings(
        drawings.prompts,
        drawings.pixels[:64],
        drawings.prompt[:64],
        drawings.codes[:64],
        drawings.severity[:64],
    )
    soft = 255 - some.pixels[:32]

    def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = build_reader()
        train_reader(network, some, soft, checkpoint=checkpoint, num_steps=8, seed=3)
        return network.state_dict()

    whole = trained(tmp_path / "whole.pt")

    class Killed(Exception):
        pass

    def killed_after_five(modules, loss_of_step, **settings):
        def loss(step: int):
            if step == 5:
                raise Killed
            return loss_of_step(step)

        return run_steps(modules, loss, **settings)

    monkeypatch.setattr("fifa_ray.demo.resumable.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("fifa_ray.demo.train_truth_reader.run_steps", killed_after_five)
    with pytest.raises(Killed):
        trained(tmp_path / "killed.pt")
    monkeypatch.setattr("fifa_ray.demo.train_truth_reader.run_steps", run_steps)
    resumed = trained(tmp_path / "killed.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_saved_weights_are_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_reader().eval()
    save_reader(network, tmp_path)
    again = TruthReader.load({}, tmp_path).network
    picture = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network(picture), again(picture), atol=0.02)


def test_shipped_reader_reads_fresh_drawings(measures: ReaderMeasures) -> None:
    accuracy = measures["accuracy"]
    for name, floor in FLOORS.items():
        assert accuracy[name] > floor, name
    assert measures["correlation"] > CORRELATION
    assert measures["quality_correlation"] > QUALITY_CORRELATION
    assert measures["pairwise_clear"] > PAIRWISE_CLEAR


def test_scores_are_the_expected_utilities_of_prompts_scenes(drawings: KnownDrawings) -> None:
    scenes = {prompt.text: prompt.scene for prompt in drawings.prompts}
    reader = TruthReader.load(scenes)
    images = [Image.fromarray(pixels) for pixels in drawings.pixels[:6]]
    prompts = [drawings.prompts[index].text for index in drawings.prompt[:6]]
    scores = reader.score(images, prompts)
    assert scores.dtype == np.float32
    assert scores[2] == pytest.approx(reader.utility(images[2], scenes[prompts[2]]), abs=1e-5)
    assert scores == pytest.approx(true_utilities(drawings)[0][:6], abs=3.5)
    with pytest.raises(KeyError, match="known scene"):
        reader.score(images[:1], ["a prompt of nobody"])
    with pytest.raises(ValueError, match="64 by 64"):
        reader.read([Image.new("RGB", (32, 32))])


def test_prompts_of_two_parities_are_apart() -> None:
    odd = {p.text for p in prompts_of((5, 7), 200, ("normal", "near_duplicate"))}
    even = {p.text for p in prompts_of((6, 8), 200, ("normal", "near_duplicate"))}
    assert len(odd) > 200
    assert not odd & even
