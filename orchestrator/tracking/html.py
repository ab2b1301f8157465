"""Self-contained HTML pages with figures and tables, for screens, phones and paper.

page_of("Report of books", "succeeded", svg_of(figure) + table_of(("RUN", "books"), rows))
"""

import html
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from matplotlib.figure import Figure

FIGURE_SPACE = "\u2007"  # as wide as a digit
SPACES = re.compile(r"  +")


def page_of(title: str, summary: str, body: str) -> str:
    """A page. `title` and `summary`, the line below it, are text; `body` is HTML."""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return PAGE.format(title=html.escape(title), summary=html.escape(summary), body=body, written=written, style=STYLE)


def svg_of(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return f'<div class="wide">{text[text.index("<svg") :]}</div>\n'


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table of text. Columns of numbers, except for the first column, are right-aligned."""
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    kinds = ["number" if place and _holds_numbers(column) else "text" for place, column in enumerate(columns)]
    header = _row("th", head, kinds)
    body = "\n".join(_row("td", row, kinds) for row in rows)
    paragraphs = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    return f'<div class="table"><div class="wide"><table>\n{header}\n{body}\n</table></div>\n{paragraphs}</div>\n'


def _holds_numbers(column: Sequence[str]) -> bool:
    return 2 * sum(cell.strip()[:1].isdigit() for cell in column) >= max(len(column), 1)


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    shown = (
        f'<{tag} class="{kind}">{html.escape(_spaced(cell))}</{tag}>' for cell, kind in zip(cells, kinds, strict=True)
    )
    return f"<tr>{''.join(shown)}</tr>"


def _spaced(cell: str) -> str:
    """Keep runs of spaces, which align digits: HTML would collapse them."""
    return SPACES.sub(lambda found: FIGURE_SPACE * len(found.group()), cell.strip())


STYLE = """
 body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #22303c;
        font: 15px/1.5 system-ui, "Segoe UI", sans-serif }
 h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
 h2 { font-size: 1.1rem; margin: 1.5rem 0 0 }
 p { margin: .2rem 0 1rem; color: #5c6b78; max-width: 48rem }
 p.warning { color: #c0392b }
 .wide { overflow-x: auto }
 svg { display: block; width: 100%; min-width: 40rem; height: auto; margin-bottom: 1rem }
 .table { margin-top: 1.5rem }
 table { border-collapse: collapse; font-size: 13px; margin-bottom: .5rem }
 th { border-bottom: 2px solid #e4e9ed; vertical-align: bottom }
 td { border-bottom: 1px solid #e4e9ed; vertical-align: top }
 th, td { padding: .3rem 1.2rem .3rem 0 }
 .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
 .text { text-align: left; overflow-wrap: break-word }
 .text:first-child { white-space: nowrap; min-width: 9rem }
 .text:last-child { overflow-wrap: anywhere; min-width: 16rem }
 @media print {
  @page { margin: 14mm }
  body { margin: 0; max-width: none; padding: 0; font-size: 11px }
  svg { min-width: 0; max-height: 75mm; margin-bottom: .5rem }
  table { font-size: 10px }
  th, td { padding: .15rem .8rem .15rem 0 }
  .wide, .table { overflow: visible; break-inside: avoid }
  tr { break-inside: avoid }
 }
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p>{summary}<br>Written {written}.</p>
{body}
</html>
"""
