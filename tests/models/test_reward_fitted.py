"""Features of (image, prompt) pairs, and fitted rewards on disk."""

import numpy as np
import pytest

from fifa_ray.models.image_encoder import build_encoder_transform, build_image_encoder
from fifa_ray.models.reward import build_reward_model
from fifa_ray.models.reward_fitted import (
    FeatureSpec,
    FittedReward,
    FittedRewardModel,
    PairFeatures,
    is_fitted_reward,
    read_fitted_reward,
)
from fifa_ray.scoring.bradley_terry import BradleyTerry


@pytest.fixture
def requests(tiny_clip, make_image, prompts):
    """Four images, five prompts, and six requests of them."""
    transform = build_encoder_transform(str(tiny_clip))
    images = [transform(make_image(seed, 60, 50)) for seed in range(4)]
    return images, prompts, np.array([0, 0, 1, 2, 3, 3]), np.array([0, 1, 1, 2, 3, 4])


def test_an_image_text_encoder_adds_the_clip_score_and_its_products(tiny_clip, requests):
    images, _, image_index, _ = requests
    features = PairFeatures(FeatureSpec(str(tiny_clip), text="products"))
    found = features.score(*requests)
    assert found.shape == (6, 16 + 1 + 16) == (6, len(features.info.feature_names))
    encoded = build_image_encoder(str(tiny_clip)).encode(images)
    np.testing.assert_allclose(found[:, :16], encoded[image_index], atol=1e-6)
    # The cosine is the CLIP score that the reward model of that kind computes by itself.
    cosine = build_reward_model("clip_score", str(tiny_clip)).score(*requests)
    np.testing.assert_allclose(found[:, 16], cosine, atol=1e-5)
    np.testing.assert_allclose(found[:, 17:].sum(axis=1), cosine, atol=1e-5)

    plain = PairFeatures(FeatureSpec(str(tiny_clip), text="none")).score(*requests)
    np.testing.assert_array_equal(plain, found[:, :16])
    default = PairFeatures(FeatureSpec(str(tiny_clip)))
    assert default.info.feature_names[-1] == "cosine"
    np.testing.assert_array_equal(default.score(*requests), found[:, :17])


def test_image_statistics_read_no_text(make_image, prompts):
    features = PairFeatures(FeatureSpec(text="products"))
    images = [build_encoder_transform(None)(make_image(seed)) for seed in range(2)]
    found = features.score(images, prompts, np.array([0, 1, 0]), np.array([0, 1, 2]))
    assert features.info.text == "none"
    assert found.shape == (3, len(features.info.feature_names))
    np.testing.assert_array_equal(found[0], found[2])
    empty = np.empty(0, np.int64)
    assert features.score([], [], empty, empty).shape == (0, found.shape[1])
    with pytest.raises(TypeError, match="image-text encoder"):
        build_image_encoder(None).encode_texts(["a cat"])


def some_reward(spec: FeatureSpec, num_features: int) -> FittedReward:
    rng = np.random.default_rng(0)
    models = [
        BradleyTerry(*(rng.normal(size=num_features) for _ in range(2)), np.ones(num_features), l2)
        for l2 in (1.0, 3.0, 10.0)
    ]
    features = {"encoder": spec.encoder, "revision": None, "text": spec.text}
    return FittedReward(models[0], tuple(models[1:]), {"features": features, "fitted_to": "a test"})


def save(reward: FittedReward, folder) -> str:
    for name, content in reward.to_files().items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_a_saved_reward_comes_back_and_scores_as_its_formula(tiny_clip, requests, tmp_path):
    spec = FeatureSpec(str(tiny_clip))
    reward = some_reward(spec, 17)
    folder = save(reward, tmp_path)
    loaded = read_fitted_reward(folder)
    assert loaded.spec == spec
    for mine, theirs in zip(
        (reward.model, *reward.folds), (loaded.model, *loaded.folds), strict=True
    ):
        assert mine.l2 == theirs.l2
        for name in ("weights", "mean", "std"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    model = FittedRewardModel(folder)
    features = PairFeatures(spec).score(*requests).astype(np.float64)
    expected = (features - reward.model.mean) @ reward.model.weights
    np.testing.assert_allclose(model.score(*requests), expected, atol=1e-5)
    assert model.info.kind == "fitted"
    assert list(model.info.weights.sha256) == ["model.safetensors"]


def test_a_fitted_reward_is_told_from_an_encoder(tiny_clip, tmp_path):
    folder = save(some_reward(FeatureSpec(), 3), tmp_path)
    assert is_fitted_reward(folder)
    assert not any(map(is_fitted_reward, (str(tiny_clip), None, "owner/name", "nowhere")))
    with pytest.raises(ValueError, match="model_type 'clip'"):
        FittedReward.from_files(b"", (tiny_clip / "config.json").read_text())
