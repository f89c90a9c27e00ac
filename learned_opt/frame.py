"""The frame: a canonical size for every hidden unit, in which a rule does not see how units are scaled.

Every unit ``u`` of a positive or real scale of the symmetry gets a number ``c_u > 0``, its *potential*
(docs/theorem.md: "the scale c_u"; in the state: ``log_scale = log c``). It is covariant: when the unit is
scaled by ``d_u``, ``c_u`` becomes ``|d_u| c_u``. In this file a *label* is a scale label (``Symmetry.scales``), never a
permutation label. With ``s_ij = prod c^exponent`` over the labels of an entry, ``W / s``, ``G s``, ``m s`` and
``v s^2`` are invariant to positive scale, and ``s f(W/s, G s, ...)`` transforms like ``W`` for any ``f`` that commutes
with permutations and signs (docs/theorem.md).

The potentials start covariant (a walk from the inputs: the norm of a unit's incoming weights, its inputs already in
the frame) and are then balanced by sweeps of ``c <- c ((in^2 + mean in^2) / (out^2 + mean out^2))^(1/4)``, where ``in``
and ``out`` are the norms of the unit's written and read weights in the current frame and the means are over the units
of its label; all are invariant, so every sweep keeps ``c`` covariant. Without the means the sweeps descend a convex
function over the scaling orbit (Stock et al. 2019, Equi-normalization of Neural Networks), but a unit whose only read
weight passes zero would get a potential, and thereby steps of its written weights, without bound: those of ReLU
networks with one output grew to 1e10 (experiments, 35).
Of an embedding, which is read one row at a time, the mean over its rows counts, whatever their number.
A read tensor's squares are weighted by fan_in / fan_out, so that fan-in-scaled initial weights are balanced as they
are and a standard network is optimised as without a frame.

The frame is a function of the weights alone. Rules take it anew every few steps and hold it between.

A unit whose written weights are all zero (a zero-initialised gain and bias) keeps potential 1: what reads it could tell
its scale only together with the scales of what that writes, which the walk needs first. Such a unit is constant.

A label keeps potential 1 if the optimizer lacks some of its tensors (frozen weights that were not passed): the other
tensors alone would give another scale (adapters beside frozen weights begin at zero and grow: experiments, 50). So
does a label whose units no tensor writes alone (a gain with a scale on each of its axes); a warning says so.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from learned_opt.across import HERE, Across
from learned_opt.blocks import BlockLayout, ByIdentity, Units, layout_of
from learned_opt.symmetry import Spec, Symmetry
from learned_opt.symmetry.axes import leaves_of
from learned_opt.symmetry.labels import is_statistic

logger = logging.getLogger(__name__)
SWEEPS = 3  # from the walk's start, labels that share a tensor one after the other


def potentials(
    symmetry: Symmetry, params: Mapping[str, Tensor], sweeps: int = SWEEPS, across: Across = HERE
) -> Tensor | None:
    """Log-potentials of all scale units, flat: ``[n_scales + 1]``, the last (for "no unit") 0.

    Args:
        symmetry: names the scale labels; sign labels get potential 1.
        params: all weights of the network, or those that this process holds.
        sweeps: balancing sweeps.
        across: the processes that hold the others.

    Returns:
        None when the symmetry has no positive or real scale.
    """
    if not any(s.kind != "sign" for s in symmetry.scales.values()):
        return None
    names = tuple(n for n in params if n in symmetry.specs)
    some = next(iter(params.values()))
    layout = layout_of(symmetry, names, some.device)
    plan = _plan(ByIdentity(symmetry), across.names(names), names, str(some.device))
    squares = [w * w for w in layout.gather(params)]
    log_c = squares[0].new_zeros(layout.n_scales + 1)
    for visit in plan.walk:
        into = across.total(_norms(visit.taken(squares), log_c, visit)[0])
        log_c = torch.add(log_c, _safe_log(into), alpha=0.5)
    for visit, taken in [(visit, visit.taken(squares)) for visit in plan.sweep] * sweeps:
        norms = across.total(_norms(taken, log_c, visit))
        into, out = _safe_log(norms + plan.mean(norms)).unbind()
        log_c = torch.add(log_c, (into - out) * (norms > 0).all(0), alpha=0.25)
    return log_c


def scales(log_c: Tensor | None, rows: Units, cols: Units) -> Tensor | None:
    """``s`` of a stack, ``[N, R, C]`` (None: all ones).

    A product that a step takes a dozen times: made once, it is read in one pass each time, its two factors in two.
    """
    if log_c is None or rows.index.shape[-1] + cols.index.shape[-1] == 0:
        return None
    return _scale(log_c, rows).exp().unsqueeze(2) * _scale(log_c, cols).exp().unsqueeze(1)


def _scale(log_c: Tensor, units: Units) -> Tensor:
    """``sum_k exponent_k log c_k``: ``[..., K] -> [...]``."""
    return (log_c[units.index] * units.exponent.to(log_c.dtype)).sum(-1)


def _safe_log(x: Tensor) -> Tensor:
    """0 where x is."""
    return torch.where(x > 0, x, 1).log()


@dataclass(frozen=True, eq=False)
class _Part:
    """Some blocks of one stack, and which sums of their squares are wanted."""

    stack: int
    take: Tensor | None  # blocks of the stack [n], or None for all
    row_sums: bool
    col_sums: bool


@dataclass(frozen=True, eq=False)
class _Visit:
    """One update of some labels: which blocks to sum, and which sums count as written or read by which unit."""

    parts: tuple[_Part, ...]
    units: Units  # [M, K]: of the rows and columns of every part, one after the other
    lengths: tuple[int, ...]  # how many those are: rows and columns of the first part, of the second, ...
    unit: Tensor  # [Q] number of the unit that writes what is summed, or of the one that reads it + n_scales + 1
    at: Tensor  # [Q] position in the concatenated sums
    weight: Tensor  # [Q]

    def taken(self, squares: list[Tensor]) -> list[Tensor]:
        """The blocks of every part, of the squares of all stacks."""
        return [squares[p.stack] if p.take is None else squares[p.stack].index_select(0, p.take) for p in self.parts]


@dataclass(frozen=True, eq=False)
class _Plan:
    walk: tuple[_Visit, ...]
    sweep: tuple[_Visit, ...]
    label: Tensor  # of every unit [n_scales + 1], by number; the dummy has one of its own
    sizes: Tensor  # units of every label

    def mean(self, x: Tensor) -> Tensor:
        """Over the units of a label, for each of them: ``[2, n_scales + 1] -> [2, n_scales + 1]``."""
        sums = x.new_zeros(2, len(self.sizes)).index_add(1, self.label, x)
        return (sums / self.sizes.to(x.dtype)).index_select(1, self.label)


def _norms(taken: list[Tensor], log_c: Tensor, visit: _Visit) -> Tensor:
    """Squared norms in the current frame of what each visited unit writes and reads: ``[2, n_scales + 1]``."""
    if not taken:
        return log_c.new_zeros(2, len(log_c))
    factors = torch.exp(-2 * _scale(log_c, visit.units)).split(visit.lengths)
    sums, own = [], []
    for part, x, r, c in zip(visit.parts, taken, factors[::2], factors[1::2], strict=True):
        if part.row_sums:
            sums.append(torch.bmm(x, c.view(len(x), -1, 1)).flatten())
            own.append(r)
        if part.col_sums:
            sums.append(torch.bmm(r.view(len(x), 1, -1), x).flatten())
            own.append(c)
    flat = (torch.cat(sums) * torch.cat(own)).index_select(0, visit.at) * visit.weight.to(log_c.dtype)
    return flat.new_zeros(2 * len(log_c)).index_add(0, visit.unit, flat).view(2, -1)


@lru_cache(maxsize=256)
def _plan(key: ByIdentity, names: tuple[str, ...], own: tuple[str, ...], device: str) -> _Plan:
    """The plan for the tensors ``names``, of which this process has ``own``, which it visits."""
    symmetry = key.symmetry
    layout = layout_of(symmetry, own, torch.device(device))
    whole = layout if own == names else layout_of(symmetry, names, torch.device("cpu"))
    label_of, start = {}, 0
    for name, s in symmetry.scales.items():
        count = int(torch.Size(symmetry.table_shape(s.label, s.size)).numel())
        label_of.update(dict.fromkeys(range(start, start + count), name))
        start += count
    partly = _scaled(spec for n, spec in symmetry.specs.items() if n not in names and not is_statistic(n))
    free = [n for n, s in symmetry.scales.items() if s.kind != "sign" and n not in partly]
    touches = _incidences(whole, label_of, set(free))
    here = {at: place for place, at in _places(layout)}

    walk, known = [], {n for n in symmetry.scales if n not in free}
    waiting = list(free)
    while waiting:
        # a label is reached when the blocks that write it have no other unknown label: all of them, or, where none has
        # all (a residual stream is a cycle), some; biases, which may be zero, count only where nothing else writes
        writers = {n: [t for t in touches if t.written == [n] and not t.repeated] for n in waiting}
        weighty = {n: [t for t in use if t.kind != "vector"] for n, use in writers.items()}
        writers = {n: weighty[n] or use for n, use in writers.items()}
        ready = {n: [t for t in writers[n] if t.others(n) <= known] for n in waiting}
        some = {n: use for n, use in ready.items() if use}
        reached = {n: use for n, use in some.items() if len(use) == len(writers[n])} or some
        if not reached:
            logger.warning(
                "The scales of %s are not seen: each is written only together with another unknown one. The potentials "
                "of their units are 1. Training goes on, but steps depend on how these units are scaled.",
                ", ".join(waiting),
            )
            break
        walk.append(_visit(layout, here, label_of, reached, only_in=True))
        known |= set(reached)
        waiting = [n for n in waiting if n not in reached]
    balanced = [n for n in free if n not in waiting]
    sweep = tuple(
        _visit(layout, here, label_of, {n: [t for t in touches if n in t.labels] for n in part}, only_in=False)
        for part in _independent_sets(balanced, touches)
    )
    numbers = {name: i for i, name in enumerate(symmetry.scales)}
    label = torch.tensor([*(numbers[label_of[i]] for i in range(start)), len(numbers)], device=device)
    return _Plan(tuple(walk), sweep, label, label.bincount())


def _scaled(specs: Iterable[Spec]) -> set[str]:
    """The scale labels on these tensors; an empty one has no units that it could be the scale of."""
    leaves = (leaf for s in specs if math.prod(s.shape) for axis in s.axes for leaf in leaves_of(axis))
    return {label for leaf in leaves for label, _ in leaf.scale}


_At = tuple[str, int, int]  # a tensor, a block of it, a matrix of that


@dataclass(frozen=True, eq=False)
class _Touch:
    """One block of a tensor, of one kind, and the free scale labels on it."""

    at: _At
    kind: str
    written: list[str]
    labels: set[str]
    repeated: bool

    def others(self, label: str) -> set[str]:
        return self.labels - {label}


def _incidences(layout: BlockLayout, label_of: Mapping[int, str], free: set[str]) -> list[_Touch]:
    touches = []
    for (i, n), at in _places(layout):
        stack = layout.stacks[i]
        found: list[tuple[str, float]] = []
        for units in (stack.row_scales, stack.col_scales):
            for k in range(units.index.shape[-1]):
                exponent = units.exponent[n, 0, k].item() if units.index.shape[1] else 0.0
                if exponent and label_of[int(units.index[n, 0, k])] in free:  # signs have no potential
                    found.append((label_of[int(units.index[n, 0, k])], exponent))
        labels = [label for label, _ in found]
        written = [label for label, e in found if e > 0]
        touches.append(_Touch(at, stack.kind, written, set(labels), len(set(labels)) < len(labels)))
    return touches


def _places(layout: BlockLayout) -> Iterator[tuple[tuple[int, int], _At]]:
    """Every matrix of every stack: ``(stack, number in it)``, and which matrix of which block of which tensor it is."""
    for i, stack in enumerate(layout.stacks):
        parts = [(name, k, j) for name, k, batch in stack.members for j in range(batch)]
        yield from (((i, n), at) for n, at in enumerate(parts))


def _independent_sets(labels: list[str], touches: list[_Touch]) -> list[list[str]]:
    """Greedy colouring: labels that share a block are balanced one after the other, the others at once."""
    sets: list[list[str]] = []
    near: dict[str, set[str]] = {n: set() for n in labels}
    for t in touches:
        for n in t.labels & near.keys():
            near[n] |= t.labels - {n}
    for n in labels:
        home = next((s for s in sets if not near[n] & set(s)), None)
        if home is None:
            sets.append([n])
        else:
            home.append(n)
    return sets


def _visit(
    layout: BlockLayout,
    here: Mapping[_At, tuple[int, int]],
    label_of: Mapping[int, str],
    use: Mapping[str, list[_Touch]],
    only_in: bool,
) -> _Visit:
    wanted: dict[int, dict[int, set[str]]] = {}
    for label, touches in use.items():
        for i, n in (here[t.at] for t in touches if t.at in here):
            wanted.setdefault(i, {}).setdefault(n, set()).add(label)
    parts, all_units, position = [], [], 0
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, blocks in wanted.items():
        stack = layout.stacks[i]
        chosen = sorted(blocks)
        whole = len(chosen) == stack.shape[0]
        take = None if whole else torch.tensor(chosen, device=stack.fixed.device)
        present = {}
        for side, of_stack in (("rows", stack.row_scales), ("cols", stack.col_scales)):
            units = _select(of_stack, take)
            all_units.append(units)
            mask = _belongs(units, [blocks[n] for n in chosen], label_of)
            mask = mask & (units.exponent > 0 if only_in else units.exponent != 0)
            present[side] = bool(mask.any())
            if not present[side]:
                continue
            n, length, k = units.index.shape
            at = (position + torch.arange(n * length)).reshape(n, length, 1).expand(n, length, k)
            weight = torch.ones(n, length, k)
            if stack.kind == "embedding":  # one of its columns is read at a time: the mean over them counts
                weight = weight / stack.shape[2]
            if side == "cols":  # fan_in / fan_out of the reading tensor, counted in units of the label
                weight = weight * _label_sizes(units, label_of) / stack.shape[1]
            unit = units.index + torch.where(units.exponent > 0, 0, layout.n_scales + 1)
            cpu = mask.cpu()
            entries.append((unit.cpu()[cpu], at[cpu], weight[cpu]))
            position += n * length
        parts.append(_Part(i, take, present["rows"], present["cols"]))
    device = layout.stacks[0].fixed.device
    if not parts:
        none = torch.zeros(0, device=device)
        return _Visit((), Units(none, none), (), none, none, none)
    unit, at, weight = (torch.cat(x).to(device) for x in zip(*entries, strict=True))
    lengths = tuple(u.index.shape[0] * u.index.shape[1] for u in all_units)
    return _Visit(tuple(parts), _one_after_the_other(all_units, layout.n_scales), lengths, unit, at, weight)


def _one_after_the_other(parts: list[Units], dummy: int) -> Units:
    """``[N, L, K]`` of several shapes -> ``[M, K]``."""
    most = max(u.index.shape[-1] for u in parts)

    def joined(tensors: list[Tensor], value: float) -> Tensor:
        padded = [torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=value) for x in tensors]
        return torch.cat([x.flatten(0, 1) for x in padded])

    return Units(joined([u.index for u in parts], dummy), joined([u.exponent for u in parts], 0.0))


def _select(units: Units, take: Tensor | None) -> Units:
    if take is None:
        return units
    return Units(units.index.index_select(0, take), units.exponent.index_select(0, take))


def _belongs(units: Units, labels: list[set[str]], label_of: Mapping[int, str]) -> Tensor:
    """``[N, L, K]``: is this unit of one of the block's wanted labels?"""
    numbers = units.index.flatten(1).tolist()
    found = [[label_of.get(u) in wanted for u in block] for block, wanted in zip(numbers, labels, strict=True)]
    return torch.tensor(found, dtype=torch.bool, device=units.index.device).reshape(units.index.shape)


def _label_sizes(units: Units, label_of: Mapping[int, str]) -> Tensor:
    """``[N, L, K]``: how many units this one's label has; 1 for "no unit"."""
    count = Counter(label_of.values())
    sizes = [float(count[label_of[u]]) for u in range(len(label_of))]
    return torch.tensor([*sizes, 1.0])[units.index.cpu()]
