"""What all reports are made of: a Markdown table, and figures that are on disk whole or not at all."""

import io
from collections.abc import Sequence
from pathlib import Path

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


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display (Agg)

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure, path: Path, dpi: int = 100) -> None:
    """Save a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_atomically(path, content.getvalue())
