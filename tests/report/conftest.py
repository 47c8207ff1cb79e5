"""One synthetic run and its page for all tests of the report."""

import shutil

import pytest
from page_parser import Page, parse
from synthetic_run import write_run

from fifa_ray.report.page import write_report
from fifa_ray.run_dir import RunDir


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> RunDir:
    return write_run(str(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="session")
def page_path(run) -> str:
    return write_report(run)


@pytest.fixture(scope="session")
def page(page_path) -> Page:
    with open(page_path, encoding="utf-8") as stream:
        return parse(stream.read())


@pytest.fixture
def run_copy(run, tmp_path) -> RunDir:
    """A run that a test may change."""
    shutil.copytree(run.root, tmp_path / "copy")
    return RunDir(str(tmp_path / "copy"))
