"""Trains the demo judge's adapter: python -m fifa_ray.demo.train_judge OUTPUT_FOLDER

A language model of 135 million parameters cannot follow the rubric from its examples alone. As
large judges are commonly distilled into small ones, a low-rank adapter (LoRA) learns the rubric
from `judge_corpus`, through the very forward pass that the judge answers with. About 20 minutes on
one core; the loss and the accuracy on held-out prompts of the corpus are logged.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fifa_ray.demo.judge_corpus import LabelledPrompt, judge_corpus
from fifa_ray.demo.packaged import judge_folder
from fifa_ray.models.judge_transformers import JudgeTokens, judge_tokens, pack_logits, read_prefix
from fifa_ray.scoring.quality import RUBRIC_VERSION, quote_prompt

logger = logging.getLogger(__name__)


def answer_loss(
    harm: Tensor, quality: Tensor, batch: list[LabelledPrompt], tokens: JudgeTokens
) -> tuple[Tensor, float, float]:
    """Cross-entropy of both answers over the vocabulary, and the accuracy of each."""
    harm_ids = {text: token for token, text in tokens.harm_answers.items()}
    harm_targets = torch.tensor(
        [next(t for text, t in harm_ids.items() if b.harm.startswith(text)) for b in batch]
    )
    quality_ids = {text: token for token, text in tokens.quality_answers.items()}
    quality_targets = torch.tensor([quality_ids[str(b.quality)] for b in batch])
    loss = cross_entropy(harm, harm_targets) + cross_entropy(quality, quality_targets)
    return (
        loss,
        float((harm.argmax(-1) == harm_targets).float().mean()),
        float((quality.argmax(-1) == quality_targets).float().mean()),
    )


def train_adapter(
    output: Path,
    *,
    num_steps: int,
    prompts_per_step: int,
    learning_rate: float,
    lora_rank: int,
    first_layer: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Train on `num_steps * prompts_per_step` fresh prompts and save the adapter to `output`."""
    torch.manual_seed(seed)
    folder = str(judge_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    tokens = judge_tokens(tokenizer)
    lora = LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(first_layer, base.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    network = get_peft_model(base, lora)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=num_steps, pct_start=0.1
    )
    corpus = judge_corpus(num_steps * prompts_per_step, seed)

    def logits(batch: list[LabelledPrompt]) -> tuple[Tensor, Tensor]:
        quoted = [quote_prompt(labelled.text) for labelled in batch]
        ids = tokenizer(quoted, add_special_tokens=False).input_ids
        # A copy: the pack's states, with their gradients, must not outlive the step.
        return pack_logits(base, copy.deepcopy(cache), tokens, ids)

    for step in range(num_steps):
        if step % 4 == 0:  # the adapter changes the rubric's states too, slowly
            with torch.no_grad():
                cache = read_prefix(base, tokens)
        batch = corpus[step * prompts_per_step : (step + 1) * prompts_per_step]
        loss, harm_accuracy, quality_accuracy = answer_loss(*logits(batch), batch, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 5 == 0:
            logger.info(
                "step %d: loss %.3f, harm %.2f and quality %.2f right",
                step, loss.item(), harm_accuracy, quality_accuracy,
            )  # fmt: skip
        if step % 25 == 24:
            save_adapter(network, output)
    held_out = judge_corpus(200, seed + 1)
    with torch.no_grad():
        cache = read_prefix(base, tokens)
        results = [
            answer_loss(*logits(held_out[i : i + 20]), held_out[i : i + 20], tokens)
            for i in range(0, len(held_out), 20)
        ]
    figures = [sum(float(r[i]) for r in results) / len(results) for i in range(3)]
    logger.info("held out: loss %.3f, harm %.3f and quality %.3f right", *figures)
    save_adapter(network, output)


def save_adapter(network: PeftModel, output: Path) -> None:
    """Write the adapter in half precision, without the base model's path on this machine."""
    halves = {name: w.half() for name, w in network.state_dict().items() if "lora_" in name}
    network.save_pretrained(str(output), state_dict=halves)
    config = output / "adapter_config.json"
    values = json.loads(config.read_text())
    values["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    (output / "rubric_version").write_text(f"{RUBRIC_VERSION}\n")
    (output / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours stands beside it


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--num-steps", default=120, show_default=True)
@click.option("--prompts-per-step", default=16, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--lora-rank", default=8, show_default=True)
@click.option("--first-layer", default=12, show_default=True, help="Layers below stay as they are.")
@click.option("--bfloat16/--float32", default=False, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, bfloat16: bool, **settings: float) -> None:
    """Train the demo judge's adapter and save it to OUTPUT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    train_adapter(output, dtype=dtype, **settings)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
