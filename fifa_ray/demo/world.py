"""The demo's preference dataset, in Pick-a-Pic v2's layout, with its truth kept apart.

People ("users") type a prompt from the catalogue, look at a few pictures of it in one session and
compare pairs of them. What makes a picture good is known:

    utility = 4 * alignment(prompt, picture) + 2 * technical quality            (0 to 6)

and a label is noisy as people are (Bradley-Terry, with a little plain carelessness):

    P(label is wrong) = careless + (1 - 2 * careless) * sigmoid(-|utility gap| / temperature)

so labels go wrong mostly where two pictures are about equally good; small gaps also end in ties.
`directory/data/` is what a filter may read; `directory/truth/` is what it never sees:
`pairs.parquet` (one row for each ranking_id) and `prompts.parquet`.
"""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa_ray.demo.pictures import draw_picture
from fifa_ray.demo.prompts import Prompt, prompt_catalogue
from fifa_ray.demo.scenes import Scene, choose

PICK_A_PIC_V2 = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
TRUTH_PAIRS = pa.schema(
    [
        ("ranking_id", pa.int64()),
        ("prompt", pa.string()),
        ("prompt_kind", pa.string()),
        ("utility_0", pa.float64()),
        ("utility_1", pa.float64()),
        ("label_correct", pa.bool_()),  # null for ties and unlabelled rows
        ("defects_0", pa.list_(pa.string())),
        ("defects_1", pa.list_(pa.string())),
        ("row_defect", pa.string()),  # tie, unlabelled, empty_prompt, over_long_prompt, duplicated
    ]
)
TRUTH_PROMPTS = pa.schema(
    [("prompt", pa.string()), ("kind", pa.string()), ("theme", pa.string())]
)  # fmt: skip

TEMPERATURE = 0.85  # of utility, in the Bradley-Terry label
CARELESS_RATE = 0.03
TIE_RATE, TIE_GAP = 0.4, 0.4  # P(tie) = TIE_RATE * exp(-gap / TIE_GAP)
UNLABELLED_RATE = 0.006
DUPLICATED_RATE, EMPTY_RATE, OVER_LONG_RATE = 0.004, 0.0015, 0.001  # of rows
ROW_GROUP_ROWS = 500
MAX_SESSION_PAIRS = 15

FIRST_SECOND = np.datetime64("2026-01-05T08:00:00", "s")


@dataclass(frozen=True)
class _Session:
    """One user comparing pictures of one prompt; `row_defect` as in `TRUTH_PAIRS`."""

    index: int
    prompt: Prompt
    num_pairs: int
    pairs_of_prompt: int
    first_ranking: int
    row_defect: str | None = None


