"""Write report.json, the plots and a self-contained report.html."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.serving.plots import draw
from benchmarks.serving.results import Comparison
from benchmarks.serving.table import ROWS, caption, warning

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def write(comparison: Comparison, out: Path) -> Path:
    """Write the report into `out`; returns the path of the HTML file."""
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / JSON_FILE, comparison.model_dump_json(indent=2) + "\n")
    images = [
        (path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode())
        for path in draw(comparison, out)
    ]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("report.html.j2").render(
        comparison=comparison,
        caption=caption(comparison),
        warning=warning(comparison),
        rows=ROWS,
        images=images,
    )
    _replace(out / HTML_FILE, page)
    return out / HTML_FILE


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)
