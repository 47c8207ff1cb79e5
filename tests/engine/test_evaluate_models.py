"""Which models are compared and on which prompts, and what is said when they are not there."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from evaluation_run import evaluate_config, publish_training, save_base, save_full, save_lora

from fifa_ray import schema
from fifa_ray.config import ConfigError, load_config
from fifa_ray.engine.evaluate import run_evaluate
from fifa_ray.engine.evaluate_models import EvaluatedModel, resolve_models
from fifa_ray.engine.evaluate_prompts import held_out_prompts, image_rows, image_seed, run_prompts
from fifa_ray.engine.evaluate_results import read_results
from fifa_ray.engine.evaluate_scorers import resolve_scorers
from fifa_ray.models.image_generator import GeneratorWeights
from fifa_ray.run_dir import Manifest, RunDir, part_name
from fifa_ray.sources.prompt_sets import prompt_table

COLORS = ("red", "blue", "old", "tiny")
THINGS = ("cat", "dog", "house", "boat", "piano", "tree", "lamp", "hat", "shoe", "cup")
PROMPTS = [f"a {color} {thing}" for color in COLORS for thing in THINGS]
IDS = {text: schema.prompt_id(text) for text in PROMPTS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run with a complete full training `dpo`, a LoRA one, and one that has not finished."""
    run = RunDir(str(tmp_path_factory.mktemp("trained") / "run"))
    save_full(base, Path(run.path("training", "dpo", "model")))
    publish_training(run, base, "dpo")
    save_lora(base, Path(run.path("training", "lora", "model")))
    publish_training(run, base, "lora", lora={"rank": 2})
    run.write_text("{}", "training", "half", "metrics.jsonl")
    return run


def models(run, base, *trainings, **settings):
    return resolve_models(run, evaluate_config(run, base, trainings=trainings, **settings))


def test_trainings_of_the_run_and_their_base(trained, base):
    dpo, lora, start = models(trained, base, "dpo", "lora")
    assert [(m.name, m.kind) for m in (dpo, lora, start)] == [
        ("dpo", "full"), ("lora", "lora"), ("base", "base"),
    ]  # fmt: skip
    assert dpo.weights("") == GeneratorWeights(trained.path("training", "dpo", "model"))
    adapters = trained.path("training", "lora", "model")
    assert lora.weights("") == GeneratorWeights(str(base), lora=adapters)
    assert start.weights("") == GeneratorWeights(str(base))
    assert dpo.resolution == 16
    assert len({m.identity for m in (dpo, lora, start)}) == 3
    # The base is what the training began from, whatever the configuration says now.
    elsewhere = evaluate_config(trained, Path("/another/model"), trainings=["dpo"])
    assert resolve_models(trained, elsewhere)[-1] == start


def test_models_from_elsewhere(ray_session, trained, base, tmp_path):
    other = RunDir(str(tmp_path / "other run"))
    save_full(base, Path(other.path("training", "dpo", "model")), scale=0.8)
    publish_training(other, base, "dpo", seed=4)
    pipeline = save_full(base, tmp_path / "Some Pipeline")
    adapters = save_lora(base, tmp_path / "adapters")
    folder = other.path("training", "dpo")
    found = models(trained, base, "dpo", folder, f"again={folder}/model/", str(pipeline),
                   f"lora-2={adapters}")  # fmt: skip
    assert [m.name for m in found] == [
        "dpo", "other-run.dpo", "again", "some-pipeline", "lora-2", "base",
    ]  # fmt: skip
    assert [m.kind for m in found] == ["full", "full", "full", "full", "lora", "base"]
    assert found[1].identity == found[2].identity
    assert found[1].trained_on[0].root == other.root
    assert found[4].weights("") == GeneratorWeights(str(base), lora=str(adapters))
    # A folder without a manifest is told apart by its files.
    (pipeline / "unet" / "config.json").write_text("{}")
    assert models(trained, base, "dpo", str(pipeline))[1].identity != found[3].identity