def generate_world(
    directory: str | Path,
    *,
    num_pairs: int = 24_000,
    num_prompts: int = 2_200,
    seed: int = 0,
    num_files: int = 8,
    image_size: int = 64,
    num_processes: int = 2,
) -> None:
    """Write a world of `num_pairs` rows under `directory`; see the module's docstring.

    `data/train-0000i-of-0000n.parquet` holds the rows, `truth/` the truth. The bytes are the same
    for the same arguments (but for `num_processes`) and the same versions of Pillow and pyarrow.
    Worlds of different seeds share no image, and those of an even and an odd seed no prompt, but
    for empty ones. Processes are spawned: call this from an importable main module, or with
    `num_processes=1`. The world appears under its name when it is complete: after an interruption
    the same call starts anew.

    Raises FileExistsError where `directory/data` exists, ValueError where `num_pairs` is below
    `2 * num_prompts`.
    """
    if num_pairs < 2 * num_prompts:
        raise ValueError(
            f"expected at least two pairs for each of {num_prompts:,} prompts, found num_pairs ="
            f" {num_pairs:,}; lower num_prompts"
        )
    directory = Path(directory)
    if (directory / "data").exists():
        raise FileExistsError(
            f"expected no world in {directory}, found its data folder; delete it or name another"
        )
    unfinished = directory / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    data, truth = unfinished / "data", unfinished / "truth"
    data.mkdir(parents=True)
    truth.mkdir()
    sessions, prompts = _plan(num_pairs, num_prompts, seed)
    num_duplicated = num_pairs - sum(session.num_pairs for session in sessions)
    jobs = [
        (
            data / f"train-{i:05d}-of-{num_files:05d}.parquet",
            sessions[i::num_files],
            num_duplicated // num_files + (i < num_duplicated % num_files),
            seed,
            image_size,
        )
        for i in range(num_files)
    ]
    if num_processes == 1:
        tables = [_write_file(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
            tables = list(pool.map(_write_file, *zip(*jobs, strict=True)))
    pairs = pa.concat_tables(tables).sort_by("ranking_id")
    pq.write_table(pairs, truth / "pairs.parquet", compression="zstd")
    rows = [{"prompt": p.text, "kind": p.kind, "theme": p.theme} for p in prompts]
    table = pa.Table.from_pylist(rows, TRUTH_PROMPTS)
    pq.write_table(table, truth / "prompts.parquet", compression="zstd")
    shutil.rmtree(directory / "truth", ignore_errors=True)
    truth.rename(directory / "truth")
    data.rename(directory / "data")
    unfinished.rmdir()


def _plan(num_pairs: int, num_prompts: int, seed: int) -> tuple[list[_Session], list[Prompt]]:
    """Sessions in the order in which they took place, and every prompt in them."""
    rng = np.random.default_rng([seed, 1])
    catalogue = prompt_catalogue(num_prompts, seed)
    odd = [
        *(
            (Prompt(" " * int(rng.integers(0, 4)), "junk", "empty", Scene(), 0.0), "empty_prompt")
            for _ in range(round(EMPTY_RATE * num_pairs))
        ),
        *(
            (_over_long(choose(rng, catalogue), rng), "over_long_prompt")
            for _ in range(round(OVER_LONG_RATE * num_pairs))
        ),
    ]
    ordinary_pairs = num_pairs - len(odd) - round(DUPLICATED_RATE * num_pairs)
    weights = np.array([prompt.weight for prompt in catalogue])
    extra = rng.multinomial(ordinary_pairs - num_prompts, weights / weights.sum())
    visits: list[tuple[Prompt, int, int, str | None]] = [
        (prompt, 1, 1, row_defect) for prompt, row_defect in odd
    ]
    for prompt, more in zip(catalogue, extra, strict=True):
        total = left = 1 + int(more)
        while left:
            size = min(left, int(rng.integers(6, MAX_SESSION_PAIRS + 1)))
            visits.append((prompt, size, total, None))
            left -= size
    sessions, first_ranking = [], seed * 10_000_000
    for index, position in enumerate(rng.permutation(len(visits))):
        prompt, size, total, row_defect = visits[position]
        sessions.append(_Session(index, prompt, size, total, first_ranking, row_defect))
        first_ranking += size
    seen = {prompt.text: prompt for prompt in (*catalogue, *(prompt for prompt, _ in odd))}
    return sessions, list(seen.values())


def _over_long(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """A prompt pasted again and again, to 5,000 characters or more."""
    text = f"{prompt.text}, " * (5_000 // len(prompt.text) + int(rng.integers(1, 20)))
    return Prompt(text, "junk", "over_long", prompt.scene, 0.0)


def _write_file(
    path: Path, sessions: list[_Session], num_duplicated: int, seed: int, image_size: int
) -> pa.Table:
    """Draw and label the sessions, write one parquet file, return its part of the truth."""
    rows: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    for session in sessions:
        for row, known in _session_rows(session, seed, image_size):
            rows.append(row)
            truth.append(known)
    rng = np.random.default_rng([seed, 3, sessions[0].index])
    order = list(range(len(rows)))
    for source in rng.permutation(len(rows))[:num_duplicated].tolist():
        order.insert(int(rng.integers(len(order) + 1)), source)
        truth[source]["row_defect"] = truth[source]["row_defect"] or "duplicated"
    table = pa.Table.from_pylist([rows[i] for i in order], PICK_A_PIC_V2)
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return pa.Table.from_pylist(truth, TRUTH_PAIRS)


def _session_rows(
    session: _Session, seed: int, image_size: int
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of the dataset and of the truth for one session, which draws its own pictures."""
    rng = np.random.default_rng([seed, 2, session.index])
    num_pictures = 2
    while num_pictures * (num_pictures - 1) // 2 < session.num_pairs:
        num_pictures += 1
    pictures = [draw_picture(session.prompt, rng, image_size) for _ in range(num_pictures)]
    pairs = list(combinations(range(len(pictures)), 2))
    user_id = int(rng.integers(1, 1_000))
    rows = []
    for offset, pick in enumerate(rng.permutation(len(pairs))[: session.num_pairs].tolist()):
        first, second = (pictures[i] for i in rng.permutation(pairs[pick]).tolist())
        label, outcome = _label(first.utility - second.utility, rng)
        ranking_id = session.first_ranking + offset
        best = {1.0: first.uid, 0.0: second.uid, 0.5: "tie"}.get(-1 if label is None else label, "")
        row = {
            "are_different": True,
            "best_image_uid": best,
            "caption": session.prompt.text,
            "created_at": FIRST_SECOND + np.timedelta64(60 * session.index + 5 * offset, "s"),
            "has_label": label is not None,
            "image_0_uid": first.uid,
            "image_0_url": f"https://images.demo.invalid/{first.uid}.jpg",
            "image_1_uid": second.uid,
            "image_1_url": f"https://images.demo.invalid/{second.uid}.jpg",
            "jpg_0": first.jpeg,
            "jpg_1": second.jpeg,
            "label_0": 0.0 if label is None else label,
            "label_1": 0.0 if label is None else 1.0 - label,
            "model_0": first.generator,
            "model_1": second.generator,
            "ranking_id": ranking_id,
            "user_id": user_id,
            "num_example_per_prompt": session.pairs_of_prompt,
            "__index_level_0__": ranking_id,
        }
        row["created_at"] = row["created_at"].astype("datetime64[ns]")
        correct = None if outcome else (label == 1.0) == (first.utility > second.utility)
        known = {
            "ranking_id": ranking_id,
            "prompt": session.prompt.text,
            "prompt_kind": session.prompt.kind,
            "utility_0": first.utility,
            "utility_1": second.utility,
            "label_correct": correct,
            "defects_0": first.defects,
            "defects_1": second.defects,
            "row_defect": session.row_defect or outcome,
        }
        rows.append((row, known))
    return rows


def _label(gap: float, rng: np.random.Generator) -> tuple[float | None, str | None]:
    """(label_0, None), or (0.5, "tie"), or (None, "unlabelled"), for a signed utility gap."""
    if rng.random() < UNLABELLED_RATE:
        return None, "unlabelled"
    if rng.random() < TIE_RATE * np.exp(-abs(gap) / TIE_GAP):
        return 0.5, "tie"
    prefers_first = gap > 0
    if rng.random() < wrong_label_probability(gap):
        prefers_first = not prefers_first
    return float(prefers_first), None


def wrong_label_probability(gap: float) -> float:
    """Chance that a label contradicts the truth at a utility gap of `gap` (its sign is ignored)."""
    flip = 1.0 / (1.0 + float(np.exp(abs(gap) / TEMPERATURE)))
    return CARELESS_RATE + (1 - 2 * CARELESS_RATE) * flip
