"""A symmetry as a picture: one row per tensor, one line per label through the tensors that carry it.

Drawn like a map of a railway. Matplotlib is imported by :func:`draw` only.
"""

import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learned_opt.checkpoint import write_atomically
from learned_opt.symmetry.axes import Axis, Leaf, Prod, Sum, leaves_of
from learned_opt.symmetry.labels import AxisLabels, SymmetryError
from learned_opt.symmetry.table import Row, Words, fold, one_line, rows_of

MOST_ROWS = 64  # with more, repeated modules are folded
FONT = 8.0  # points, of a font whose letters are equally wide
LETTER, ROW, LANE, GAP = 0.602 * FONT / 72, 0.24, 0.2, 0.3  # inches
INK, SOFT, PALE, BAND = "#222222", "#666666", "#e4e4e4", "#f6f6f6"
LEGEND = "A row is a tensor, a box an index, grey if it stays in place; a full station writes, an open one reads."
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#b04c8f", "#e69f00", "#56a5d8"),
    *("#7b4fa3", "#8c6d31", "#c2334d", "#4b8b2f", "#1f8a8a", "#5b6fb5"),
)
# Text stays text in an SVG: small, and searchable; any font of this kind is about as wide.
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans Mono", "monospace"],
    "svg.fonttype": "none",
    "svg.hashsalt": "symmetry",
}
_METADATA: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@dataclass(frozen=True)
class Line:
    """One label: its first and last row, and the lane in which it runs."""

    label: str
    first: int
    last: int
    lane: int
    colour: str


