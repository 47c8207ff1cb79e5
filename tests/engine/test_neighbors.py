"""The neighbors stage: distances against two independent searches, whatever the layout."""

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.neighbors import NearestNeighbors

from fifa_ray import schema
from fifa_ray.config import load_config
from fifa_ray.engine import self_join
from fifa_ray.engine.neighbors import chosen_method, run_neighbors
from fifa_ray.run_dir import Manifest, RunDir, part_name
from fifa_ray.scoring.diversity import knn_entropy_from_distances, kth_neighbor_distance

EXACT = ["neighbors.method=exact"]
APPROXIMATE = ["neighbors.method=approximate", "neighbors.recall_sample=200"]


def clustered(count: int, width: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((max(2, count // 40), width)) * 0.7 ** np.arange(width)
    vectors = centers[rng.integers(0, len(centers), count)]
    vectors = vectors + 0.4 * rng.standard_normal((count, width)) * 0.85 ** np.arange(width)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write_embeddings(folder, vectors: np.ndarray, parts: int = 3) -> RunDir:
    run = RunDir(str(folder))
    ids = np.arange(len(vectors)) * 7 - 100
    for place, rows in enumerate(np.array_split(np.arange(len(vectors)), parts)):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), vectors.shape[1])
        table = pa.table([ids[rows], lists], schema=schema.embeddings_schema(vectors.shape[1]))
        run.write_table(table, "embeddings", part_name(place))
    total = len(vectors)
    run.publish(Manifest(stage="embeddings", fingerprint="e", rows_in=total, rows_out=total))
    return run


def neighbors(run: RunDir, *overrides: str) -> tuple[np.ndarray, Manifest]:
    config = load_config({"run_dir": run.uri, "ingest": {"source": "unused"}}, overrides)
    manifest = run_neighbors(run, config)
    assert run.list("neighbors") == run.list("embeddings")
    table = run.read_table("neighbors")
    assert table.schema.equals(schema.NEIGHBORS)
    assert table.column("prompt_id").equals(run.read_table("embeddings").column("prompt_id"))
    return table.column("kth_neighbor_distance").to_numpy(), manifest


def by_sklearn(vectors: np.ndarray, k: int = 5) -> np.ndarray:
    """Distances (N, k) to the other rows, in float64 differences."""
    search = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(vectors.astype(np.float64))
    return search.kneighbors()[0]


def test_exact_distances_equal_two_independent_searches(ray_session, tmp_path):
    vectors = clustered(1500)
    found, manifest = neighbors(write_embeddings(tmp_path, vectors), *EXACT)
    np.testing.assert_allclose(found, by_sklearn(vectors)[:, -1], rtol=2e-6)
    np.testing.assert_allclose(found, kth_neighbor_distance(vectors, 5), rtol=2e-6)
    assert manifest.details["method"] == "exact"
    assert manifest.details["recall"] == 1.0
    entropy = knn_entropy_from_distances(found, 5, 32, distance_floor=1e-3)
    assert manifest.details["knn_entropy"] == pytest.approx(entropy)


def test_approximate_distances_are_nearly_all_exact_and_the_recall_is_honest(ray_session, tmp_path):
    vectors = clustered(12_000)
    found, manifest = neighbors(write_embeddings(tmp_path, vectors), *APPROXIMATE)
    true = by_sklearn(vectors)[:, -1]
    # A real neighbour's distance is never too short; most are the k-th itself.
    assert (found >= true * (1 - 1e-5)).all()
    assert np.mean(found <= true * (1 + 1e-5)) > 0.95
    details = manifest.details
    assert details["method"] == "approximate"
    assert details["recall"] >= 0.97
    assert details["recall_sample"] == 200
    assert 0 < details["compared_fraction"] < 0.6
    assert 1 <= details["num_probes"] <= details["num_lists"]
    # Where all k are found the k-th is right: its share bounds the recall, up to the sample's luck.
    right = np.mean(found <= true * (1 + 1e-5))
    assert right - 0.03 <= details["recall"] <= 1 - (1 - right) / 5 + 0.03


def test_fewer_probes_find_less_and_say_so(ray_session, tmp_path):
    vectors = clustered(12_000)
    true = by_sklearn(vectors)[:, -1]
    few, few_manifest = neighbors(
        write_embeddings(tmp_path / "few", vectors), *APPROXIMATE, "neighbors.num_probes=2"
    )
    many, many_manifest = neighbors(
        write_embeddings(tmp_path / "many", vectors), *APPROXIMATE, "neighbors.num_probes=200"
    )
    assert np.mean(few > true * 1.00001) > np.mean(many > true * 1.00001)
    assert few_manifest.details["recall"] < many_manifest.details["recall"]
    assert few_manifest.details["num_probes"] == pytest.approx(2, abs=1)
    assert few_manifest.details["relative_error_p95"] > 0


def test_result_does_not_depend_on_parts_or_on_the_size_of_tasks(
    ray_session, tmp_path, monkeypatch
):
    vectors = clustered(9000)
    for method in (EXACT, APPROXIMATE):
        one, _ = neighbors(write_embeddings(tmp_path / f"one{method[0]}", vectors, 1), *method)
        seven, _ = neighbors(write_embeddings(tmp_path / f"seven{method[0]}", vectors, 7), *method)
        np.testing.assert_array_equal(one, seven)


@pytest.mark.parametrize("method", [EXACT, APPROXIMATE])
def test_a_crowd_of_copies_stays_finite_and_right(ray_session, tmp_path, method):
    vectors = clustered(8000)
    vectors[1000:4000] = vectors[0]
    vectors[5000:5003] = vectors[4999]
    found, manifest = neighbors(write_embeddings(tmp_path, vectors), *method)
    true = kth_neighbor_distance(vectors, 5)
    assert (found[1000:4000] == 0).all()
    assert found[0] == 0
    # Four copies have three copies each, so the fifth neighbour is another prompt.
    assert (found[4999:5003] > 0.01).all()
    assert np.mean(found <= np.maximum(true * (1 + 1e-5), 1e-3)) > 0.95
    log_distance = neighbors_column(tmp_path, "log_kth_neighbor_distance")
    assert np.isfinite(log_distance).all()
    np.testing.assert_allclose(log_distance[0], np.log(1e-3), rtol=1e-6)
    assert np.isfinite(manifest.details["knn_entropy"])
    assert manifest.details.get("relative_error_p95", 0.0) < 0.1


def neighbors_column(folder, name: str) -> np.ndarray:
    return RunDir(str(folder)).read_table("neighbors").column(name).to_numpy()


@pytest.mark.parametrize("method", [EXACT, APPROXIMATE])
def test_as_many_prompts_as_just_suffice(ray_session, tmp_path, method):
    vectors = clustered(6, width=5)
    found, _ = neighbors(write_embeddings(tmp_path, vectors, 2), *method)
    np.testing.assert_allclose(found, by_sklearn(vectors)[:, -1], rtol=1e-5)


def test_too_few_prompts_missing_embeddings_and_vectors_not_of_unit_length(ray_session, tmp_path):
    with pytest.raises(ValueError, match="at least 6 distinct prompts, got 5"):
        neighbors(write_embeddings(tmp_path / "few", clustered(5), 1))
    with pytest.raises(ValueError, match="run the embed stage first"):
        neighbors(RunDir(str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"expected unit vectors.*length 2"):
        neighbors(write_embeddings(tmp_path / "long", 2 * clustered(100)), *EXACT)


def test_auto_is_exact_below_the_limit():
    settings = load_config({"run_dir": "r", "ingest": {"source": "s"}}).neighbors
    assert chosen_method(settings, 49_999)[0] == "exact"
    method, reason = chosen_method(settings, 50_000)
    assert method == "approximate"
    assert "exact_below 50,000" in reason


@pytest.mark.parametrize("method", [EXACT, APPROXIMATE])
def test_an_interrupted_run_goes_on_where_it_was(ray_session, tmp_path, method, monkeypatch):
    vectors = clustered(9000)
    whole, manifest = neighbors(write_embeddings(tmp_path / "whole", vectors), *method)
    run = write_embeddings(tmp_path / "broken", vectors)
    from fifa_ray.engine import neighbors as stage

    # The driver dies after the search: everything is done but the last step.
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_write_parts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            neighbors(run, *method)
    folder = tmp_path / "broken" / "partial" / f"neighbors-{manifest.fingerprint}"
    finished = sorted(folder.rglob("*.parquet"))
    assert run.manifest("neighbors") is None
    # One task's output is lost, the others must not be written again.
    lost = next(path for path in finished if path.parent.name == "joined" or method is EXACT)
    lost.unlink()
    kept = {p: p.stat().st_mtime_ns for p in finished if p != lost and p.parent.name != "checked"}
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "remove", lambda *_: None)
        found, again = neighbors(run, *method)
    np.testing.assert_array_equal(found, whole)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert again.details["recall"] == manifest.details["recall"]


def test_a_complete_stage_is_kept_and_a_changed_one_redone(ray_session, tmp_path):
    run = write_embeddings(tmp_path, clustered(500))
    _, first = neighbors(run)
    _, same = neighbors(run)
    assert same == first
    found, changed = neighbors(run, "neighbors.num_neighbors=2")
    assert changed.fingerprint != first.fingerprint
    np.testing.assert_allclose(found, by_sklearn(clustered(500), 2)[:, -1], rtol=2e-6)
    assert json.loads(run.read_text("manifests", "neighbors.json"))["config"]["num_neighbors"] == 2
    assert not run.list("partial")
    assert self_join.SETTLED_DISTANCE == 1e-3
