"""One HTML page without other files: its style, its sections, its tables."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1b2733;background:#fff}
h1{font-size:1.5rem;overflow-wrap:anywhere} h2{font-size:1.05rem;margin:1.8rem 0 .4rem}
table{border-collapse:collapse;width:100%} th,td{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}
td{overflow-wrap:anywhere;border-top:1px solid #e3e9ee} th{font-weight:600;white-space:nowrap}
tr>th:first-child{border-top:1px solid #e3e9ee} thead th{border:0;color:#5b6b78}
.number{text-align:right;font-variant-numeric:tabular-nums} .best td,.best th{font-weight:700}
svg{display:block;width:100%;height:auto} p,small{color:#5b6b78} p{margin:.3rem 0}
@media print{body{margin:0;max-width:none;font-size:11px} section{break-inside:avoid}}
"""


def html_page(title: str, content: str) -> str:
    """Wrap the content, which is HTML, in a page with a title."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{content}</body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def value_table(values: Mapping[str, Any]) -> str:
    """Write names and their values, one a row."""
    rows = (f"<tr><th>{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>" for name, value in values.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def number_table(names: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """Write rows whose first column is a name and whose other columns are numbers. best: the place of a row in bold."""
    kinds = ["", *[' class="number"'] * (len(names) - 1)]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        ('<tr class="best">' if place == best else "<tr>")
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
        + "</tr>"
        for place, cells in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
