"""One page with all pictures and tables of runs, in a single file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ais_jax.errors import UserError
from ais_jax.report.style import DPI

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70rem;margin:2rem auto;"
    "padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}"
    "img{max-width:100%;height:auto}table{border-collapse:collapse;font-size:13px;display:block;"
    "overflow-x:auto}td,th{padding:.25rem .7rem;border-bottom:1px solid #e6e6e6;text-align:right;"
    "white-space:nowrap}td:first-child,th:first-child{text-align:left}"
)


def write(
    folder: pathlib.Path,
    title: str,
    figures: Mapping[str, tuple[str, Figure]],
    text: str = "",
) -> pathlib.Path:
    """Writes each figure as a PNG, and report.html with all of them inside.

    Args:
      folder: created where missing.
      title: of the page.
      figures: file name -> (heading, figure).
      text: paragraphs and tables in Markdown, in front.

    Returns:
      Path of the page.

    Raises:
      UserError: the folder cannot be written.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", markdown_to_html(text)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (heading, figure) in figures.items():
            png = _png(figure)
            (folder / f"{name}.png").write_bytes(png)
            data = base64.b64encode(png).decode()
            shown = html.escape(heading)
            parts.append(f'<h2>{shown}</h2><img alt="{shown}" src="data:image/png;base64,{data}">')
        path = folder / "report.html"
        head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        body = "\n".join(parts)
        path.write_text(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n',
            encoding="utf-8",
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return path


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def markdown_to_html(text: str) -> str:
    """Paragraphs and tables; other Markdown stays as it is written."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and lines[0].startswith("|"):
            found.append(_table([lines[0], *lines[2:]]))
        elif block:
            found.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(found)


def _table(lines: Sequence[str]) -> str:
    rows = []
    for i, line in enumerate(lines):
        tag = "td" if i else "th"
        cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        rows.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
