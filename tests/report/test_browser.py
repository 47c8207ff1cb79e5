"""The page in a real browser: charts are drawn under the policy, and hostile prompts stay text."""

import shutil
import subprocess

import pytest
from page_parser import parse
from synthetic_run import HOSTILE_PROMPTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def browse(path: str, profile, *flags: str) -> tuple[str, str]:
    """The page's elements after its scripts ran, and the browser's log."""
    result = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={profile}", "--virtual-time-budget=20000", *flags, "--dump-dom",
         f"file://{path}"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def browsed(page_path, tmp_path_factory):
    return browse(page_path, tmp_path_factory.mktemp("profile"))


def test_charts_are_drawn_and_the_policy_is_not_violated(browsed):
    source, log = browsed
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    assert 'data-drawn="true"' in source
    for name in ("prompt-map", "margin-quality", "agreement", "distribution-reward_margin"):
        chart = source.split(f'id="chart-{name}"')[1].split("<script")[0]
        assert "<svg" in chart
        assert chart.count("<path") > 5


def test_hostile_prompts_make_no_element_and_run_no_script(browsed):
    page = parse(browsed[0])
    assert "owned" not in page.find("title")[0].text
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        assert element.attributes.get("src") != "x"
    assert HOSTILE_PROMPTS[0] in page.text


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_screen(page_path, tmp_path, width):
    # A window cannot be as narrow as a telephone, a frame can.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body><iframe src="file://{page_path}" width="{width}" height="900" style="border:0">'
        "</iframe><script>onload = () => setTimeout(() => {"
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.body.dataset.widths = [page.scrollWidth, page.clientWidth,"
        "page.dataset.drawn].join(' ');"
        "}, 9000)</script>"
    )
    source, _ = browse(str(frame), tmp_path / "profile", "--allow-file-access-from-files",
                       "--window-size=1600,1000")  # fmt: skip
    widths = source.split('data-widths="')[1].split('"')[0]
    scroll, client, drawn = widths.split()
    assert drawn == "true"
    assert int(scroll) <= int(client) <= width
