"""The summary in a terminal: right counts, nothing that a terminal would obey."""

import pytest
from synthetic_run import HARMFUL_PROMPT, REASONS

from fifa_ray.report.inspect import plain, summarize_run
from fifa_ray.run_dir import RunDir


def test_summary_has_stages_reasons_and_prompts(run):
    text = summarize_run(run, width=120)
    for stage, manifest in run.manifests().items():
        (line,) = [x for x in text.splitlines() if x.split()[:1] == [stage] and "," in x + ","][:1]
        assert f"{manifest.rows_in:,}" in line
        assert f"{manifest.rows_out:,}" in line
    for reason, count in REASONS.items():
        assert any(x.split() == ["pairs", reason, f"{count:,}"] for x in text.splitlines())
    for title in ("Terms", "Best pairs", "Just missed"):
        assert title in text
    assert HARMFUL_PROMPT not in text
    assert "\x1b" not in text


def test_lines_fit_the_width(run):
    assert max(len(line) for line in summarize_run(run, width=90).splitlines()) <= 90


def test_colour_is_there_when_asked_for(run):
    assert "\x1b[1m" in summarize_run(run, color=True)


def test_what_is_missing_is_said(tmp_path):
    text = summarize_run(RunDir(str(tmp_path)))
    assert "not complete: pairs, prompts, rewards" in text
    for name in ("Quarantine: empty", "scored_sample/", "selected/", "gallery/"):
        assert name in text


@pytest.mark.parametrize(
    "hostile",
    [
        "\x1b[2J\x1b]0;owned\x07cat",
        "\x9b31mcat",
        "ca\u202et\u2066",
        "c\x00a\x08t\r\n",
        "[red]cat[/]",
    ],
)
def test_control_and_direction_characters_never_reach_the_terminal(hostile):
    shown = plain(hostile)
    assert not set(shown) & set("\x1b\x9b\x07\x00\x08\r\n\u202e\u2066")
    assert "t" in shown


def test_markup_and_escapes_in_prompts_stay_text(run_copy):
    import pyarrow as pa

    table = run_copy.read_table("gallery")
    prompts = ["[bold]x[/bold] \x1b[31mred :smile:"] * len(table)
    position = table.schema.get_field_index("prompt")
    table = table.set_column(position, "prompt", pa.array(prompts))
    run_copy.write_table(table, "gallery", "part-000000.parquet")
    text = summarize_run(run_copy, width=140)
    assert "[bold]x[/bold] [31mred :smile:" in text
