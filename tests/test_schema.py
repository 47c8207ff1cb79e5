"""Ids and text normalisation: what every table is keyed by."""

import unicodedata

import numpy as np
import pytest

from fifa_ray import schema


def test_pair_ids_sort_like_the_source_and_are_distinct():
    rows = np.repeat(np.arange(1000), 3)
    pairs = np.tile(np.arange(3), 1000)
    ids = np.concatenate([schema.make_pair_id(f, rows, pairs) for f in (0, 1, 7)])
    assert (np.diff(ids) > 0).all()
    assert ids.dtype == np.int64


def test_pair_ids_of_the_largest_source_stay_positive():
    last = schema.make_pair_id(
        schema.MAX_FILES - 1, [schema.MAX_ROWS_PER_FILE - 1], schema.MAX_PAIRS_PER_ROW - 1
    )
    assert last[0] == (1 << 62) - 1


@pytest.mark.parametrize(
    ("file_index", "row", "pair"),
    [(schema.MAX_FILES, 0, 0), (0, schema.MAX_ROWS_PER_FILE, 0), (0, 0, schema.MAX_PAIRS_PER_ROW)],
)
def test_what_an_id_cannot_hold_is_refused(file_index, row, pair):
    with pytest.raises(ValueError, match="expected fewer than"):
        schema.make_pair_id(file_index, [row], pair)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("  a  red\tballoon\n", "a red balloon"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x1b[31mc", "ab[31mc"),
        ("\ud800broken", "broken"),
        ("👩\u200d🚀 flying", "👩\u200d🚀 flying"),
        (" \t\n", ""),
    ],
)
def test_normalised_prompts(raw, normal):
    assert schema.normalize_prompt(raw) == normal
    assert schema.normalize_prompt(normal) == normal


def test_every_character_is_kept_or_dropped_by_its_category():
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        raw = f"a{chr(code)}b"
        if chr(code).isspace():
            expected = "a b"
        elif category in ("Cc", "Cs", "Cn", "Co"):
            expected = "ab"
        else:
            expected = unicodedata.normalize("NFC", raw)
        assert schema.normalize_prompt(raw) == expected, hex(code)


def test_prompt_ids_are_stable_for_ever():
    # Caches and old runs are keyed by them: a changed value here breaks both.
    assert schema.prompt_id("a red balloon") == schema.prompt_id(
        schema.normalize_prompt("a  red balloon")
    )
    assert schema.prompt_id("a red balloon") == -6693298342645307066


def test_check_columns_names_what_is_missing_and_what_is_there():
    with pytest.raises(ValueError, match=r"t\.parquet lacks the columns \['b'\]; it has \['a'\]"):
        schema.check_columns(["a"], ["a", "b"], "t.parquet")
