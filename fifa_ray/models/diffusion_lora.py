"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in a denoiser, through PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fifa_ray.config import LoraConfig


def add_adapters(
    denoiser: Any, lora: "LoraConfig", default_targets: Sequence[str], seed: int
) -> list[Any]:
    """Put float32 low-rank adapters into a frozen denoiser: the adapted layers, in order.

    The second matrix of each starts at zero, so nothing changes before the first step; the first is
    normal from `seed`. Raises ValueError where no layer has one of the names.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = list(lora.target_modules or default_targets)
    names = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        raise ValueError(
            f"no linear or convolution layer of the denoiser has a name ending in {unmatched}; "
            f"its layers are called, for example, {names[len(names) // 2 :][:3]}"
        )
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    # On whatever device the denoiser is, the adapters are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(settings)
    cast_training_params(denoiser, dtype=torch.float32)
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def save_adapters(pipeline: Any, kind: str, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write adapters of the pipeline's `kind` (unet, transformer) for `load_lora_weights`.

    Their rank and scale go into the file's metadata.
    """
    from peft.utils import get_peft_model_state_dict

    denoiser = getattr(pipeline, kind)
    values = {name: value.float().cpu().contiguous() for name, value in weights.items()}
    layers = get_peft_model_state_dict(denoiser, state_dict=values)
    settings = denoiser.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(
        folder,
        safe_serialization=True,
        **{f"{kind}_lora_layers": layers, f"{kind}_lora_adapter_metadata": settings},
    )
