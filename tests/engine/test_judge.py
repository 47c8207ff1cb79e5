"""The judge stage on a local Ray: one row per prompt, a cache that never pays twice, no secrets."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from fifa_ray import schema
from fifa_ray.config import FifaConfig, load_config
from fifa_ray.demo.packaged import JUDGE_ADAPTER, judge_folder
from fifa_ray.engine.judge import answers_key, run_judge
from fifa_ray.models.judge_openai import PROBE_PROMPT
from fifa_ray.run_dir import Manifest, RunDir
from tests.models.endpoint import Endpoint, Reply
from tests.scoring.hostile_prompts import HOSTILE

SECRET = "sk-another-secret-456"


def make_run(folder: Path, prompts: list[str], parts: int = 2) -> RunDir:
    """A run whose prompts/ table is complete."""
    run = RunDir(str(folder))
    texts = sorted(set(prompts), key=schema.prompt_id)
    size = -(-len(texts) // parts)
    for index in range(parts):
        part = texts[index * size : (index + 1) * size]
        columns = {
            schema.PROMPT_ID: [schema.prompt_id(text) for text in part],
            "prompt": part,
            "num_pairs": [1] * len(part),
        }
        run.write_table(
            pa.table(columns, schema=schema.PROMPTS), "prompts", f"part-{index:06d}.parquet"
        )
    run.publish(Manifest(stage="prompts", fingerprint="p", rows_in=len(texts), rows_out=len(texts)))
    return run


def config_for(run: RunDir, url: str, **judge) -> FifaConfig:
    settings = {
        "engine": "openai",
        "model": "m",
        "endpoint": url,
        "api_key_env": "TEST_JUDGE_KEY",
        "max_retries": 1,
        "max_concurrency": 4,
        "options": {"first_wait_seconds": 0.01},
    }
    return load_config(
        {"run_dir": run.uri, "ingest": {"source": "unused"}, "judge": settings | judge}
    )


def answer(prompt: str, attempt: int) -> Reply:
    """The server's judgement: by the length of the prompt; `bad` prompts get none."""
    text = json.loads(prompt)
    if text.startswith("bad"):
        return Reply(status=500)
    harm = "violence" if "knife" in text else "none"
    return Reply(json.dumps({"harm": harm, "quality": len(text) % 10}))


def asked_for(endpoint: Endpoint) -> set[str]:
    return {json.loads(quoted) for quoted in endpoint.asked} - {PROBE_PROMPT}


def rows_by_prompt(run: RunDir) -> dict[str, dict]:
    prompts = run.read_table("prompts").to_pylist()
    rows = {row[schema.PROMPT_ID]: row for row in run.read_table("quality").to_pylist()}
    return {row["prompt"]: rows[row[schema.PROMPT_ID]] for row in prompts}


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)


def test_every_prompt_gets_its_row_and_failures_their_reason(ray_session, tmp_path):
    prompts = [f"prompt {'x' * i}" for i in range(30)] + ["a knife", "bad one", "bad two"]
    run = make_run(tmp_path / "run", prompts)
    with Endpoint(answer) as endpoint:
        manifest = run_judge(run, config_for(run, endpoint.url))
    rows = rows_by_prompt(run)
    assert manifest.rows_in == manifest.rows_out == 33
    for prompt, row in rows.items():
        if prompt.startswith("bad"):
            assert row["quality_error"] == "server_error"
            assert row["prompt_quality"] is None
            assert row["harmful"] is None
        else:
            assert row["prompt_quality"] == pytest.approx(len(prompt) % 10 * 10 / 9, rel=1e-6)
            assert row["harmful"] == (prompt == "a knife")
            assert row["quality_error"] is None
    assert rows["a knife"]["harm_category"] == "violence"
    assert run.read_table("quality").schema.equals(schema.QUALITY)
    # Parts are aligned with those of prompts/.
    for part in run.list("prompts"):
        ids = run.read_table("prompts", part).column(schema.PROMPT_ID)
        assert run.read_table("quality", part).column(schema.PROMPT_ID).equals(ids)
    assert manifest.details["errors"] == {"server_error": 2}
    assert manifest.details["harmful"] == 1
    assert manifest.details["model"]["ability"] == "structured output and probabilities"


