"""The judge study: whom it samples and what its table says."""

import pandas as pd
import pytest

from fifa_ray import schema
from fifa_ray.run_dir import RunDir
from jobs.judge_study import sample_prompts, study_table, write_prompts


def write_labelled(folder, **columns):
    rows = [
        {"prompt": f"bad {i}", "source": "i", "categories": "a, b" if i % 2 else "a", "hard": i < 5}
        for i in range(20)
    ]
    rows += [
        {"prompt": f"{source} {i}", "source": source, "categories": "", "hard": None}
        for source, count in (("many", 500), ("few", 40))
        for i in range(count)
    ]
    rows.append({"prompt": " bad  3 ", "source": "many", "categories": "", "hard": None})
    file = folder / "prompts.parquet"
    pd.DataFrame(rows).to_parquet(file)
    return file


def test_sample_is_seeded_distinct_and_even_over_ordinary_sources(tmp_path):
    file = write_labelled(tmp_path)
    sample = sample_prompts(file, 30, seed=1)
    assert sample.equals(sample_prompts(file, 30, seed=1))
    assert set(sample.prompt) != set(sample_prompts(file, 30, seed=2).prompt)
    assert sample.prompt_id.is_unique
    ordinary = sample[~sample.labelled]
    assert ordinary.source.value_counts().to_dict() == {"many": 15, "few": 15}
    # The unlabelled repeat of a labelled prompt does not count as ordinary.
    assert sample.labelled.sum() == 20
    assert "bad 3" not in set(ordinary.prompt)


def test_prompts_are_left_as_ingest_leaves_them(tmp_path):
    sample = sample_prompts(write_labelled(tmp_path), 10, seed=0)
    run = RunDir(str(tmp_path / "run"))
    write_prompts(run, sample)
    table = run.read_table("prompts")
    assert table.schema.names == schema.PROMPTS.names
    ids = table["prompt_id"].to_pylist()
    assert ids == sorted(sample.prompt_id)
    assert run.manifest("prompts").rows_out == len(sample)
    write_prompts(run, sample)  # complete: left as it is
    assert run.read_table("prompts").equals(table)


def test_table_gives_the_shares_of_each_group():
    judged = pd.DataFrame(
        {
            "prompt_id": range(8),
            "labelled": [True] * 4 + [False] * 4,
            "hard": [True, False, False, False] + [False] * 4,
            "source": ["i"] * 4 + ["x", "x", "y", "y"],
            "categories": ["a", "a, b", "b", "b"] + [""] * 4,
            "flagged": [True, True, False, True, True, False, False, False],
            "prompt_quality": [1.0, 2.0, None, 3.0, 5.0, 5.0, 6.0, 8.0],
            "quality_error": [None, None, "timeout", None] + [None] * 4,
        }
    )
    table = study_table(judged).set_index("group")
    assert table.flagged.to_dict() == {
        "harmful, all": "75.0%",
        "harmful, hard": "100.0%",
        "harmful, not hard": "66.7%",
        "harmful, a": "100.0%",
        "harmful, b": "66.7%",
        "ordinary, all": "25.0%",
        "ordinary, x": "50.0%",
        "ordinary, y": "0.0%",
    }
    assert table.prompts["harmful, b"] == 3
    assert table["no answer"]["harmful, all"] == 1
    assert table.quality["ordinary, y"] == "7.00"


def test_a_missing_column_is_named(tmp_path):
    file = tmp_path / "prompts.parquet"
    pd.DataFrame({"prompt": ["a"], "source": ["b"]}).to_parquet(file)
    with pytest.raises(ValueError, match="categories"):
        sample_prompts(file, 10, seed=0)
