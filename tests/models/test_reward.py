"""What all reward models share: choosing one, opening its weights safely, batches that fit."""

import hashlib
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fifa_ray.models.batching import LargestBatch, compute_dtype
from fifa_ray.models.reward import REWARD_KINDS, build_image_transform, build_reward_model
from fifa_ray.models.weight_files import checkpoint_file, load_state_dict


def test_unknown_kind_and_option_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'PickScor'; expected one of .*did you mean 'pickscore'"):
        build_reward_model("PickScor", "x")
    with pytest.raises(ValueError, match=r"expected one of " + re.escape(", ".join(REWARD_KINDS))):
        build_image_transform("nothing like it", "x")
    with pytest.raises(ValueError, match=r"'rezise' of reward kind 'hpsv2'.*mean 'resize'"):
        build_image_transform("hpsv2", None, options={"rezise": "pillow"})
    with pytest.raises(ValueError, match="antialias, no_antialias or pillow"):
        build_image_transform("hpsv2", None, options={"resize": "lanczos"})


def test_missing_weights_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="file, a folder or a hub name"):
        build_reward_model("pickscore", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"HPS_v2_compressed\.safetensors, HPS_v2_comp"):
        build_reward_model("hpsv2", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        build_reward_model("clip_score", str(tmp_path))


def test_transforms_are_pickled_to_workers_without_torch(tiny_clip: Path) -> None:
    """A decode worker builds and runs them; importing torch there would cost 200 MB each."""
    code = (
        "import pickle, sys; from PIL import Image;"
        "from fifa_ray.models.reward import build_image_transform as build;"
        f"made = [build('pickscore', {str(tiny_clip)!r}), build('imagereward', 'a/b'),"
        "build('hpsv3', 'a/b'), build('hpsv2', 'a/b', options={'resize': 'pillow'})];"
        "again = pickle.loads(pickle.dumps(made)); assert again == made;"
        "print([t(Image.new('RGB', (64, 48))).shape for t in again], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shapes = "(3, 32, 32), (3, 224, 224), (3, 392, 532), (3, 224, 224)"
    assert done.stdout.strip() == f"[{shapes}] False"


class _RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("pickle-ran-code"),)


def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": {"weight": torch.ones(2), "extra": _RunsCode()}}, evil)
    with pytest.raises(ValueError, match="loading it would run code"):
        build_reward_model("hpsv2", str(evil))
    evil.write_bytes(pickle.dumps(_RunsCode(), protocol=2))
    with pytest.raises(ValueError, match="loading it would run code"):
        build_reward_model("hpsv2", str(evil))
    assert not (tmp_path / "pickle-ran-code").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"expected named tensors .* found list"):
        load_state_dict(tmp_path / "list.pt")
    wrapped = {"epoch": 3, "state_dict": {"weight": torch.ones(2)}}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    assert list(load_state_dict(tmp_path / "wrapped.pt")) == ["weight"]


def test_indices_and_shapes_are_checked(tiny_clip: Path) -> None:
    model = build_reward_model("clip_score", str(tiny_clip))
    image = np.zeros((3, 32, 32), np.uint8)
    zero = np.array([0])
    with pytest.raises(ValueError, match="image_index runs from 0 to 1, but there are 1 images"):
        model.score([image], ["cat"], np.array([0, 1]), np.array([0, 0]))
    with pytest.raises(ValueError, match="prompt_index runs from -1 to 0"):
        model.score([image], ["cat"], np.array([0, 0]), np.array([0, -1]))
    with pytest.raises(ValueError, match="equal length, got 1 and 2"):
        model.score([image], ["cat"], zero, np.array([0, 0]))
    with pytest.raises(ValueError, match="one-dimensional integer image_index"):
        model.score([image], ["cat"], np.array([0.0]), zero)
    with pytest.raises(ValueError, match="images of one shape"):
        model.score([image, image[:, :16]], ["cat"], zero, zero)
    nothing = np.empty(0, np.int64)
    assert model.score([], [], nothing, nothing).shape == (0,)