def test_no_file_of_the_run_holds_the_key(ray_session, tmp_path):
    run = make_run(tmp_path / "run", ["a boat", "bad"])
    with Endpoint(answer) as endpoint:
        run_judge(run, config_for(run, endpoint.url, cache_dir=str(tmp_path / "cache")))
        assert endpoint.keys == {f"Bearer {SECRET}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".json" for path in files)
    assert all(SECRET.encode() not in path.read_bytes() for path in files)


def test_a_second_run_and_a_second_dataset_never_pay_twice(ray_session, tmp_path):
    cache = str(tmp_path / "cache")
    first = make_run(tmp_path / "first", ["a", "bb", "ccc", "bad one"])
    second = make_run(tmp_path / "second", ["bb", "ccc", "dddd", "bad one"], parts=1)
    with Endpoint(answer) as endpoint:
        run_judge(first, config_for(first, endpoint.url, cache_dir=cache))
        assert asked_for(endpoint) == {"a", "bb", "ccc", "bad one"}
        endpoint.asked.clear()
        # The same stage again: complete, nothing is asked.
        run_judge(first, config_for(first, endpoint.url, cache_dir=cache))
        assert not endpoint.asked
        # Another dataset: what is new, and what failed before.
        manifest = run_judge(second, config_for(second, endpoint.url, cache_dir=cache))
        assert asked_for(endpoint) == {"dddd", "bad one"}
        assert manifest.details["rows_reused"] == 2
        assert rows_by_prompt(second)["bb"]["prompt_quality"] == pytest.approx(20 / 9, rel=1e-6)
        # Another model: other answers.
        endpoint.asked.clear()
        run_judge(second, config_for(second, endpoint.url, cache_dir=cache, model="other"))
        assert len(asked_for(endpoint)) == 4


def test_an_error_is_asked_again_and_the_good_answer_wins(ray_session, tmp_path):
    cache = str(tmp_path / "cache")
    run = make_run(tmp_path / "run", ["bad at first", "fine"])
    with Endpoint(answer) as endpoint:
        run_judge(run, config_for(run, endpoint.url, cache_dir=cache))
    assert rows_by_prompt(run)["bad at first"]["quality_error"] == "server_error"
    with Endpoint(lambda *_: Reply()) as endpoint:
        again = make_run(tmp_path / "again", ["bad at first", "fine"])
        # The endpoint is part of the key; here it is the same server come back on another port.
        config = config_for(again, endpoint.url, cache_dir=cache)
        old = tmp_path / "cache" / answers_key(config_for(run, "http://x/v1").judge)
        assert not old.exists()
        (folder,) = (tmp_path / "cache").iterdir()
        folder.rename(tmp_path / "cache" / answers_key(config.judge))
        run_judge(again, config)
        assert asked_for(endpoint) == {"bad at first"}
    rows = rows_by_prompt(again)
    assert rows["bad at first"]["quality_error"] is None
    assert rows["bad at first"]["prompt_quality"] == pytest.approx(80 / 9, rel=1e-6)


def test_the_key_of_answers_covers_what_they_depend_on(tmp_path):
    def key(**judge) -> str:
        settings = {"engine": "transformers", "model": "m"} | judge
        return answers_key(
            load_config({"run_dir": "r", "ingest": {"source": "s"}, "judge": settings}).judge
        )

    assert key() == key(batch_size=7, max_retries=9, timeout_seconds=1, cache_dir="x")
    different = [
        key(),
        key(model="n"),
        key(engine="vllm"),
        key(max_prompt_chars=100),
        key(harmful_threshold=0.4),
        key(options={"adapter": "x"}),
    ]
    assert len(set(different)) == len(different)
    # A folder counts by its content, wherever it lies.
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text)
    a, b, c = (key(model=str(tmp_path / name)) for name in "abc")
    assert a == b != c


def test_the_stage_needs_prompts_and_says_so(ray_session, tmp_path):
    run = RunDir(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="ingest"):
        run_judge(run, config_for(run, "http://localhost:1/v1"))


def test_a_small_model_in_process_judges_hostile_prompts_on_two_actors(ray_session, tmp_path):
    names = ("ignore", "json close", "chatml turn", "zero width", "emoji", "arabic", "one letter")
    prompts = ["a red barn in a wheat field, oil painting", *(HOSTILE[name] for name in names)]
    run = make_run(tmp_path / "run", prompts)
    judge = {
        "engine": "transformers",
        "model": str(judge_folder()),
        "batch_size": 4,
        "options": {"adapter": str(JUDGE_ADAPTER)},
        "actors": {"min_actors": 1, "max_actors": 2, "num_gpus": 0},
    }
    config = load_config({"run_dir": run.uri, "ingest": {"source": "unused"}, "judge": judge})
    manifest = run_judge(run, config)
    rows = rows_by_prompt(run)
    assert len(rows) == len(prompts)
    assert all(row["quality_error"] is None for row in rows.values())
    assert rows[prompts[0]]["prompt_quality"] > 7
    assert manifest.details["model"]["dtype"] == "float32"
