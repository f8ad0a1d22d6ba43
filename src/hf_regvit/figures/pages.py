"""HTML pages from one family of jinja2 templates, with images and charts embedded.

A page is one file that loads nothing from elsewhere. All text is escaped by the templates.
"""

import base64
import re
from collections.abc import Mapping
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup
from PIL import Image

from ..models.results import show
from ..models.saving import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
# Colors of charts that take another value in dark mode, as variables of `parts.css`.
CHART_COLORS = {"#222222": "currentColor", "#0072b2": "var(--normal)", "#d55e00": "var(--outlier)",
                "#009e73": "var(--register)"}  # fmt: skip


def render(template: str, *, folder: Path = TEMPLATES, **values: object) -> str:
    """Return a page or a part of one.

    Args:
        template: File name of a template in `folder`, which may use the macros of `figures/templates/macros.html`.
        folder: Folder of the template.
        **values: Values that the template uses; text is escaped, `Markup` is not.
    """
    return _environment(folder).get_template(template).render(values).strip() + "\n"


def write_page(page: str, path: str | Path) -> Path:
    """Write a page, create its folder if needed, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


@cache
def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=cell_text, number=number_text, percent=lambda share: f"{share:.0%}")
    return environment


def data_url(image: Image.Image | bytes, kind: str = "PNG") -> str:
    """Return an image, or the content of an image file, as a data URL in the format PNG or JPEG."""
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        image.save(buffer, format=kind, **({"optimize": True} if kind == "PNG" else {"quality": 90}))
        image = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode('ascii')}"


def chart(figure: "Figure", label: str) -> Markup:
    """Return a figure as inline SVG that follows the colors of the page.

    Args:
        figure: Figure to draw. An artist with the id `hover:TEXT` shows the text under the mouse pointer.
        label: Description for readers who do not see the chart, different for each chart of a page.
    """
    import matplotlib

    buffer = StringIO()
    # The salt makes the ids inside of the chart reproducible, and different from those of the other charts.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    svg = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]  # without metadata and global style
    body = re.sub(r'<g id="hover:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r' id="(?:line2d|[A-Za-z.]+)_\d+"', "", body)  # the same in every chart, and not referenced
    body = re.sub(r"font-family: [^;]*; ", "", re.sub(r"\s+", " ", body))
    for color, other in CHART_COLORS.items():
        body = body.replace(color, other)
    return Markup('<svg {} role="img" aria-label="{}">{}</svg>').format(
        Markup(box[0] if box else ""), label, Markup(body)
    )


def cell_text(value: object) -> str:
    """Return a value as the text of a table cell: four digits, `-` for None, and the first 24 entries of a list."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell_text(entry) for entry in value[:24]) + (" ..." if len(value) > 24 else "")
    return show(value)


def number_text(value: float | None, digits: int = 2) -> str:
    """Return a number with a fixed number of decimals, `-` for None."""
    return show(value, f".{digits}f")
