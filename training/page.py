"""One HTML page that holds everything it shows: pictures as data, styles inside, no address outside itself."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}p.lead{color:#555;margin-top:0}
img{max-width:100%;height:auto}div.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td{white-space:nowrap}th:first-child,td:first-child{text-align:left}th{border-bottom:2px solid #999}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}p.lead{color:#aaa}img{background:#fff}}
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_html(self) -> str:
        """Return the table; what a cell holds is shown as it is, never taken for markup."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG with the sentence that says what it shows."""

    png: bytes
    words: str

    def to_html(self) -> str:
        """Return the picture with its bytes inside."""
        data = base64.b64encode(self.png).decode()
        return f'<img alt="{escape(self.words)}" src="data:image/png;base64,{data}">'


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a sentence, and what stands below it."""

    title: str
    words: str
    body: Sequence[Table | Picture]


def build_page(title: str, lead: str, sections: Iterable[Section]) -> str:
    """Return a whole HTML document."""
    parts = [
        f"<h2>{escape(one.title)}</h2><p>{escape(one.words)}</p>" + "\n".join(piece.to_html() for piece in one.body)
        for one in sections
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )
