"""The evaluation from prompts to win rates, on tiny random pipelines."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_run import (
    PROMPTS,
    evaluate_config,
    publish_training,
    save_base,
    save_full,
)

from fifa_ray.engine.evaluate import run_evaluate
from fifa_ray.run_dir import RunDir


class Brightness:
    """A scorer that anyone can recompute: the mean of all pixels, 0 to 1."""

    version = "1"

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return np.array([np.asarray(image, np.float64).mean() / 255 for image in images])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": prompt, "category": category} for prompt, category in PROMPTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def run(ray_session, base, prompt_file, tmp_path_factory):
    run = RunDir(str(tmp_path_factory.mktemp("run")))
    save_full(base, Path(run.path("training", "dpo", "model")))
    publish_training(run, base, "dpo")
    config = evaluate_config(run, base, prompts=prompt_file, images_per_prompt=2)
    run_evaluate(run, config, {"brightness": Brightness()})
    return run


def test_slice(run):
    print(json.dumps(json.loads(run.read_text("evaluation", "results.json")), indent=1)[:3000])
    print(run.manifests().keys())
