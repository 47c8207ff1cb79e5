"""Finding files, and the walls around the dataset's folder."""

import os
from pathlib import Path

import pytest

from fifa_ray.config import ImagesConfig
from fifa_ray.sources.files import Folder, ImageFiles, find_files


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names(source: Path | str) -> list[str]:
    return [file.name for file in find_files(str(source))[1]]


def test_a_folder_gives_the_data_files_at_its_shallowest_depth(tmp_path: Path) -> None:
    touch(tmp_path, "README.md", "dataset_infos.json", ".hidden.parquet", "_tmp.parquet")
    touch(tmp_path, "data/b.parquet", "data/a.parquet", "data/more/c.parquet", "images/1.jpg")
    assert names(tmp_path) == ["data/a.parquet", "data/b.parquet"]


def test_a_file_and_globs(tmp_path: Path) -> None:
    touch(tmp_path, "data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet")
    touch(tmp_path, "data/deep/er/train-2.parquet")
    assert names(tmp_path / "data/test-0.parquet") == ["test-0.parquet"]
    assert names(tmp_path / "data/train-*.parquet") == ["train-0.parquet", "train-1.parquet"]
    assert names(tmp_path / "*/t*t-0.parquet") == ["data/test-0.parquet"]
    assert names(tmp_path / "**/train-*.parquet") == [
        "data/deep/er/train-2.parquet",
        "data/train-0.parquet",
        "data/train-1.parquet",
    ]


def test_a_wrong_path_names_the_nearest_folder_and_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "pickapic/train.parquet", "notes.txt")
    with pytest.raises(ValueError, match=r"does not exist.*holds notes.txt, pickapic/"):
        find_files(str(tmp_path / "pickapik" / "data"))
    with pytest.raises(ValueError, match=r"matches no file.*holds train.parquet"):
        find_files(str(tmp_path / "pickapic" / "*.json"))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv")
    with pytest.raises(ValueError, match=r"holds no .*\.parquet.*it holds train.csv"):
        find_files(str(tmp_path))


@pytest.fixture
def walled(tmp_path: Path) -> tuple[Path, ImageFiles]:
    """A dataset folder with an image, beside a secret."""
    root = tmp_path / "dataset"
    touch(root, "images/1.jpg")
    touch(tmp_path, "secret.txt", "dataset-evil/1.jpg")
    return root, ImageFiles(Folder.at(str(root)), ImagesConfig(max_bytes=10))


def test_paths_below_the_root_are_read(walled: tuple[Path, ImageFiles]) -> None:
    root, files = walled
    (root / "inside.jpg").symlink_to("images/1.jpg")
    for ref in ("images/1.jpg", "images/../images/1.jpg", "inside.jpg", str(root / "images/1.jpg")):
        assert files.read(ref) == (b"x", None), ref


def test_no_reference_leaves_the_root(walled: tuple[Path, ImageFiles]) -> None:
    root, files = walled
    (root / "link.jpg").symlink_to(root.parent / "secret.txt")
    (root / "folder").symlink_to(root.parent)
    for ref in (
        "../secret.txt",
        "images/../../secret.txt",
        str(root.parent / "secret.txt"),
        "/etc/passwd",
        "link.jpg",
        "folder/secret.txt",
        "../dataset-evil/1.jpg",
        "file:///etc/passwd",
        "s3://bucket/key",
    ):
        assert files.read(ref) == (None, "path_outside_root"), ref


def test_what_is_no_readable_file_has_its_reason(walled: tuple[Path, ImageFiles]) -> None:
    root, files = walled
    os.mkfifo(root / "pipe.jpg")  # Opening it naively would wait for a writer for ever.
    (root / "large.jpg").write_bytes(b"x" * 11)
    assert files.read("none.jpg") == (None, "missing_image")
    assert files.read("images") == (None, "missing_image")
    assert files.read("images/1.jpg/2.jpg") == (None, "missing_image")
    assert files.read("pipe.jpg") == (None, "missing_image")
    assert files.read("large.jpg") == (None, "image_too_large")
    assert files.read("nul\0.jpg") == (None, "unreadable_source")


def test_urls_are_not_fetched_unless_allowed(walled: tuple[Path, ImageFiles]) -> None:
    assert walled[1].read("HTTPS://example.com/1.jpg") == (None, "url_not_allowed")


def test_many_reads_are_answered_once_and_in_order(walled: tuple[Path, ImageFiles]) -> None:
    root, files = walled
    for i in range(100):
        (root / f"{i}.jpg").write_bytes(str(i).encode())
    answers = list(files.read_all((i, f"{i}.jpg") for i in range(101)))
    assert answers == [(i, str(i).encode(), None) for i in range(100)] + [
        (100, None, "missing_image")
    ]
