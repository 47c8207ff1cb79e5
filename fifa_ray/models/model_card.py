"""The README.md of a trained model: what it is, from what, how, and how well it did."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fifa_ray.config import FifaConfig
from fifa_ray.run_dir import Manifest

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(training: Manifest, config: FifaConfig, manifests: Mapping[str, Manifest]) -> str:
    """Markdown with the hub's front matter.

    `training` is the training's manifest before it is published, `manifests` those of the run's
    other stages: the selection's says how the pairs were chosen.
    """
    settings, details = config.train, training.details
    is_lora = settings.lora is not None
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **_base(settings.model, is_lora),
        "tags": ["fifa-ray", "diffusion-dpo", *(["lora"] if is_lora else [])],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {settings.name}",
        _what(training, config),
        "## Use\n\n" + _use(settings.model, is_lora, settings.revision),
        "## Data\n\n" + _table(_data_rows(training, config, manifests)),
        "## Training\n\n" + _table(_training_rows(training, config)),
        "## Results\n\n" + _results(training),
        "## How to repeat it\n\n"
        f"    fifa train CONFIG train.name={settings.name}\n\n"
        f"Every setting:\n\n```yaml\n{_dump(settings.model_dump(mode='json'))}```\n\n"
        f"Fingerprint of data, base weights and settings: `{training.fingerprint}`. "
        f"SHA-256 of the base weights:\n\n```json\n{json.dumps(details['model'], indent=1)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _base(model: str, is_lora: bool) -> dict[str, str]:
    """The hub's link to the base model; nothing for a folder, which the hub does not know."""
    if not _HUB_NAME.fullmatch(model):
        return {}
    return {"base_model": model, "base_model_relation": "adapter" if is_lora else "finetune"}


def _what(training: Manifest, config: FifaConfig) -> str:
    settings = config.train
    kind = f"rank-{settings.lora.rank} adapters (LoRA)" if settings.lora else "all weights"
    losses = {
        "dpo": "Diffusion-DPO (arXiv 2311.12908)",
        "ipo": "Diffusion-DPO with the IPO loss (arXiv 2310.12036)",
        "margin_weighted": "Diffusion-DPO with reward margins as offsets (arXiv 2402.10571)",
        "sft": "supervised fine-tuning on the chosen images",
    }
    return (
        f"{_one_line(settings.model)} aligned with human preferences by "
        f"{losses[settings.loss.kind]}, {kind} of the denoiser, on {training.rows_out:,} pairs. "
        "Made by fifa-ray. The model draws what its data and its base taught it; no filter for "
        "harmful output was added."
    )


def _use(model: str, is_lora: bool, revision: str | None) -> str:
    if not is_lora:
        return (
            "```python\nfrom diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained("THIS_FOLDER")\n```'
        )
    at = f", revision={revision!r}" if revision else ""
    return (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({model!r}{at})\n"
        'pipeline.load_lora_weights("THIS_FOLDER")\n```'
    )


def _data_rows(
    training: Manifest, config: FifaConfig, manifests: Mapping[str, Manifest]
) -> dict[str, Any]:
    data = config.train.data
    rows: dict[str, Any] = {
        "dataset": config.ingest.source,
        "pairs from": data,
        "pairs learned from": f"{training.rows_out:,}",
        "pairs held out (whole prompts)": f"{training.details['validation_pairs']:,}",
    }
    selected = manifests.get("selected")
    if data != "pairs" and selected is not None:
        select = selected.config
        chosen_by = select.get("strategy") if data == "selected" else data.partition("/")[2]
        rows |= {
            "chosen by": chosen_by,
            "K": f"{select.get('selection_size', 0):,}",
            "scored pairs to choose from": f"{selected.rows_in:,}",
        }
        if chosen_by == "fifa":
            weights = ("margin_weight", "quality_weight", "diversity_weight")
            rows |= {name: select.get(name) for name in weights}
            rows["reward models"] = ", ".join(reward.kind for reward in config.rewards)
            if config.judge.enabled:
                rows["judge"] = config.judge.model
    unusable = {k: v for k, v in training.quarantined.items() if k != "held_out"}
    if unusable:
        rows["pairs left out"] = ", ".join(f"{v:,} {k}" for k, v in unusable.items())
    return rows


def _training_rows(training: Manifest, config: FifaConfig) -> dict[str, Any]:
    settings, details = config.train, training.details
    optimizer, loss = settings.optimizer, settings.loss
    rate = optimizer.learning_rate * (settings.global_batch_size if optimizer.scale_lr else 1)
    return {
        "loss": loss.kind,
        "dpo_beta (no half in front)": f"{loss.dpo_beta:g}",
        "anchor_weight": f"{loss.anchor_weight:g}",
        "optimizer": optimizer.kind,
        "learning rate": f"{rate:g}",
        "schedule": f"{optimizer.schedule} after {optimizer.warmup_steps} steps of warm-up",
        "weight decay": f"{optimizer.weight_decay:g}",
        "gradient clipping": optimizer.max_grad_norm,
        "pairs per optimizer step": settings.global_batch_size,
        "optimizer steps": f"{details['optimizer_steps']:,} of {settings.max_steps:,}"
        + (" (stopped early)" if details["stopped_early"] else ""),
        "pairs seen": f"{details['pairs_seen']:,}",
        "resolution": f"{settings.resolution} px",
        "flips": settings.random_flip,
        "prompt dropout": settings.prompt_dropout,
        "averaged weights (EMA)": settings.ema_decay or "no",
        "trained parameters": f"{details['trained_parameters']:,}",
        "compute type": details["dtype"],
        "workers": f"{details['num_workers']} x {details['device']}",
        "time in the loop": f"{details['training_seconds']:,.0f} s",
        "seed": details["seed"],
    }


def _results(training: Manifest) -> str:
    details = training.details
    lines = []
    best = details["best_validation"]
    if best is not None:
        lines.append(
            f"Implicit accuracy on {details['validation_pairs']:,} held-out pairs: "
            f"{best['implicit_accuracy']:.3f} after step {best['optimizer_step']:,}, whose weights "
            "these are (0.5 is chance, and what the base model has). The step was chosen on these "
            "same pairs, so this is a little optimistic."
        )
    else:
        lines.append("No pairs were held out; these are the weights of the last step.")
    for last in details["last"]:
        lines.append(
            f"In training, at step {last['optimizer_step']:,}: loss {last['loss']:.4f}, implicit "
            f"accuracy {last['implicit_accuracy']:.3f}."
        )
    lines.append("Images were not compared here: `fifa evaluate` does it.")
    return "\n\n".join(lines)


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])


def _cell(value: Any) -> str:
    return _one_line(str(value)).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _dump(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
