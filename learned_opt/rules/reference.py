"""The rule of :mod:`learned_opt.rules.whitened_polar` one tensor after the other: to read, and to test that one by.

Plain torch in the order of the equations; no stacks, no buffers, no caches. Of the fast path it takes what a tensor is
(:func:`batches_of`: a matrix, thin, an embedding or a vector, its axes and its bias), the potentials of units and the
schedule's functions of numbers; everything else is written once more. It does not run under ``vmap``. State is by
tensor, ``state[name][slot]``, with ``state["network"]`` and ``state["frame"]`` beside it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from learned_opt.batch_layout import batches_of
from learned_opt.batches import FlatBatch, TensorBatch
from learned_opt.frame import potentials
from learned_opt.rules import auto_lr
from learned_opt.rules.auto_lr import Measured, Number
from learned_opt.rules.base import State, UpdateRule, Weights
from learned_opt.symmetry import Element, Symmetry

BETA2, MOMENT_BETA, BOUND, TINY = 0.99, 0.98, 544, 1e-30


class Reference(UpdateRule):
    """Whitened polar steps on matrices, Adam's on the rest; ``measure_lr``: whether the rate is measured."""

    ends = sets_rate = True

    def __init__(self, measure_lr: bool = True) -> None:
        super().__init__()
        self.measure_lr = measure_lr

    def init(self, params: Weights, symmetry: Symmetry) -> State:  # slots are zero until they are written
        zero = next(iter(params.values())).new_zeros(())
        state: State = {n: defaultdict(lambda: zero) for n in ("network", "frame", *params)}
        state["network"]["beta1"] = zero + 0.9
        return state

    def forward(
        self, params: Weights, grads: Weights, state: State, symmetry: Symmetry, **options: Any
    ) -> tuple[Weights, State]:
        names, total_steps = options.get("names") or tuple(params), options.get("total_steps")
        layout = batches_of(symmetry, names, next(iter(params.values())).device)
        batch = {n: b for b in layout.all for n in b.names}
        bias_of = {n: bias for b in layout.batches for n, bias in zip(b.names, b.biases, strict=False)}
        whole = {n: (n, bias_of[n]) if n in bias_of else (n,) for n in batch}
        numel = {n: sum(params[k].numel() for k in parts) for n, parts in whole.items()}
        new = {n: slots.copy() for n, slots in state.items()}
        network, frame = new["network"], new["frame"]
        t = network["clock"] = network["clock"] + 1
        for n in batch:
            new[n]["step"] = new[n]["step"] + 1
        now = {int(t), *(int(new[n]["step"]) for n in batch if n in grads)}
        frame_due, moments_due = (any(a <= 3 or a % every == 0 for a in now) for every in (10, 5))

        # the frame, and by the size of weights in it: factors of steps, and the share of the weights that decays
        frame |= scales(symmetry, params) if frame_due else {}
        for n, b in batch.items() if frame_due else ():
            new[n] |= {"size": t * 0 + 2, "decay": t * 0}
            if isinstance(b, TensorBatch) and not b.factored:
                w = params[n] / frame[n]
                size = new[n]["size"] = (w.square().mean().sqrt() * b.C**0.5 / 0.5).clamp(0.1, 1.0)
                if b.is_matrix and w.any():
                    usual = math.sqrt(sum(len(x) * usual_norm(x, n in bias_of) ** 2 for x in symmetry.split(n, w)))
                    share = 0.025 * (512 / b.C) ** 0.25 * auto_lr.decay_scale(t, total_steps)
                    new[n]["decay"] = share * usual * size / w.norm()

        # gradients in the frame, clipped at four times what was usual before
        g = {n: frame[n] * grads.get(n, torch.zeros_like(params[n])) for n in names}
        norm = {n: get_total_norm([g[k] for k in parts]) for n, parts in whole.items()}
        for n, parts in whole.items():
            own = new[n]
            most = 4 * (own["mean_square"] * numel[n] / (1 - BETA2 ** (own["step"] - 1) + TINY)).sqrt()
            factor = (most / norm[n].clamp(min=TINY)).clamp(max=1) if most > 0 else 1
            norm[n], g = factor * norm[n], g | {k: factor * g[k] for k in parts}
            own["mean_square"] = BETA2 * own["mean_square"] + (1 - BETA2) * norm[n] ** 2 / numel[n]

        # the slope along the last step, the momentum that it asks for, and what the rate gains by it
        old = Measured(*(network[k] for k in Measured._fields))
        if self.measure_lr and (t <= 51 or t % 5 == 0):
            down = sum((g[n] * state[n]["last_update"]).sum() for n in names)
            most = torch.stack([norm[n] * state[n]["update_norm"] for n in batch]).sum()
            network["slope"] = 0.8 * old.slope + 0.2 * (down / most if most > 0 else 0)
            network["log_lr"] = auto_lr.log_lr(old, network["slope"], t, total_steps)
            network["beta1"] = auto_lr.beta1(t, network["slope"])

        # momentum, second moments and their roots
        beta1, ahead = network["beta1"], {}
        warmup, every = float(auto_lr.warmup_weight(t, total_steps)), 1 if t <= 3 else 5
        for n in names:
            new[n]["m"] = beta1 * new[n]["m"] + (1 - beta1) * g[n]
            ahead[n] = beta1 * new[n]["m"] + (1 - beta1) * g[n]
        for n, b in batch.items():
            own, table = new[n], isinstance(b, TensorBatch) and b.factored
            thin, (full, diagonal) = isinstance(b, FlatBatch) or b.thin, axes_of(b)
            if thin:
                own["v"] = BETA2 * own["v"] + (1 - BETA2) * g[n].square()
            kept = BETA2 if table else MOMENT_BETA**every
            for i in full + diagonal if table or (moments_due and (warmup > 0 or not thin)) else ():
                x = g[n].movedim(i, 0).flatten(1)
                found = x @ x.mT / x.shape[1] if i in full else x.square().mean(1)
                own[f"moment{i}"] = kept * own[f"moment{i}"] + (1 - kept) * found
            if n in bias_of and moments_due:  # biases whose gradients alternate step less
                bias = new[bias_of[n]]
                bias["v"] = BETA2**every * bias["v"] + (1 - BETA2**every) * g[bias_of[n]].square()
                direction = adam(bias["m"], bias["v"] + 1e-16 * own["mean_square"], own["step"])
                bias["snr"] = (direction.square().mean().sqrt() / 0.2).clamp(max=1.0)
            if any(map(roots_are_due, now)) and (warmup > 0 or not thin):
                own |= {f"root{i}": root(own[f"moment{i}"], -0.75 if thin else -0.125) for i in full}

        # the rate
        end = auto_lr.warmup_steps(total_steps)
        lr_scale: Number = 1.0 if total_steps is None else auto_lr.horizon_scale(total_steps)
        if self.measure_lr and 2 * end < t <= 3 * end:
            m2 = sum(new[n]["m"].square().sum() for n in names)
            v = sum(numel[n] * new[n]["mean_square"] / (1 - BETA2 ** new[n]["step"]) for n in batch)
            correlation = (1 + beta1) / (1 - beta1) * m2 / v if v > 0 else 0 * t
            network["correlation"] = auto_lr.mean_correlation(old, correlation, t, total_steps)
        if self.measure_lr:
            lr_scale = auto_lr.lr_scale(Measured(*(network[k] for k in Measured._fields)), t, total_steps)
        rate = lr_scale * auto_lr.RATE * auto_lr.decay(t, total_steps)

        # steps, less the decay that is asked for, or the rule's own
        updates, asked = Weights(), options.get("weight_decay")
        largest_square = max(new[n]["mean_square"] for n in batch)
        for n, b in batch.items():
            if isinstance(b, TensorBatch) and b.is_matrix:
                d = polar_step(symmetry, b, new[n], {k: ahead[k] for k in whole[n]})
                d |= {k: 3 * new[k].get("snr", 1.0) * d[k] for k in whole[n][1:]}
            else:
                d = {n: adam_step(b, new[n], ahead[n], largest_square, warmup)}
            d = {k: rate * new[n]["size"] * x for k, x in d.items()}
            if t + 1 <= 51 or (t + 1) % 5 == 0:
                new[n]["update_norm"] = get_total_norm(list(d.values()))
            for k, x in d.items():
                new[k]["last_update"] = x if t + 1 <= 51 or (t + 1) % 5 == 0 else new[k]["last_update"]
                share = asked.get(k) if isinstance(asked, Mapping) else asked
                if share is None:
                    share = new[n]["decay"] * seen_rows(b, new[n]) if isinstance(b, TensorBatch) and k == n else 0
                updates[k] = -frame[k] * x - rate * share * params[k]
        for n in names:  # tensors without a gradient stay as they are
            new[n] = new[n] if n in grads else state[n]
        return {n: updates[n] for n in grads}, new


