"""The Grafana dashboard: of the shape that Grafana reads, over series that somebody exports."""

import json
import re
from pathlib import Path

import pytest
import ray.dashboard.modules.metrics.dashboards as rays_dashboards

from fifa_ray.engine.metrics import SERIES, exported_name

FILE = Path(__file__).parents[1] / "cluster" / "grafana" / "fifa_dashboard.json"
SERIES_NAME = r"\b(?:ray|autoscaler)_\w+"


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(FILE.read_text())


def expressions(dashboard: dict) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return found + [v["query"]["query"] for v in variables if v["type"] == "query"]


def test_grafana_can_lay_it_out(dashboard):
    assert dashboard["title"]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in {"timeseries", "bargauge"}
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (column, row)
            for column in range(place["x"], place["x"] + place["w"])
            for row in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        taken |= cells
        ids = [target["refId"] for target in panel["targets"]]
        assert len(set(ids)) == len(ids) > 0


def test_every_variable_of_a_query_is_defined(dashboard):
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__all"}
    assert used == defined


def test_every_series_is_exported_by_us_or_used_by_rays_own_dashboards(dashboard):
    ours = {exported_name(name) for name in SERIES}
    # Ray has no list of its series; those that its own panels show exist.
    sources = Path(rays_dashboards.__file__).parent.glob("*_panels.py")
    rays = {name for source in sources for name in re.findall(SERIES_NAME, source.read_text())}
    used = {name for text in expressions(dashboard) for name in re.findall(SERIES_NAME, text)}
    assert used <= ours | rays, used - ours - rays
    assert ours - used == {"ray_fifa_stage_seconds_total"}  # beside the time axis it says nothing
