"""Prompt sets: every format gives the same list, and every mistake says where it is."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa_ray import schema
from fifa_ray.run_dir import resolve_filesystem
from fifa_ray.sources.prompt_sets import (
    PROMPT_SET,
    prompt_table,
    read_prompt_set,
    sample_prompts,
    seeded_rank,
)

ROWS = [
    ("a red cat", "animals"),
    ('say "hi", <b>bold</b>', "text"),
    ("", None),
    ("very long " * 300, "text"),
    ("قطة صغيرة 🎨", "animals"),
]


@pytest.fixture(params=[".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def listed(request, tmp_path):
    path = tmp_path / f"prompts{request.param}"
    objects = [{"Prompt": p, "category": c, "id": 7} for p, c in ROWS]
    frame = pd.DataFrame(objects)
    if request.param == ".jsonl":
        path.write_text("\n".join(map(json.dumps, objects)) + "\n\n")
    elif request.param == ".json":
        path.write_text(json.dumps(objects))
    elif request.param == ".parquet":
        pq.write_table(pa.Table.from_pandas(frame), path)
    else:
        frame.to_csv(path, index=False, sep="," if request.param == ".csv" else "\t")
    return path


def test_every_format_gives_the_same_prompts_in_order(listed):
    table = read_prompt_set(str(listed))
    assert table.schema == PROMPT_SET
    texts = [schema.normalize_prompt(prompt) for prompt, _ in ROWS]
    assert table.column("prompt").to_pylist() == texts
    assert table.column("category").to_pylist() == [category for _, category in ROWS]
    assert table.column("prompt_id").to_pylist() == [schema.prompt_id(text) for text in texts]


def test_text_has_a_prompt_a_line_and_repetitions_count_once(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n\n  two   dogs \nA CAT\na cat\na\x0cb\n")
    table = read_prompt_set(str(path))
    assert table.column("prompt").to_pylist() == ["a cat", "two dogs", "A CAT", "a b"]
    assert table.column("category").null_count == 4


def test_bare_strings_are_prompts(tmp_path):
    (tmp_path / "p.json").write_text('["a cat", {"prompt": "a dog", "CATEGORY": " pets "}]')
    table = read_prompt_set(str(tmp_path / "p.json"))
    assert table.to_pydict()["category"] == [None, "pets"]


def test_a_prompt_set_comes_from_an_object_store_too(s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    uri = f"s3://data/list.txt?endpoint_override={s3_endpoint}&scheme=http&region=us-east-1"
    filesystem, path = resolve_filesystem(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(b"a cat\na dog\n")
    assert read_prompt_set(uri).column("prompt").to_pylist() == ["a cat", "a dog"]
    with pytest.raises(FileNotFoundError, match=r"data/absent\.csv"):
        read_prompt_set(uri.replace("list.txt", "absent.csv"))


def test_the_packaged_list_is_distinct_and_categorised():
    table = read_prompt_set("general")
    assert 55 <= len(table) <= 80
    assert table.column("category").null_count == 0
    counts = table.column("category").value_counts().to_pylist()
    assert len(counts) >= 7
    assert min(entry["counts"] for entry in counts) >= 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text,category\na cat,x\n", r"expected a column prompt .* found \['category'"),
        ("p.csv", "", "expected a column prompt .* found none"),
        ("p.csv", 'prompt\n"a cat', "after line 1: unexpected end of data"),
        ("p.csv", "category,prompt\nx\n", "line 2: expected a prompt that is text, found NoneType"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt":\n', "line 2 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 4}\n', "line 3: expected a prompt that is text"),
        ("p.jsonl", '{"prompt": "a", "category": [1]}', "line 1: expected a category that is text"),
        ("p.jsonl", "[1]", "line 1: expected an object with a prompt, or a string"),
        ("p.json", '{"prompt": "a"}', "expected a list of prompts, found dict"),
        ("p.json", '[{"caption": "a"}]', r"entry 0: expected a column prompt .* \['caption'\]"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfea\x00", "is not UTF-8 text"),
        ("p.parquet", "no parquet", "is not a parquet file"),
        ("p.docx", "x", "expected held_out, general, or a file that ends in .txt"),
    ],
)
def test_mistakes_say_where_and_what(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_prompt_set(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no .*absent\.txt"):
        read_prompt_set(str(tmp_path / "absent.txt"))


def test_a_sample_keeps_its_order_and_grows_by_nesting():
    table = prompt_table([(f"row {i}", f"prompt {i}", None) for i in range(400)], "here")
    small, large = (
        sample_prompts(table, count, 3).column("prompt").to_pylist() for count in (20, 90)
    )
    assert (len(small), len(large)) == (20, 90)
    assert set(small) < set(large)
    assert large == sorted(large, key=lambda text: int(text.split()[1]))
    other_seed = sample_prompts(table, 20, 4).column("prompt").to_pylist()
    assert set(other_seed) != set(small)
    # Taking other prompts out of the list takes nothing but them out of the sample.
    rest = table.filter(pa.array([text not in small[:5] for text in table["prompt"].to_pylist()]))
    assert set(small[5:]) < set(sample_prompts(rest, 20, 3).column("prompt").to_pylist())
    assert sample_prompts(table, None, 3) is table


def test_ranks_are_uniform_for_ids_of_any_kind():
    for ids in (np.arange(40_000), np.arange(-(2**62), 2**62, 2**48)[:40_000]):
        for seed in (0, 1, 2**63):
            shares = np.histogram(seeded_rank(ids, seed) / 2.0**64, 10, (0, 1))[0] / len(ids)
            assert shares == pytest.approx(np.full(10, 0.1), abs=0.012)
