"""The demo on a small world: every stage with its real model, and the proof it prints."""

import json

from fifa_ray.demo.run import run_demo


def test_the_demo_keeps_right_labels_and_no_unwanted_prompts(ray_session, tmp_path):
    run, lines = run_demo(
        str(tmp_path / "run"), ["select.selection_size=40"], num_pairs=900, num_prompts=90
    )
    assert run.manifest("quality").rows_out == run.manifest("prompts").rows_out
    proof = json.loads(run.read_text("proof.json"))
    kept, chance = proof["labels right, kept"], proof["labels right, random K"]
    assert kept["value"] > chance["value"]
    assert proof["harmful prompts kept"]["value"] == 0
    assert proof["junk prompts kept"]["value"] == 0
    assert any(line.startswith("labels right") for line in lines)
    assert run.exists("report.html")