def test_batch_halves_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def forward(batch: list[int]) -> torch.Tensor:
        seen.append(len(batch))
        if len(batch) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(batch)

    batch = LargestBatch(16, "images")
    with caplog.at_level(logging.WARNING):
        outputs = batch.run(list(range(23)), forward)
    assert torch.cat(outputs).tolist() == list(range(23))
    assert seen == [16, 8, 4, 4, 4, 4, 4, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "out of device memory with a batch of 16 images; going on with 8",
        "out of device memory with a batch of 8 images; going on with 4",
    ]
    seen.clear()
    batch.run(list(range(8)), forward)
    assert seen == [4, 4]  # It is found once.


def test_a_short_batch_that_does_not_fit_halves_itself() -> None:
    def forward(batch: list[int]) -> torch.Tensor:
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(batch)

    batch = LargestBatch(1024, "images")
    assert torch.cat(batch.run([0, 1, 2, 3, 4], forward)).tolist() == [0, 1, 2, 3, 4]
    assert batch.size == 2


def test_one_item_that_does_not_fit_is_an_error() -> None:
    def forward(batch: list[int]) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        LargestBatch(4, "images").run([1, 2, 3], forward)


def test_running_out_of_memory_changes_no_score(
    tiny_clip: Path, make_image: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPModel

    transform = build_image_transform("clip_score", str(tiny_clip))
    images = [transform(make_image(seed)) for seed in range(7)]
    index, zeros = np.arange(7), np.zeros(7, np.int64)
    expected = build_reward_model("clip_score", str(tiny_clip)).score(images, ["cat"], index, zeros)
    real = CLIPModel.get_image_features

    def only_three_fit(self, pixel_values):
        if len(pixel_values) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, pixel_values=pixel_values)

    monkeypatch.setattr(CLIPModel, "get_image_features", only_three_fit)
    rewards = build_reward_model("clip_score", str(tiny_clip)).score(images, ["cat"], index, zeros)
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_dtype_setting() -> None:
    assert compute_dtype("auto", "cpu") == torch.float32
    assert compute_dtype("auto", "cuda:1") == torch.bfloat16
    assert compute_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        compute_dtype("int8", "cpu")


def test_info_goes_into_a_manifest(tiny_clip: Path) -> None:
    info = build_reward_model("pickscore", str(tiny_clip)).info
    content = json.loads(json.dumps(info.as_dict()))
    digest = hashlib.sha256((tiny_clip / "model.safetensors").read_bytes()).hexdigest()
    assert content["weights"] == {
        "source": str(tiny_clip),
        "revision": None,
        "sha256": {"model.safetensors": digest},
    }
    assert content["kind"] == "pickscore"
    assert content["dtype"] == "float32"
    assert content["scale"] == "66.6863 * cosine"
    assert "bicubic" in content["preprocessing"]


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def _cached(cache: Path, repository: str, commit: str) -> Path:
    folder = cache / ("models--" + repository.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_hub_names_are_read_from_the_hubs_cache(tiny_clip: Path, offline_hub: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = _cached(offline_hub, "someone/tiny-clip", commit)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for file in tiny_clip.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / digest)
    model = build_reward_model("clip_score", "someone/tiny-clip")
    transform = build_image_transform("clip_score", "someone/tiny-clip")
    image = transform(Image.new("RGB", (40, 40), "red"))
    at = np.array([0])
    local = build_reward_model("clip_score", str(tiny_clip))
    assert model.score([image], ["cat"], at, at) == local.score([image], ["cat"], at, at)
    assert model.info.weights.revision == commit
    assert model.info.weights.sha256 == local.info.weights.sha256


def test_checkpoint_of_a_hub_name(offline_hub: Path) -> None:
    snapshot = _cached(offline_hub, "xswu/HPSv2", "f" * 40)
    save_file({"weight": torch.ones(2)}, snapshot / "HPS_v2_compressed.safetensors")
    found = checkpoint_file("xswu/HPSv2", ["absent.pt", "HPS_v2_compressed.safetensors"])
    assert found == snapshot / "HPS_v2_compressed.safetensors"
