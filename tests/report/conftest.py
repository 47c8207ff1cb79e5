"""One synthetic run and its page for all tests of the report, and a parser that sees elements."""

import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
from synthetic_run import write_run

from fifa_ray.report.page import write_report
from fifa_ray.run_dir import RunDir

VOID = {"meta", "img", "br", "input", "link", "hr", "base", "col", "embed", "source"}


@dataclass
class Element:
    """A parsed element: its attributes, its own text and the tags and classes around it."""

    tag: str
    attributes: dict[str, str | None]
    around: tuple["Element", ...]
    text: str = ""

    def inside(self, class_name: str) -> bool:
        """Whether an element of this class contains it."""
        return any(class_name in (e.attributes.get("class") or "").split() for e in self.around)


@dataclass
class Page:
    """Every element of a page in order; parsing fails on elements that are not closed."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def find(self, tag: str, **attributes: str) -> list[Element]:
        """Elements with this tag and these attribute values."""
        return [
            e
            for e in self.elements
            if e.tag == tag and all(e.attributes.get(k) == v for k, v in attributes.items())
        ]

    @property
    def text(self) -> str:
        """All text that is no script and no style."""
        return " ".join(e.text for e in self.elements if e.tag not in ("script", "style"))


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Element] = []
        self.open: list[Element] = []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        element = Element(tag, dict(attrs), tuple(self.open))
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.found.append(Element(tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.open[-1].text += data


def parse(source: str) -> Page:
    parser = _Parser()
    parser.feed(source)
    parser.close()
    assert not parser.open, f"not closed: {[e.tag for e in parser.open]}"
    return Page(source, parser.found)


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
