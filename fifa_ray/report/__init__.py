"""A run directory made readable: one self-contained HTML page (`page`) or a terminal (`inspect`).

Both read tables and manifests only, so they work on a finished run, on one that stopped half-way
and on an object store. A new section is one function, see `section.py`.
"""

from fifa_ray.config import ReportConfig
from fifa_ray.run_dir import RunDir


def write_report(run: RunDir, settings: ReportConfig | None = None) -> str:
    """Write `report.html` into the run directory and return its path, see `page.write_report`."""
    # Imported late: the chart library takes a second that the package's users need not wait for.
    from fifa_ray.report import page

    return page.write_report(run, settings)
