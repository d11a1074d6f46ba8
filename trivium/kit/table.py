"""Tables for a terminal: pages of columns where they do not fit its width, or 100 columns in a pipe."""

import io
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest

Cells = Sequence[str]
GAP = 2
PIPED = 100
"""How wide a table is in a pipe, a log or a page of documentation."""
SENTENCE = 20
"""A column wider than this may take two lines in some rows, where all columns then fit beside each other."""
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


def hanging(line: str, indent: int) -> str:
    """A line whose text begins at a column; what is too long for the terminal goes on below that column."""
    if not sys.stdout.isatty() or len(line) <= _width():
        return line
    from textwrap import wrap

    gap = " " * indent
    return "\n".join(wrap(line, _width(), subsequent_indent=gap, break_on_hyphens=False))


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def table(rows: Sequence[Cells], width: int | None = None, *, colour: bool = False) -> str:
    """The rows as text, no line longer than `width`; without one every row is one line."""
    if width is None or sum(_widths(rows)) + GAP * (len(rows[0]) - 1) <= width:
        return "".join(
            _line(row, _widths(rows), bold=colour and not number) for number, row in enumerate(rows)
        )
    folded = [_widths(rows)[0], *(_folded(column) for column in list(zip(*rows, strict=True))[1:])]
    if sum(folded) + GAP * (len(folded) - 1) <= width:
        return _page(rows, width, colour, folded)
    return "\n".join(_page(page, width, colour) for page in _pages(rows, width))


def _widths(rows: Sequence[Cells]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _folded(column: Cells) -> int:
    """The width of a column at which at most a quarter of its sentences take two lines, and none three."""
    from textwrap import wrap

    lengths = sorted(map(len, column))
    width = max([1, lengths[len(lengths) * 3 // 4], *(len(word) for cell in column for word in cell.split())])
    while any(len(wrap(cell, width, break_on_hyphens=False)) > 2 for cell in column):
        width += 1
    return width if lengths[-1] > SENTENCE else lengths[-1]


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


def _page(rows: Sequence[Cells], width: int, colour: bool, most: Sequence[int] = ()) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold" if colour else "")
    for name, widest in zip_longest(rows[0], most):
        drawn.add_column(Text(name), overflow="fold", width=widest)
    for row in rows[1:]:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour, highlight=False).print(drawn)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
