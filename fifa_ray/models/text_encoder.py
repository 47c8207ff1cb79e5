"""Text encoders whose space measures how diverse prompts are: unit vectors from any of two kinds.

`sentence_transformer` is any model that the sentence-transformers library loads (its folder has a
modules.json); `clip` is the text tower with projection of a CLIP checkpoint.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fifa_ray.models.weight_files import CONFIG_PATTERNS, describe_weights, local_path

if TYPE_CHECKING:
    import torch

KINDS = ("auto", "sentence_transformer", "clip")
_CLIP_TYPES = ("clip", "clip_text_model")


class TextEncoder(Protocol):
    """Texts to unit vectors."""

    info: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (N, D), in the order of the texts, whatever the batches.

        Raises ValueError where the model gives NaN or a vector of length 0.
        """
        ...


def build_text_encoder(
    kind: str,
    model: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 128,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Load a text encoder from a local folder or a hub name.

    Raises ValueError for an unknown kind, or with "auto" where the files tell no kind, and
    FileNotFoundError where there is no such model.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of text encoder {kind!r}; expected {', '.join(KINDS)}")
    folder = encoder_folder(model, trust_remote_code)
    kind = detected_kind(folder) if kind == "auto" else kind
    build = _SentenceTransformer if kind == "sentence_transformer" else _ClipText
    return build(kind, model, folder, device, dtype, batch_size, trust_remote_code)


def encoder_folder(model: str, trust_remote_code: bool = False) -> Path:
    """Local folder of the model; of a hub name, its snapshot, safetensors where it has them."""
    patterns = [*CONFIG_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    folder = local_path(model, [*patterns, "*.safetensors"])
    if folder.is_dir() and not _weight_folders(folder):
        folder = local_path(model, [*patterns, "*.bin"])
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise FileNotFoundError(
            f"expected the folder of a text encoder with a config.json: {folder}"
        )
    return folder


def detected_kind(folder: Path) -> str:
    """sentence_transformer where there is a modules.json, clip by the config's model_type."""
    if (folder / "modules.json").is_file():
        return "sentence_transformer"
    model_type = None
    if (folder / "config.json").is_file():
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type in _CLIP_TYPES:
        return "clip"
    raise ValueError(
        f"cannot tell what kind of text encoder {folder} is: no modules.json, and model_type is "
        f"{model_type!r}, not {' or '.join(_CLIP_TYPES)}; set embed.kind (sentence_transformer "
        "averages the token vectors of any transformers model)"
    )


class _Encoder:
    """What both kinds share: longest texts first in batches of like length, checks, unit length."""

    def __init__(
        self,
        kind: str,
        model: str,
        folder: Path,
        device: str,
        dtype: str,
        batch_size: int,
        trust_remote_code: bool,
    ) -> None:
        from fifa_ray.models.batching import LargestBatch, compute_dtype

        self.device, self.dtype = device, compute_dtype(dtype, device)
        self.batches = LargestBatch(batch_size, "prompts")
        self.load(folder, trust_remote_code)
        self.info: dict[str, Any] = {
            "kind": kind,
            "model": model,
            "dimension": self.encode([""]).shape[1],
            "dtype": str(self.dtype).removeprefix("torch."),
            "sha256": {
                str((inner / name).relative_to(folder)): digest
                for inner in _weight_folders(folder)
                for name, digest in describe_weights(model, [inner]).sha256.items()
            },
        }

    def load(self, folder: Path, trust_remote_code: bool) -> None:
        raise NotImplementedError

    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `TextEncoder`."""
        import torch

        if not len(texts):
            return np.empty((0, self.info["dimension"]), np.float32)
        # Longest first: what does not fit into memory shows at once.
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
        with torch.inference_mode():
            outputs = self.batches.run([texts[i] for i in order], self.forward)
            features = torch.cat([output.float() for output in outputs])
            lengths = features.norm(dim=1, keepdim=True)
            unit = (features / lengths).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(unit).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the text encoder gave no direction (NaN, infinite or zero) for {len(bad)} of "
                f"{len(texts)} texts, first {texts[order[bad[0]]][:80]!r}; use dtype float32, or "
                "another model"
            )
        result = np.empty_like(unit)
        result[order] = unit
        return result


class _SentenceTransformer(_Encoder):
    def load(self, folder: Path, trust_remote_code: bool) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(
            str(folder),
            device=self.device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": self.dtype},
        )

    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        return self.model.encode(
            list(texts), batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )


class _ClipText(_Encoder):
    def load(self, folder: Path, trust_remote_code: bool) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

        config = AutoConfig.from_pretrained(folder)
        text_config = getattr(config, "text_config", config)
        # In a whole CLIP's configuration only the top level says how wide the projection is.
        text_config.projection_dim = config.projection_dim
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.tower = CLIPTextModelWithProjection.from_pretrained(
            folder, config=text_config, dtype=self.dtype
        )
        self.tower.eval().to(self.device)
        self.max_length = self.tower.config.max_position_embeddings  # 77 tokens for CLIP

    def forward(self, texts: Sequence[str]) -> "torch.Tensor":
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.device)
        return self.tower(tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds


def _weight_folders(folder: Path) -> list[Path]:
    """The folders that hold weights: the transformer's, and those of further modules."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*.bin")]
    return sorted({file.parent for file in files})
