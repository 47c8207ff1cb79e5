"""A strict HTML parser for tests: elements with their attributes, text and surroundings."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

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
    """The elements of a page; AssertionError where one is not closed or closes another."""
    parser = _Parser()
    parser.feed(source)
    parser.close()
    assert not parser.open, f"not closed: {[e.tag for e in parser.open]}"
    return Page(source, parser.found)
