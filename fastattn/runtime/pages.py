"""How the project's pages look: one HTML file, pictures inside, no script, no network; light or dark as the reader has it."""

import html
from collections.abc import Sequence
from string import Template

from .pictures import DARK


def page(title: str, *parts: str) -> str:
    """A whole page of these parts, which are HTML."""
    return _PAGE.substitute(
        title=text(title), dark=_colours(DARK.values()), light=_colours(DARK), body="\n".join(parts)
    )


def header(title: str, note: str, lead: str = "") -> str:
    """lead: the page's first sentence, what a reader came for."""
    paragraphs = f"<p>{text(note)}</p>" + (f'<p class="lead">{text(lead)}</p>' if lead else "")
    return f"<header><h1>{text(title)}</h1>{paragraphs}</header>"


def tiles(notes: Sequence[tuple[str, str]]) -> str:
    """(figure, what it counts) pairs, shown large."""
    inner = "".join(f"<div><b>{text(value)}</b><span>{text(what)}</span></div>" for value, what in notes)
    return f'<div class="tiles">{inner}</div>'


def section(title: str, content: str, note: str = "") -> str:
    """content: HTML. note: one plain paragraph below it."""
    return f"<section><h2>{text(title)}</h2>{content}{f'<p>{text(note)}</p>' if note else ''}</section>"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of HTML cells, the first of each a heading where there is no `head`. A column whose head starts with # holds numbers."""
    kinds = [" class=number" if name.startswith("#") else "" for name in head] or [""] * len(rows[0])
    names = [name.lstrip("#") for name in head] or [""] * len(kinds)
    # a narrow screen shows each row as a card, its cells named by the column's head
    body = "".join(
        "<tr>"
        + "".join(
            f"<th>{cell}</th>"
            if not head and not place
            else f'<td{kind} data-head="{text(name)}">{cell}</td>'
            for place, (kind, name, cell) in enumerate(zip(kinds, names, row, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    top = "".join(f"<th{kind}>{text(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    if not head:
        return f"<table>{body}</table>"
    return f'<table class="cards"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def text(value: object) -> str:
    return html.escape(str(value))


def _colours(values) -> str:
    """CSS variables of the colours that pictures use, by the names that `pictures.framed` gives them."""
    return " ".join(f"--c{own.lstrip('#')}: {value};" for own, value in zip(DARK, values, strict=True))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; $light
  --ink: #1c2430; --muted: #5b6675; --page: #f5f7f9; --card: #fff; --line: #e3e7ec; --good: #0b6e4f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { $dark
  --ink: #e6eaf0; --muted: #a3aebb; --page: #12161c; --card: #1a2028; --line: #2c3540; --good: #5cc9a0; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--page);
       margin: 0; }
main { max-width: 920px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 14px; }
header p { color: var(--muted); margin: 0 0 12px; max-width: 70ch; }
header p.lead { color: var(--ink); font-size: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.tiles div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles div { padding: 14px 16px; }
.tiles b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: 13px; }
section { padding: 20px 24px 10px; margin-top: 16px; }
section > p { color: var(--muted); font-size: 14px; margin: 10px 0; max-width: 80ch; }
figure { margin: 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 460px; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; } 
.cards tbody tr:first-child > td { border-top: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.number { text-align: right; white-space: nowrap; }
code { font-size: .92em; overflow-wrap: anywhere; }
.note { color: var(--muted); } .won { color: var(--good); font-weight: 600; } .said { font-weight: 600; }
.boards { display: flex; flex-wrap: wrap; gap: 16px 24px; align-items: flex-start; }
.board { border-collapse: collapse; width: auto; font-size: 15px; }
.board td { width: 1.7em; height: 1.7em; padding: 0; border: 1px solid var(--line); text-align: center; vertical-align: middle;
            color: var(--muted); }
.board .first-row { border-top: 2px solid var(--muted); } .board .first-column { border-left: 2px solid var(--muted); }
.board .given { color: var(--ink); font-weight: 700; } .board .right { color: var(--good); } .board .wrong { color: var(--bad); }
.boards figcaption { font-size: 13px; color: var(--muted); margin-bottom: 6px; }
@media (max-width: 640px) {
  main { padding: 24px 12px 48px; } section { padding: 16px 14px 8px; }
  .cards thead { display: none; } .cards tr { display: block; border-top: 1px solid var(--line); padding: 8px 0; }
  .cards tbody tr > td, .cards tbody tr:first-child > td { display: block; border: 0; padding: 2px 0; text-align: left; }
  .cards td[data-head]:not([data-head=""])::before { content: attr(data-head) ": "; color: var(--muted); font-weight: 400; }
}
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")