def draw(symmetry: AxisLabels, path: str | os.PathLike[str]) -> None:
    """Draw the tensors of a symmetry and the labels that join them.

    A row is a tensor (or several with the same axes) with a box for every index; boxes of one label have its
    colour, grey ones stay in place. A line joins the tensors that carry a label: a full station writes it (roles
    ``out`` and ``gain``), an open one reads it. Repeated modules are folded where there would be more than 64 rows.

    Args:
        symmetry: with at least one tensor.
        path: a file whose name ends in ``.svg``, ``.png`` or ``.pdf``; written whole or not at all.

    Raises:
        SymmetryError: there is nothing to draw, or the file's name has another ending.
        ModuleNotFoundError: matplotlib is not installed (extra ``meta``).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png", ".pdf"):
        raise SymmetryError(f"{path}: the name of a picture must end in .svg, .png or .pdf")
    if not symmetry.specs:
        raise SymmetryError("a symmetry of no tensors cannot be drawn")
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        _figure(symmetry).savefig(content, format=suffix[1:], dpi=150, metadata=_METADATA.get(suffix))
    write_atomically(path, content.getvalue())


def _figure(symmetry: AxisLabels) -> Any:
    from matplotlib.figure import Figure

    items = fold(symmetry, repeats=False)
    words = Words(symmetry, items)
    rows = rows_of(symmetry, items, words)
    if len(rows) > MOST_ROWS:
        items = fold(symmetry)
        words = Words(symmetry, items)
        rows = rows_of(symmetry, items, words)
    lines = lines_of(symmetry, rows)
    signs = _signs(words, lines)

    # columns: names, boxes, lanes, what the lines are
    boxes_at = GAP + LETTER * max(len(row.text) + 2 * row.depth for row in rows) + GAP
    lanes_at = boxes_at + max(_width(symmetry, row) for row in rows) + GAP
    signs_at = lanes_at + LANE * (1 + max((line.lane for line in lines), default=0)) + GAP
    width = signs_at + LETTER * max(max((len(text) for _, text in signs), default=0), 24) + GAP
    below = textwrap.wrap(f"{LEGEND} {one_line(symmetry)}.", int((width - 2 * GAP) / LETTER))
    end = max([len(rows), *(1 + at for at, _ in signs)])

    figure = Figure((width, _y(end + len(below) + 0.5)))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(_y(end + len(below) + 0.5), 0))
    page.axis("off")
    for i, words_below in enumerate(below):
        page.text(GAP, _y(end + 0.5 + i), words_below, size=FONT, color=SOFT, va="center")
    colours = {line.label: line.colour for line in lines}
    for i, row in enumerate(rows):
        y = _y(i)
        if row.names and i % 2:
            _rectangle(page, GAP / 2, y - ROW / 2, signs_at - GAP, ROW, BAND)
        weight = "normal" if row.names else "bold"
        page.text(GAP + 2 * LETTER * row.depth, y, row.text, size=FONT, color=INK, va="center", weight=weight)
        if row.names:
            _boxes(page, boxes_at, y, symmetry.specs[row.names[0]].axes, colours)
    for line, (at, text) in zip(lines, signs, strict=True):
        x = lanes_at + LANE * (line.lane + 0.5)
        page.plot([x, x], [_y(line.first), _y(line.last)], color=line.colour, lw=2.5, solid_capstyle="round")
        for i, row in enumerate(rows):
            written = _station(symmetry, row, line.label)
            if written is not None:
                inside = line.colour if written else "white"
                page.plot(x, _y(i), "o", ms=6, mfc=inside, mec=line.colour, mew=1.6)
        page.text(signs_at, _y(at), text, size=FONT, color=line.colour, va="center", weight="bold")
    return figure


def _y(row: float) -> float:
    return ROW * (row + 1)


def lines_of(symmetry: AxisLabels, rows: Sequence[Row]) -> list[Line]:
    """A line for every label that the rows carry, in order; lines that meet in no row may share a lane."""
    at: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for leaf in _leaves(symmetry, row):
            if leaf.label is not None:
                at.setdefault(leaf.label, []).append(i)
    spans = sorted(at, key=lambda n: (at[n][0], -at[n][-1]))
    lanes: list[int] = []  # lane -> last row in use
    lines = []
    for i, label in enumerate(spans):
        first, last = at[label][0], at[label][-1]
        free = [lane for lane, end in enumerate(lanes) if end < first]
        lane = free[0] if free else len(lanes)
        lanes[lane : lane + 1] = [last]
        lines.append(Line(label, first, last, lane, COLOURS[i % len(COLOURS)]))
    return lines


def _leaves(symmetry: AxisLabels, row: Row) -> list[Leaf]:
    return [leaf for n in row.names for axis in symmetry.specs[n].axes for leaf in leaves_of(axis)]


def _station(symmetry: AxisLabels, row: Row, label: str) -> bool | None:
    """Whether the tensors of a row write (or only read) a label; None if they do not carry it."""
    roles = [
        role
        for name in row.names
        for axis, role in zip(symmetry.specs[name].axes, symmetry.specs[name].roles, strict=True)
        if any(leaf.label == label for leaf in leaves_of(axis))
    ]
    return any(role in ("out", "gain") for role in roles) if roles else None


def _signs(words: Words, lines: Sequence[Line]) -> list[tuple[int, str]]:
    """For every line the row in which its name stands, at or below its first station, and the name."""
    signs: list[tuple[int, str]] = []
    for line in lines:
        group = words.symmetry.labels[line.label]
        text = f"{words.labels[line.label]}:{group.size}"
        text += f" over {', '.join(words.labels.get(b, b) for b in group.over)}" if group.over else ""
        kinds = ", ".join(k for k in ("fixed" if group.fixed else "", words.kinds(line.label)) if k)
        signs.append((max(line.first, signs[-1][0] + 1 if signs else 0), text + (f"  {kinds}" if kinds else "")))
    return signs


# ---------------------------------------------------------------------------------------------- boxes
def _tokens(axis: Axis, inside: str = "") -> list[Leaf | str]:
    """An axis as boxes and the signs between them; a product inside of a sum needs no brackets."""
    if isinstance(axis, Leaf):
        return [axis]
    sign, parts = ("|", axis.parts) if isinstance(axis, Sum) else ("*", axis.factors)
    tokens = [t for i, part in enumerate(parts) for t in ([sign] if i else []) + _tokens(part, sign)]
    return ["(", *tokens, ")"] if inside and not (inside == "|" and isinstance(axis, Prod)) else tokens


def _box_width(token: Leaf | str) -> float:
    return LETTER * (1.4 if isinstance(token, str) else len(str(token.size)) + 1)


def _width(symmetry: AxisLabels, row: Row) -> float:
    axes = symmetry.specs[row.names[0]].axes if row.names else ()
    return sum(2 * LETTER + sum(map(_box_width, _tokens(axis))) for axis in axes)


def _boxes(page: Any, x: float, y: float, axes: Sequence[Axis], colours: dict[str, str]) -> None:
    for axis in axes:
        for token in _tokens(axis):
            width = _box_width(token)
            text, ink = (token, INK) if isinstance(token, str) else (str(token.size), "white")
            if isinstance(token, Leaf):
                fill = colours[token.label] if token.label is not None else PALE
                ink = ink if token.label is not None else INK
                _rectangle(page, x, y - 0.36 * ROW, width, 0.72 * ROW, fill)
            page.text(x + width / 2, y, text, size=FONT, color=ink, ha="center", va="center_baseline")
            x += width
        x += 2 * LETTER


def _rectangle(page: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    page.add_patch(Rectangle((x, y), width, height, color=colour, lw=0))