def axes_of(b: TensorBatch | FlatBatch) -> tuple[list[int], list[int]]:
    """Axes with second moments: of a matrix' hidden units if they are not too many, and those with a diagonal alone."""
    if isinstance(b, FlatBatch):
        return [], []
    full = [i for i in b.axes if i in b.hidden and b.shape[i] <= BOUND and not b.factored]
    return full, [i for i in b.axes if i not in full and not b.thin]


def scales(symmetry: Symmetry, params: Weights) -> Weights:
    """Of every entry: what the group's element of the units' potentials makes of ones."""
    element, log_scale = symmetry.identity(), potentials(symmetry, params)
    if log_scale is not None:
        parts = log_scale[:-1].exp().split([x.numel() for x in element.scales.values()])
        tables = {n: x.view(one.shape) for (n, one), x in zip(element.scales.items(), parts, strict=True)}
        element = Element(element.perms, tables)
    return symmetry.act(element, {n: torch.ones_like(p) for n, p in params.items()})


def roots_are_due(t: int) -> bool:
    """At steps 1 to 3, every ten up to 50, then whenever the run is 1.2 times as long."""
    before, stage = (math.floor(math.log(max(x, 50) / 50) / math.log(1.2) + 1e-6) for x in (t - 1, t))
    return t <= 3 or (t <= 50 and t % 10 == 0) or stage > before


