"""Tables for a terminal: pages of columns where they do not fit its width, or 100 columns in a pipe."""

import io
import sys
from collections.abc import Iterator, Sequence

Cells = Sequence[str]
GAP = 2
PIPED = 100
"""How wide a table is in a pipe, a log or a page of documentation."""
WRAPPED = 30
"""A column wider than this is wrapped before columns are moved to a page of their own."""


def print_table(rows: Sequence[Cells]) -> None:
    """Print rows under their heading, the first of them."""
    if sys.stdout.isatty():
        text = table(rows, _width(), colour=True)
    else:
        # Cells stay whole in a pipe, so that a path can be copied and a number found.
        text = "\n".join(table(page) for page in _pages(rows, PIPED, whole=True))
    sys.stdout.write(text)
    sys.stdout.flush()


def paragraph(text: str) -> str:
    """A sentence in lines that fit the terminal and are comfortable to read, all but the first indented."""
    from textwrap import wrap

    width = min(_width() if sys.stdout.isatty() else PIPED, PIPED) - GAP - GAP
    return "\n".join(wrap(text, width, subsequent_indent="    ", break_on_hyphens=False))


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def table(rows: Sequence[Cells], width: int | None = None, *, colour: bool = False) -> str:
    """The rows as text, no line longer than `width`; without one every row is one line."""
    if width is None or sum(_widths(rows)) + GAP * (len(rows[0]) - 1) <= width:
        return "".join(
            _line(row, _widths(rows), bold=colour and not number) for number, row in enumerate(rows)
        )
    return "\n".join(_page(page, width, colour) for page in _pages(rows, width))


def _widths(rows: Sequence[Cells]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _line(row: Cells, widths: Sequence[int], bold: bool) -> str:
    line = (" " * GAP).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    return f"\033[1m{line}\033[0m\n" if bold else f"{line}\n"


def _pages(rows: Sequence[Cells], width: int, *, whole: bool = False) -> Iterator[list[list[str]]]:
    """The first column with as many of the others as fit, page after page."""
    first, *others = (one if whole else min(one, WRAPPED) for one in _widths(rows))
    page: list[int] = []
    used = first
    for place, needed in enumerate(others, start=1):
        if page and used + GAP + needed > width:
            yield [[row[0], *(row[one] for one in page)] for row in rows]
            page, used = [], first
        page.append(place)
        used += GAP + needed
    yield [[row[0], *(row[one] for one in page)] for row in rows]


def _page(rows: Sequence[Cells], width: int, colour: bool) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold" if colour else "")
    for name in rows[0]:
        drawn.add_column(Text(name), overflow="fold")
    for row in rows[1:]:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour, highlight=False).print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
