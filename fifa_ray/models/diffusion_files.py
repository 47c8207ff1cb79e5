"""Pipeline folders of the hub's format: found, checked, loaded in part, and written again.

Nothing is unpickled and no code of the folder runs: weights are safetensors, and every component
has to be a class of diffusers or transformers.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa_ray.models.diffusion import PIPELINE_FAMILIES, Family
from fifa_ray.models.weight_files import local_path

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
# Components that training has no use for; a saved pipeline keeps them.
UNTRAINED = ("safety_checker", "feature_extractor", "image_encoder")
# stable_diffusion is diffusers' own module of the safety checker.
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# Weights without a variant's mark, whole, in shards, and the shards' index.
_UNMARKED = re.compile(r"[^.]+\.safetensors(\.index\.json)?")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx")


def pipeline_folder(source: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Local folder of a pipeline; of a hub name, its snapshot with all components it lists.

    Raises FileNotFoundError where there is none, and ValueError where it is not of a family that
    can be trained or has components that are not plain diffusers and transformers classes.
    """
    folder = local_path(source, [INDEX], revision)
    pipeline_family(folder)
    if Path(source).expanduser().exists():
        return folder
    from diffusers import DiffusionPipeline

    return Path(
        DiffusionPipeline.download(
            source,
            revision=revision,
            variant=variant,
            use_safetensors=True,
            trust_remote_code=False,
        )
    )


def pipeline_family(folder: Path) -> Family:
    """The family of the pipeline in a folder. Raises as `pipeline_folder` does."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"expected the folder of a diffusers pipeline with a {INDEX}, found none in {folder}; "
            "single-file checkpoints have to be converted first"
        )
    index = _read_index(folder)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINE_FAMILIES:
        raise ValueError(
            f"{folder} is a {kind}, which cannot be trained here; expected one of "
            f"{', '.join(PIPELINE_FAMILIES)}"
        )
    for name, (library, class_name) in _components(index).items():
        if library not in (*_LIBRARIES, None) or not name.isidentifier():
            raise ValueError(
                f"{folder / INDEX} wants {library}.{class_name} as its {name}; only classes of "
                "diffusers and transformers are loaded, since others run code of the model's folder"
            )
    return PIPELINE_FAMILIES[kind]


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def _components(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Name -> [library, class]; both None where the pipeline goes without."""
    return {name: value for name, value in index.items() if isinstance(value, list)}


def load_pipeline(
    folder: Path,
    *,
    left_out: Sequence[str],
    given: Mapping[str, Any],
    dtypes: Mapping[str, "torch.dtype"],
    variant: str | None,
) -> Any:
    """The pipeline on the CPU, with `given` components, without those `left_out` or untrained.

    `dtypes` are the components' compute types, "default" that of the others. Raises OSError where
    a component has no weights in safetensors.
    """
    import diffusers

    index = _read_index(folder)
    components = _components(index)
    absent = {name: None for name in (*left_out, *UNTRAINED) if name in components}
    arguments: dict[str, Any] = {**absent, **given}
    if "requires_safety_checker" in index:
        arguments["requires_safety_checker"] = False
    pipeline_class = getattr(diffusers, index["_class_name"])
    with warnings.catch_warnings():
        # Newer diffusers call the argument dtype, and still know it by the name older ones need.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        return pipeline_class.from_pretrained(
            folder, torch_dtype=dict(dtypes), variant=variant, use_safetensors=True, **arguments
        )


def empty_component(folder: Path, name: str) -> Any:
    """A component of the right class and configuration whose weights take no memory (meta)."""
    import diffusers
    import torch

    component_class = getattr(diffusers, _components(_read_index(folder))[name][1])
    with torch.device("meta"):
        return component_class.from_config(component_class.load_config(folder, subfolder=name))


def copy_pipeline(source: Path, folder: Path, *, replaced: str, variant: str | None) -> None:
    """Copy a pipeline folder but for one component, whose weights the caller writes.

    Weights keep their bytes; a variant's files lose its mark, so that the copy opens without
    naming it. Components stored as pickles alone (old safety checkers) are left out.
    """
    index = _read_index(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (library, _) in _components(index).items():
        if library is None or name == replaced:
            continue
        files = _component_files(source / name, variant)
        if not files:
            logger.warning("%s of %s has no safetensors weights: left out", name, source)
            index[name] = [None, None]
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        for path, new_name in files.items():
            shutil.copy(path, folder / name / new_name)
            if new_name.endswith(".safetensors.index.json"):
                shards = (folder / name / new_name).read_text().replace(f".{variant}", "")
                (folder / name / new_name).write_text(shards)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _component_files(folder: Path, variant: str | None) -> dict[Path, str]:
    """Files of a component to copy and their new names; none where its weights cannot be used."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    weights = [path for path in files if ".safetensors" in path.name]
    pickles = [path for path in files if path.suffix in _PICKLED]
    chosen = [path for path in weights if variant and f".{variant}" in path.name]
    chosen = chosen or [path for path in weights if _UNMARKED.fullmatch(path.name)]
    if not chosen and (weights or pickles):
        return {}
    others = {path: path.name for path in files if path not in weights and path not in pickles}
    return others | {path: path.name.replace(f".{variant}", "") for path in chosen}