def root(moment: Tensor, power: float) -> Tensor:
    """``(A / mean of its diagonal + 1e-4)^power``; units without gradients are mixed with none."""
    mean, eye = moment.diagonal().mean(), torch.eye(len(moment), dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(moment / (mean if mean > 0 else 1) + 1e-4 * eye)
    seen = moment.diagonal() > 0
    result = (vectors * values.clamp(min=1e-4) ** power) @ vectors.mT
    return torch.where(torch.outer(seen, seen) | (eye > 0), result, 0)


def along(x: Tensor, axis: int, by: Tensor) -> Tensor:
    """A tensor times a symmetric matrix, or times a number for each unit, along an axis."""
    x = x.movedim(axis, -1)
    return (x @ by if by.ndim == 2 else x * by).movedim(-1, axis)


def seen_rows(b: TensorBatch, own: dict[str, Tensor]) -> Tensor:
    """1 for the rows of a matrix that have had a gradient, 0 for the others: only those decay."""
    x = torch.ones_like(own["m"])
    for i in filter(b.is_row, b.axes):
        moment = own[f"moment{i}"]
        x = along(x, i, (moment.diagonal() if moment.ndim == 2 else moment) > 0)
    return x


def adam(m: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """``m / sqrt(v)``, corrected for the age."""
    return m / v.clamp(min=TINY).sqrt() * (1 - BETA2**step).sqrt() / (1 - 0.9**step)


def adam_step(
    b: TensorBatch | FlatBatch, own: dict[str, Tensor], ahead: Tensor, largest_square: Tensor, warmup: float
) -> Tensor:
    """Adam's direction of vectors, of embeddings (v of rank one) and of thin matrices (turned in the warm-up)."""
    square = own["mean_square"]
    if isinstance(b, TensorBatch) and b.factored:
        v = square * torch.ones_like(ahead)
        for i in b.axes:
            v = along(v, i, own[f"moment{i}"] / square.clamp(min=TINY) + 1e-16)
        return adam(own["m"], v, own["step"])
    d = adam(own["m"], own["v"] + 1e-16 * square, own["step"])
    if isinstance(b, FlatBatch):  # rounding noise beside others' gradients moves nothing
        return d * (square > (256 * torch.finfo(d.dtype).eps) ** 2 * largest_square)
    full, _ = axes_of(b)
    for i in full if warmup > 0 else ():
        ahead = along(ahead, i, own[f"root{i}"])
    if not full or warmup == 0 or not d.any():
        return d
    turned = torch.lerp(d, ahead * d.norm() / ahead.norm(), warmup)
    return turned * d.norm() / turned.norm()


def polar_step(symmetry: Symmetry, b: TensorBatch, own: dict[str, Tensor], n: Weights) -> Weights:
    """``P polar(P n P) P`` of a matrix and of its bias, at the size of the polar factor."""
    full, diagonal = axes_of(b)
    roots = {i: own[f"root{i}"] for i in full}
    v = {i: own[f"moment{i}"] / own[f"moment{i}"].mean().clamp(min=TINY) for i in diagonal}
    n = multiplied(b, n, roots | {i: (x + 1e-8) ** -0.25 for i, x in v.items()})
    n = {k: x if k in b.names else 3 * x for k, x in n.items()}  # the weight of an input of size 3
    sizes = []

    def factor(x: Tensor) -> Tensor:
        found = polar(x)
        sizes.append(torch.linalg.matrix_norm(found, keepdim=True) * scale(x.shape[1], x.shape[2] - len(n) + 1))
        return found

    d = multiplied(b, on_matrices(symmetry, n, factor), roots)
    return on_matrices(symmetry, d, lambda x: unit_length(x) * sizes.pop(0))


def multiplied(b: TensorBatch, n: Weights, factors: Mapping[int, Tensor]) -> Weights:
    """A matrix times something along each of some axes; a bias has its rows."""
    for i, by in factors.items():
        n = {k: along(x, i, by) if k in b.names else along(x, 0, by) if b.is_row(i) else x for k, x in n.items()}
    return n


def on_matrices(symmetry: Symmetry, n: Weights, function: Callable[[Tensor], Tensor]) -> Weights:
    """A function of the matrices ``[B, R, K]`` that a tensor holds, with its bias (the second of ``n``) as a column."""
    parts = zip(*(symmetry.split(k, x) for k, x in n.items()), strict=True)
    found = [function(torch.cat(blocks, -1)) for blocks in parts]
    columns = (slice(-1), slice(-1, None)) if len(n) == 2 else (slice(None),)
    return {k: symmetry.merge(k, [x[..., own] for x in found]) for k, own in zip(n, columns, strict=True)}


def unit_length(x: Tensor) -> Tensor:
    """Matrices at norm 1."""
    return x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)


def scale(rows: int, fan_in: int) -> float:
    """What polar factors of matrices are multiplied by."""
    return 0.2 * (512 / fan_in) ** 0.25 * max(rows, fan_in) ** 0.5


def usual_norm(x: Tensor, has_bias: int) -> float:
    """The norm of a usual step of matrices ``[B, R, C]`` with or without a bias: that of polar factors of full rank."""
    rows, fan_in = x.shape[1:]
    return scale(rows, fan_in) * 0.9 * min(rows, fan_in + has_bias) ** 0.5


def polar(x: Tensor) -> Tensor:
    """Four iterations of Newton and Schulz, with Muon's coefficients."""
    x = unit_length(x)
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x
