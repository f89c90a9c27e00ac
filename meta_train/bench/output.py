"""What all reports are made of: a Markdown table, and figures that are on disk whole or not at all."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learned_opt.checkpoint import write_atomically

# Okabe and Ito's colours, which colour-blind readers tell apart too; without yellow (too light).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it also reads as plain text."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it: ``12 seconds``, ``3.4 minutes``, ``5.6 hours``."""
    if seconds < 99:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def show(markdown: str) -> None:
    """Print Markdown: its tables drawn by rich, and where they are too wide for the terminal, in several parts."""
    from rich.console import Console

    console = Console(highlight=False)
    lines: list[str] = []
    for line in [*markdown.rstrip("\n").split("\n"), ""]:
        if line.startswith("|"):
            lines.append(line)
            continue
        for part in _parts(lines, console.width):
            console.print(part)
        lines = []
        console.print(line, markup=False)


def _parts(lines: Sequence[str], width: int) -> list[Any]:
    """A Markdown table as rich tables of at most ``width`` columns of text, each with the first column."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return []
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    columns = list(zip(header, *rows, strict=True))
    whole = [max(*map(len, c), 1) + 3 for c in columns]  # 3: what rich puts between
    least = [max(*map(len, c[0].split()), *map(len, c[1:]), 1) + 3 for c in columns]  # with a heading of several lines
    groups: list[list[int]] = [[0]]
    for k in range(1, len(columns)):
        if groups[-1][1:] and sum(least[i] for i in (*groups[-1], k)) > width:
            groups.append([0])
        groups[-1].append(k)
    parts = []
    for group in groups:
        widths = whole if sum(whole[i] for i in group) <= width else least
        part = Table(box=SIMPLE_HEAD, pad_edge=False)
        for k in group:
            part.add_column(Text(columns[k][0]), overflow="fold", width=widths[k] - 3)
        for row in rows:
            part.add_row(*(Text(row[k]) for k in group))
        parts.append(part)
    return parts


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display (Agg)

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure, path: Path, dpi: int = 100) -> None:
    """Save a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_atomically(path, content.getvalue())