def test_remote_weights_are_copied_where_they_are_needed(s3_endpoint, base, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    uri = f"s3://data/evaluated?endpoint_override={s3_endpoint}&scheme=http&region=us-east-1"
    store = RunDir(uri)
    for file in base.rglob("*.json"):
        store.write_text(file.read_text(), *file.relative_to(base).parts)
    model = EvaluatedModel("far", "full", uri, "x", GeneratorWeights("unused"), 16)
    folder = Path(model.weights(str(tmp_path)).model)
    assert folder.parent == tmp_path
    assert {f.relative_to(folder) for f in folder.rglob("*.json")} == {
        f.relative_to(base) for f in base.rglob("*.json")
    }


@pytest.mark.parametrize(
    ("trainings", "message"),
    [
        (["dpi"], r"no complete training 'dpi'; complete are: dpo, lora; did you mean dpo\?.*"
         r"train.name=dpi"),
        (["half"], "no complete training 'half' .it has not finished.*complete are: dpo, lora"),
        (["dpo", "dpo"], "names must differ .* LABEL=FOLDER"),
        (["base=./x"], "holds no model; expected the name of a training of this run, a folder"),
        (["/nowhere/training/dpo"], "/nowhere/training/dpo holds no model"),
    ],
)  # fmt: skip
def test_models_that_are_not_there(ray_session, trained, base, trainings, message):
    with pytest.raises(ConfigError, match=message):
        models(trained, base, *trainings)


def test_an_unfinished_training_elsewhere_is_refused(trained, base, tmp_path):
    save_full(base, tmp_path / "run" / "training" / "dpo" / "model")
    with pytest.raises(ConfigError, match="is not complete: it has no manifest in its run"):
        models(trained, base, str(tmp_path / "run" / "training" / "dpo"))


def test_no_training_at_all(ray_session, base, tmp_path):
    run = RunDir(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no complete training 'dpo'; there is none yet\. Run"):
        models(run, base, "dpo")
    with pytest.raises(FileNotFoundError, match="run `fifa evaluate` first"):
        read_results(run)


def test_settings_that_cannot_be_used_are_said_before_any_work(ray_session, trained, base):
    config = evaluate_config(trained, base, rewards=["tny"], prompts="general")
    with pytest.raises(ConfigError, match=r"no reward is named 'tny'; .*did you mean tiny\?"):
        run_evaluate(trained, config)
    with pytest.raises(ConfigError, match="nothing scores the images"):
        run_evaluate(trained, evaluate_config(trained, base, rewards=[], prompts="general"))
    config = evaluate_config(trained, base, resolution=20, prompts="general")
    with pytest.raises(ConfigError, match="multiple of 8 pixels, got 20"):
        run_evaluate(trained, config)
    config = evaluate_config(trained, base, prompts="general")
    with pytest.raises(ConfigError, match=r"names of their own; .'tiny'. are rewards"):
        run_evaluate(trained, config, {"tiny": object()})
    with pytest.raises(ConfigError, match="a scorer's name must match"):
        run_evaluate(trained, config, {"../x": object()})
    assert not trained.exists("evaluation")
    with pytest.raises(ConfigError, match="reward names must differ"):
        evaluate_config(trained, base, extra_rewards=[{"name": "tiny", "kind": "clip_score"}])
    with pytest.raises(ConfigError, match=r"evaluate\.trainings"):
        evaluate_config(trained, base, trainings=[])


def test_a_filtering_reward_under_another_name_is_not_independent(trained, base):
    weights = load_config(evaluate_config(trained, base).model_dump()).rewards[0].weights
    again = {"name": "again", "kind": "pickscore", "weights": weights}
    fitted = {"name": "fit", "kind": "fitted"}
    config = evaluate_config(trained, base, extra_rewards=[again])
    scorers = resolve_scorers(trained, config, {"truth": object()})
    assert [(scorer.name, scorer.took_part) for scorer in scorers] == [
        ("tiny", True), ("again", True), ("truth", False),
    ]  # fmt: skip
    unused = config.rewards[0].model_copy(update={"vote_weight": 0.0})
    scorers = resolve_scorers(trained, config.model_copy(update={"rewards": (unused,)}), {})
    assert not any(scorer.took_part for scorer in scorers)
    config = evaluate_config(trained, base, extra_rewards=[fitted])
    with pytest.raises(ConfigError, match="'fit' of kind fitted is not fitted yet"):
        resolve_scorers(trained, config, {})


# Prompts


def write_dataset(folder, *, seen=(), baseline=(), harmful=(), poor=(), unrated=()) -> RunDir:
    """Prompts in two parts with ratings, and the prompts of a selection and of a baseline."""
    run = RunDir(str(folder))
    ordered = sorted(PROMPTS, key=IDS.__getitem__)
    for place, rows in enumerate((ordered[:15], ordered[15:])):
        ids = [IDS[text] for text in rows]
        table = pa.table([ids, rows, [1] * len(rows)], schema=schema.PROMPTS)
        run.write_table(table, "prompts", part_name(place))
        quality = [None if t in unrated else 3.0 if t in poor else 7.0 for t in rows]
        flags = [None if t in unrated else t in harmful for t in rows]
        none = [None] * len(rows)
        rated = pa.table([ids, quality, flags, none, none, none], schema=schema.QUALITY)
        run.write_table(rated, "quality", part_name(place))
    for stage in ("prompts", "quality"):
        run.publish(Manifest(stage=stage, fingerprint=stage, rows_in=40, rows_out=40))
    for texts, parts in ((seen, ("selected",)), (baseline, ("baselines", "random"))):
        table = pa.table({"prompt_id": pa.array([IDS[t] for t in texts], pa.int64())})
        run.write_table(table, *parts, part_name(0))
    return run


def held_out(run, base, trained_on=(), min_quality=None, **settings):
    config = evaluate_config(run, base, prompts="held_out", **settings)
    select = config.select.model_copy(update={"min_quality": min_quality})
    found = [
        EvaluatedModel(f"m{i}", "full", "x", "x", GeneratorWeights("x"), 16, of)
        for i, of in enumerate(trained_on)
    ]
    return held_out_prompts(run, config.model_copy(update={"select": select}), found)


def test_held_out_prompts_are_unseen_harmless_and_good(base, tmp_path):
    groups = {"seen": PROMPTS[:9], "baseline": PROMPTS[7:14], "harmful": PROMPTS[14:16],
              "poor": PROMPTS[16:19], "unrated": PROMPTS[19:20]}  # fmt: skip
    run = write_dataset(tmp_path, **groups)
    table = held_out(run, base, min_quality=5.0)
    assert set(table.column("prompt").to_pylist()) == set(PROMPTS[20:])
    assert set(held_out(run, base)["prompt"].to_pylist()) == set(PROMPTS[16:19] + PROMPTS[20:])
    # Those of a training's own table too, wherever its run is.
    other = RunDir(str(tmp_path / "other"))
    rows = {"prompt_id": [IDS[PROMPTS[20]], IDS[PROMPTS[21]]], "split": ["train", "validation"]}
    other.write_table(pa.table(rows), "training/x/pairs", part_name(0))
    table = held_out(run, base, [(other, "training/x"), (other, "training/absent")], 5.0)
    assert set(table.column("prompt").to_pylist()) == set(PROMPTS[22:])


def test_a_sample_of_held_out_prompts_does_not_depend_on_parts(base, tmp_path):
    run = write_dataset(tmp_path / "two")
    one = RunDir(str(tmp_path / "one"))
    shutil.copytree(run.root, one.root)
    for table in ("prompts", "quality"):
        whole = run.read_table(table)
        one.remove(table)
        one.write_table(whole, table, part_name(0))
    few, same = (held_out(r, base, num_prompts=12) for r in (run, one))
    assert few.equals(same)
    assert len(few) == 12
    more = held_out(run, base, num_prompts=20)
    assert more.slice(0, 12).equals(few)


def test_when_no_prompt_is_left_it_says_why(base, tmp_path):
    run = write_dataset(tmp_path, seen=PROMPTS[:30], harmful=PROMPTS[30:])
    with pytest.raises(ConfigError, match="of 40, selections and trainings have 30, and 10 are"):
        held_out(run, base)
    with pytest.raises(ConfigError, match=r"no complete prompts/ table .*run `fifa filter`"):
        held_out(RunDir(str(tmp_path / "empty")), base)


def test_seeds_depend_on_the_run_the_prompt_and_the_number_alone():
    few = prompt_table([("", text, None) for text in PROMPTS[:3]], "here")
    many = prompt_table([("", text, None) for text in reversed(PROMPTS)], "here")
    seeds = {(r["prompt"], r["image_index"]): r["image_seed"]
             for r in image_rows(many, 4, 1).to_pylist()}  # fmt: skip
    assert len(set(seeds.values())) == 4 * len(PROMPTS)
    for row in image_rows(few, 2, 1).to_pylist():
        assert row["image_seed"] == seeds[row["prompt"], row["image_index"]]
        assert row["image_seed"] == image_seed(1, row["prompt_id"], row["image_index"])
        assert row["image_seed"] != image_seed(2, row["prompt_id"], row["image_index"])
    assert min(seeds.values()) >= 0
    assert np.mean(list(seeds.values())) / 2**63 == pytest.approx(0.5, abs=0.1)


def test_the_prompt_table_is_written_again_only_when_it_changes(base, tmp_path):
    run = write_dataset(tmp_path, seen=PROMPTS[:5])
    first = run_prompts(run, evaluate_config(run, base, prompts="held_out"), [])
    again = run_prompts(run, evaluate_config(run, base, prompts="held_out"), [])
    assert again == first
    general = run_prompts(run, evaluate_config(run, base, prompts="general"), [])
    assert general.fingerprint != first.fingerprint
    assert re.fullmatch("[0-9a-f]{24}", general.fingerprint)
    table = run.read_table("evaluation", "prompts")
    assert table.schema.equals(schema.EVALUATION_PROMPTS)
    assert table.column("category").null_count == 0
    assert table.column("image_id").to_pylist() == list(range(len(table)))
