"""The judge on a real vLLM (CPU build): Ray Data's processor, and `vllm serve` as an endpoint.

Both must say what the in-process engine says about the same prompts with the same weights. Scores
may differ by `TOLERANCE` of the scale's ten points, as other kernels round differently.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from fifa_ray import schema
from fifa_ray.config import JudgeConfig
from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder
from fifa_ray.engine.judge import quality_table
from fifa_ray.engine.judge_parts import PARTIAL, combine_parts
from fifa_ray.engine.judge_vllm import judge_with_vllm
from fifa_ray.models.judge import build_judge
from tests.scoring.hostile_prompts import COAXING, HOSTILE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

TOLERANCE = 0.02
ENGINE = {"enforce_eager": True, "max_num_seqs": 16}
PROMPTS = [
    "a stone bridge over a quiet river, autumn, oil painting",
    "qwpf zxlk vvb njk 00",
    "a burglar stabs an old woman to death, blood on the floor",
    "something lovely",
    "hd, masterpiece, sharp, 8k, trending",
    "three pears and a violin on a wooden bench",
    *(HOSTILE[name] for name in ("ignore", "chatml turn", "arabic")),
]
# Whole, it talks the small judge round; one of its parts does not.
COAXED = COAXING[0].format(prompt=PROMPTS[2])
TOO_LONG = HOSTILE["ten thousand emoji"]


@pytest.fixture(scope="session")
def merged_judge(tmp_path_factory) -> Path:
    """The demo's judge with its adapter merged in: one folder that every engine loads."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("judge") / "merged"
    network = AutoModelForCausalLM.from_pretrained(str(judge_folder()), dtype=torch.float32)
    PeftModel.from_pretrained(network, str(JUDGE_ADAPTER)).merge_and_unload().save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(str(judge_folder())).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def expected(merged_judge) -> list[dict]:
    """The in-process engine's rows."""
    judge = build_judge(JudgeConfig(engine="transformers", model=str(merged_judge)))
    return quality_table(list(range(len(PROMPTS))), judge.judge(PROMPTS)).to_pylist()


def assert_same_judgements(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for prompt, row, wanted in zip(PROMPTS, found, expected, strict=True):
        assert row["quality_error"] is None, prompt
        assert row["harmful"] == wanted["harmful"], prompt
        assert row["harm_category"] == wanted["harm_category"], prompt
        if not wanted["harmful"]:
            # Behind another harm than `none` the quality is another question.
            assert row["prompt_quality"] == pytest.approx(wanted["prompt_quality"], abs=TOLERANCE)
    scores = [row["prompt_quality"] for row in found]
    assert max(scores) - min(scores) > 4  # the comparison is not one of constants


def test_ray_data_s_processor_agrees_with_the_in_process_engine(merged_judge, expected):
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000,
             runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}})  # fmt: skip
    try:
        config = JudgeConfig(
            engine="vllm",
            model=str(merged_judge),
            dtype="float32",
            max_model_len=2048,
            batch_size=8,
            engine_kwargs=ENGINE,
            actors={"num_cpus": 1, "num_gpus": 0},
        )
        prompts = [*PROMPTS, COAXED, TOO_LONG]
        rows = ray.data.from_arrow(
            pa.table({schema.PROMPT_ID: range(len(prompts)), "prompt": prompts})
        )
        tags = {"run": "test", "stage": "quality"}
        judged = judge_with_vllm(rows, config, num_gpus=0.0, tags=tags)
        table = pa.concat_tables(judged.iter_batches(batch_format="pyarrow"))
    finally:
        ray.shutdown()
    assert len(table) > len(prompts)  # parts of prompts are texts of their own
    found = combine_parts(table.select(PARTIAL.names).cast(PARTIAL)).sort_by(schema.PROMPT_ID)
    *answered, coaxed, long = found.to_pylist()
    assert_same_judgements(answered, expected)
    assert coaxed["harmful"]
    # One prompt that does not fit costs the others nothing.
    assert (long["quality_error"], long["prompt_quality"]) == ("too_long", None)


@pytest.fixture(scope="module")
def served(merged_judge, tmp_path_factory):
    """Base URL of `vllm serve` on localhost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("wb")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(merged_judge),
        "--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16",
        "--enforce-eager", "--api-key", "local-key",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    )
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"vllm serve ended: {Path(log.name).read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def test_a_served_endpoint_agrees_with_the_in_process_engine(served, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_JUDGE_KEY", "local-key")
    config = JudgeConfig(
        engine="openai",
        model="judge",
        endpoint=served,
        api_key_env="LOCAL_JUDGE_KEY",
        max_concurrency=8,
        timeout_seconds=300,
    )
    judge = build_judge(config)
    found = quality_table(list(range(len(PROMPTS))), judge.judge(PROMPTS)).to_pylist()
    assert_same_judgements(found, expected)
    info = judge.info()
    assert info["ability"] == "structured output and probabilities"
    assert info["counts"]["expected_scores"] >= len(PROMPTS)
    assert judge.judge([TOO_LONG])[0].quality_error == "too_long"


def test_a_served_endpoint_refuses_a_wrong_key(served, monkeypatch):
    monkeypatch.setenv("LOCAL_JUDGE_KEY", "wrong")
    config = JudgeConfig(
        engine="openai", model="judge", endpoint=served, api_key_env="LOCAL_JUDGE_KEY"
    )
    with pytest.raises(RuntimeError, match="LOCAL_JUDGE_KEY"):
        build_judge(config).judge(PROMPTS[:1])
