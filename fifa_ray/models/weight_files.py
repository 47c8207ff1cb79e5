"""Finding weights on disk or in the hub, and opening them without ever running what is in them.

Everything becomes a local path first: a hub name is a snapshot in the hub's cache. Checkpoints in
safetensors are preferred; a pickled one goes through `torch.load(weights_only=True)` alone, which
refuses anything but tensors and plain containers.
"""

import hashlib
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fifa_ray.models.reward import WeightFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound="PreTrainedModel")

CONFIG_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def local_path(source: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Local file or folder of `source`; of a hub name, the snapshot with files like `patterns`.

    Raises FileNotFoundError when `source` is neither a path that exists nor a hub name.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"expected a file, a folder or a hub name (owner/name) as weights, found {source!r}: "
            "nothing is there; check the path"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))


def model_folder(source: str, revision: str | None = None) -> Path:
    """Local folder of a model in hub format: its configuration and its weights.

    Pickled weights of a hub repository are fetched only when it has no safetensors.
    """
    folder = local_path(source, [*CONFIG_PATTERNS, "*.safetensors"], revision)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        folder = local_path(source, [*CONFIG_PATTERNS, "pytorch_model*.bin"], revision)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"expected a model folder in hub format with a config.json, found none in {folder}"
        )
    return folder


def processor_folder(
    weights: str, processor: str | None, revision: str | None, default: str | None = None
) -> Path:
    """Local folder with a model's tokenizer and image processor.

    `processor` (hub name or folder) when given, else `weights` when it holds them, else `default`,
    what the model's authors use.
    """
    if processor is not None:
        return local_path(processor, CONFIG_PATTERNS)
    folder = local_path(weights, CONFIG_PATTERNS, revision)
    if default is None or any(folder.glob("tokenizer*.json")):
        return folder
    return local_path(default, CONFIG_PATTERNS)


def checkpoint_file(source: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The first of `names` (best first) that `source` holds; `source` itself when it is a file.

    Raises FileNotFoundError that lists the names.
    """
    for name in names:
        path = local_path(source, [name], revision)
        if path.is_file():
            return path
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"expected one of {', '.join(names)} in {source}; found none of them; give the path of the "
        "checkpoint file itself if it has another name"
    )


def load_state_dict(path: Path) -> "dict[str, torch.Tensor]":
    """Tensors of one checkpoint file, on the CPU: .safetensors, or a pickle of tensors alone.

    A pickle may wrap them once, under `state_dict` or `model`. Raises ValueError when it holds
    anything that weights_only loading refuses, or something else than named tensors.
    """
    import torch

    loaded: Any
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded = load_file(path)
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than tensors, and loading it would run code; convert it to "
                "safetensors on a machine you can lose, or take it from another place"
            ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
        raise ValueError(f"expected named tensors in {path}, found {type(loaded).__name__}")
    return loaded


def filled_model(
    model_class: "type[ModelT]",
    config: Any,
    state_dict: "dict[str, torch.Tensor]",
    source: str,
    *,
    dtype: "torch.dtype | None" = None,
    **arguments: Any,
) -> "ModelT":
    """A transformers model of `config` with exactly these weights, on the CPU (float32 by default).

    Raises ValueError when a weight is missing, left over or of another shape, so that no part of
    a reward model is ever random.
    """
    import torch

    loaded: Any = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=dtype or torch.float32,
        output_loading_info=True,
        **arguments,
    )
    model, report = loaded
    problems = {name: sorted(map(str, found))[:5] for name, found in report.items() if found}
    if problems:
        raise ValueError(
            f"the checkpoint {source} does not fill a {model_class.__name__}: {problems}; check "
            "that it is the kind of reward model that the config names"
        )
    return model


def describe_weights(source: str, paths: Sequence[Path]) -> WeightFiles:
    """Source, hub commit and SHA-256 of files and of the weight files of folders, for a manifest.

    Reads every byte, except of files in the hub's cache that are stored under their SHA-256.
    """
    files = [file for path in paths for file in _weight_files(path)]
    return WeightFiles(
        source=source,
        revision=next((_hub_commit(file) for file in files if _hub_commit(file)), None),
        sha256={file.name: _sha256(file) for file in files},
    )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def _hub_commit(path: Path) -> str | None:
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-2] else None


def _sha256(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with blob.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
