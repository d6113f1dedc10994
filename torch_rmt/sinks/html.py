"""`write_html`: reports as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_rmt.compare import Report
from torch_rmt.sinks.drawing import draw
from torch_rmt.sinks.svg import svg


def write_html(
    path: str | Path,
    reports: Sequence[Report] | Mapping[str, Sequence[Report]],
    *,
    title: str = "Spectra beside their laws",
    summary: Sequence[str] = (),
    table: Sequence[Sequence[str]] = (),
) -> Path:
    """Write a page with every report's picture, verdict, distances and assumptions; return its path.

    The page holds its style and its pictures (SVG) itself, loads nothing, runs no script, and follows the
    reader's light or dark mode.

    Args:
        path: the file; its folder is made if it is missing.
        reports: in order, or sections by heading; the sections' reports stand side by side.
        title: of the page.
        summary: lines under the title.
        table: rows of cells above the pictures, the first row the headings; every row as long as that.

    Raises:
        ValueError: the rows of the table differ in length.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    if len({len(row) for row in table}) > 1:
        raise ValueError("the rows of the table differ in length; give every row as many cells as the first.")
    sections = reports if isinstance(reports, Mapping) else {"": reports}

    def picture(report: Report) -> Markup:
        return Markup(svg(draw(report), title=f"{report.name}: {report.verdict}"))

    pictures = {heading: [(r, picture(r)) for r in group] for heading, group in sections.items()}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    page = template.render(title=title, summary=summary, table=table, sections=pictures)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
