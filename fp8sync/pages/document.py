"""The parts of a page: the document around it, tables, figures side by side."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fp8sync.pages.style import stylesheet

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["definitions", "document", "figures", "section", "table", "verdict"]


def document(title: str, body: str) -> str:
    """Return a whole page around `body`, which is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{stylesheet()}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def verdict(failures: Sequence[str], success: str) -> str:
    """Return the page's verdict: every failure, or the sentence of success."""
    if failures:
        items = "".join(f"<li>{escape(failure)}</li>" for failure in failures)
        return f'<div class="verdict failed"><p>Failed:</p><ul>{items}</ul></div>'
    return f'<p class="verdict">{escape(success)}</p>'


def section(title: str, text: str, body: str) -> str:
    """Return a headed section; `text` is plain."""
    lead = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<h2>{escape(title)}</h2>\n{lead}{body}\n"


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """Return figures (caption, SVG) side by side where there is room."""
    inner = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in pairs
    )
    return f'<div class="pair">{inner}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], top: str = "") -> str:
    """Return a table that scrolls by itself; `top` is a row of HTML above the header."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    scroll = '<div class="wide" tabindex="0">'
    return f"{scroll}<table>{top}<tr>{head}</tr>{body}</table></div>"


def definitions(pairs: Iterable[tuple[str, str]], nothing: str) -> str:
    """Return a table of two columns, or a sentence if there is nothing to list."""
    rows = list(pairs)
    if not rows:
        return f"<p>{escape(nothing)}</p>"
    return f'<div class="terms">{table(("", ""), rows)}</div>'
